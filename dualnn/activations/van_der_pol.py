"""The flow of van der Pol's oscillator, with learnable damping and time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Sample, inverse_softplus
from dualnn.activations.flow import MINIMUM, Flow, discrete
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError


def _reference(x: Any, damping: Any, span: Any) -> Any:
    def field(s: Sequence[Any]) -> list[Any]:
        return [span * s[1], span * (damping * (1 - s[0] ** 2) * s[1] - s[0])]

    return discrete(field, [x, 0 * x], 4)[0]


@register("van_der_pol")
class VanDerPol(Flow):
    r"""Where van der Pol's oscillator stands after a time T, released at rest from x; mu and T learned per channel.

    .. math:: v'' = \mu (1 - v^2)\, v' - v, \qquad v(0) = x, \quad v'(0) = 0, \qquad y = v(T)

    Odd. Small inputs swing (their slope at 0 is that of a linear oscillator with gain e^(mu T / 2): the sign may turn),
    large ones hardly move: y tends to x - T / (mu x). All of them are drawn to the limit cycle as T grows.

    Why it exists: large inputs make it stiff (the velocity decays at the rate mu x^2), so explicit steps, which are
    what unrolled backprop can differentiate, need thousands; implicit ones contain linear solves and are accepted or
    rejected by the data. Here the derivative is that of the accepted steps.

    Args:
        damping: Initial mu, > 0.01.
        span: Initial T, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        method: Of `dualnn.solvers.odeint`; "dopri5" is quicker while mu x^2 T stays below about 20.
        tol: Tolerance of a step's error, relative and absolute; None: 1e-5 in float32, 1e-8 in float64.
        steps: This many equal steps in place of error control.
        max_steps: Steps of any entry after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do infinite inputs. bfloat16 and float16 are
        computed in float32.

    Raises:
        DualInputError: integer input; damping or span not above 0.01; tol, steps or max_steps out of range.
        UnknownNameError: another method.
        ConvergenceError: an entry that cannot be integrated (its square overflows, or see `max_steps`).

    Reference:
        van der Pol, "On relaxation-oscillations", 1926. Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary
        differential equations", 2018, arXiv 1806.07366.

    Example:
        >>> VanDerPol()(torch.tensor([0.0, 0.5, 2.0])).detach()
        tensor([0.0000, 0.1928, 1.5081])
    """

    def __init__(
        self,
        damping: float = 1.0,
        span: float = 1.0,
        num_channels: int = 1,
        method: str = "radau",
        tol: float | None = None,
        steps: int | None = None,
        max_steps: int = 10_000,
    ) -> None:
        """Start every channel at the same oscillator."""
        super().__init__(num_channels, method, tol, steps, max_steps)
        if not min(damping, span) > MINIMUM:
            raise DualInputError(f"van_der_pol: damping and span must exceed {MINIMUM}, got {damping}, {span}")
        self.raw_damping = nn.Parameter(self.per_channel(inverse_softplus(damping - MINIMUM)))
        self.raw_span = nn.Parameter(self.per_channel(inverse_softplus(span - MINIMUM)))

    @staticmethod
    def field(state: Sequence[Tensor], *constants: Tensor) -> Sequence[Tensor]:
        """Position and velocity, in units of T."""
        (v, w), (damping, span) = state, constants
        return span * w, span * (damping * (1 - v * v) * w - v)

    @staticmethod
    def begin(x: Tensor) -> Sequence[Tensor]:
        """At rest."""
        return x, torch.zeros_like(x)

    def natural(self) -> tuple[Tensor, Tensor]:
        """mu and T, each of shape (num_channels,)."""
        return MINIMUM + F.softplus(self.raw_damping), MINIMUM + F.softplus(self.raw_span)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests: equal steps, whose result is a smooth function."""
        return [Sample({"damping": 1.5, "method": "dopri5", "steps": 4}, (-2.3, -0.4, 0.0, 1.2), _reference)]
