"""The flow of a learned vector field over unit time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Sample, inverse_softplus, widened
from dualnn.activations.flow import MINIMUM, Flow, discrete
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError


def _reference(x: Any, *parameters: Any) -> Any:
    import mpmath as mp

    n = len(parameters) // 3
    triples = list(zip(parameters[:n], parameters[n : 2 * n], parameters[2 * n :], strict=True))
    return discrete(lambda s: [mp.fsum(a * mp.tanh(b * (s[0] - c)) for a, b, c in triples)], [x], 3)[0]


@register("learned_flow")
class LearnedFlow(Flow):
    r"""Where a learned vector field, a small network per channel, carries x in unit time.

    .. math:: \frac{dv}{dt} = \sum_{j=1}^{m} a_j \tanh(b_j (v - c_j)), \qquad v(0) = x, \qquad y = v(1)

    Places with a_j < 0 attract (a soft quantiser), places with a_j > 0 repel (a soft gap). Trajectories cannot cross,
    so y increases in x *whatever the parameters are*, and `inverse` is the flow backwards: an invertible layer without
    a constraint. Far out y is x + const, at most the sum of the abs(a_j). (A longer time is a larger a.)

    Why it exists: `monotone_root` and `b_spline` buy monotonicity by constraints; a flow has it by nature. Unrolled,
    its memory would grow with the solver's stages, whose number depends on the data.

    Args:
        units: m >= 1; the places c_j start evenly spaced on [-2, 2].
        strength: Initial a_j, not 0.
        steepness: Initial b_j, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        method: Of `dualnn.solvers.odeint`; a stiff one where a_j b_j becomes large.
        tol: Tolerance of a step's error, relative and absolute; None: 1e-5 in float32, 1e-8 in float64.
        steps: This many equal steps in place of error control.
        max_steps: Steps of any entry after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do infinite inputs. bfloat16 and float16 are
        computed in float32.

    Raises:
        DualInputError: integer input; units, strength or steepness out of range; tol, steps or max_steps out of range.
        UnknownNameError: another method.
        ConvergenceError: an entry that cannot be integrated (see `max_steps`).

    Reference:
        Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", 2018, arXiv 1806.07366.

    Example:
        >>> act = LearnedFlow()
        >>> x = torch.tensor([-1.0, 0.3, 2.0])
        >>> bool((act.inverse(act(x)) - x).abs().max() < 1e-3)
        True
    """

    def __init__(
        self,
        units: int = 2,
        strength: float = -1.0,
        steepness: float = 2.0,
        num_channels: int = 1,
        method: str = "dopri5",
        tol: float | None = None,
        steps: int | None = None,
        max_steps: int = 10_000,
    ) -> None:
        """Start every channel at the same field."""
        super().__init__(num_channels, method, tol, steps, max_steps)
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise DualInputError(f"learned_flow: units must be an integer >= 1, got {units!r}")
        if strength == 0 or not steepness > MINIMUM:
            raise DualInputError(
                f"learned_flow: strength must not be 0 and steepness must exceed {MINIMUM}, got {strength}, {steepness}"
            )
        self.units = units
        places = [0.0] if units == 1 else [-2 + 4 * j / (units - 1) for j in range(units)]
        self.strengths = nn.Parameter(self.per_channel_row([strength] * units))
        self.raw_steepness = nn.Parameter(self.per_channel_row([inverse_softplus(steepness - MINIMUM)] * units))
        self.places = nn.Parameter(self.per_channel_row(places))

    @staticmethod
    def field(state: Sequence[Tensor], *constants: Tensor) -> Sequence[Tensor]:
        """The sum of the units."""
        n = len(constants) // 3
        total: Tensor | None = None
        for a, b, c in zip(constants[:n], constants[n : 2 * n], constants[2 * n :], strict=True):
            term = a * torch.tanh(b * (state[0] - c))
            total = term if total is None else total + term
        return (total,)  # type: ignore[return-value]

    def natural(self) -> tuple[Tensor, ...]:
        """All a, all b, all c, each of shape (num_channels,)."""
        steepness = MINIMUM + F.softplus(self.raw_steepness)
        return (*self.strengths.unbind(-1), *steepness.unbind(-1), *self.places.unbind(-1))

    def inverse(self, y: Tensor) -> Tensor:
        """The x that gives y: the flow backwards."""
        found = self.integrate(*widened(y, *(self._spread(p, y) for p in self.natural())), backwards=True)
        return found.to(y.dtype)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"units={self.units}, {super().describe()}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests: equal steps, whose result is a smooth function."""
        return [Sample({"units": 1, "strength": 0.8, "steps": 3}, (-2.1, -0.3, 0.5, 1.4), _reference)]
