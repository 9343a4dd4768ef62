"""The response of a FitzHugh-Nagumo neuron to a constant current, with learnable membrane."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Sample, inverse_softplus
from dualnn.activations.flow import MINIMUM, Flow, discrete
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError


def rest(a: Tensor, b: Tensor) -> Tensor:
    """The voltage v at which nothing moves without a current: v - v^3 / 3 = (v + a) / b, for 0 < b < 1.

    The only real root of v^3 + p v + q, p = 3 (1 / b - 1) > 0, q = 3 a / b.
    """
    p, q = 3 * (1 / b - 1), 3 * a / b
    scale = torch.sqrt(p / 3)
    return -2 * scale * torch.sinh(torch.asinh(1.5 * q / (p * scale)) / 3)


def _reference(x: Any, a: Any, b: Any, tau: Any, span: Any) -> Any:
    import mpmath as mp

    v0 = mp.findroot(lambda v: v - v**3 / 3 - (v + a) / b, (-1 - abs(a), 1 + abs(a)), solver="anderson")

    def field(s: Sequence[Any]) -> list[Any]:
        v, w = s
        return [span * (v - v**3 / 3 - w + x), span * (v + a - b * w) / tau]

    return discrete(field, [v0, (v0 + a) / b], 1)[0] - v0


@register("fitzhugh_nagumo")
class FitzHughNagumo(Flow):
    r"""How far a FitzHugh-Nagumo neuron is from rest after a time T under the current x; learned per channel.

    .. math:: v' = v - \tfrac13 v^3 - w + x, \qquad \tau w' = v + a - b w, \qquad (v, w)(0) = (v_0, w_0), \qquad
       y = v(T) - v_0

    with the rest (v_0, w_0) of the neuron without current, which is unique for b in (0, 1) and has a closed form.
    y(0) = 0. Below a threshold the voltage hardly leaves its rest, above it the neuron fires: a spike whose slope is
    true and finite, where integrate-and-fire models need a surrogate. Large currents hold v near the cube root of 3 x.

    Why it exists: a spiking unit that needs no biased gradient: derivatives in current, membrane and time are those of
    the integrated equation. (With small tau it is stiff: take a stiff method.)

    Args:
        a: Initial a, any number.
        b: Initial b, in (0.01, 0.99).
        tau: Initial tau, > 0.01: recovery is this many times slower than the voltage.
        span: Initial T, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        method: Of `dualnn.solvers.odeint`.
        tol: Tolerance of a step's error, relative and absolute; None: 1e-5 in float32, 1e-8 in float64.
        steps: This many equal steps in place of error control.
        max_steps: Steps of any entry after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do infinite inputs. bfloat16 and float16 are
        computed in float32.

    Raises:
        DualInputError: integer input; b, tau or span out of range; tol, steps or max_steps out of range.
        UnknownNameError: another method.
        ConvergenceError: an entry that cannot be integrated (see `max_steps`).

    Reference:
        FitzHugh, "Impulses and physiological states in theoretical models of nerve membrane", 1961. Nagumo, Arimoto,
        Yoshizawa, "An active pulse transmission line simulating nerve axon", 1962.

    Example:
        >>> FitzHughNagumo()(torch.tensor([0.0, 0.2, 1.0])).detach()  # at rest, below and above the threshold
        tensor([0.0000, 0.4710, 3.3607])
    """

    def __init__(
        self,
        a: float = 0.7,
        b: float = 0.8,
        tau: float = 12.5,
        span: float = 3.0,
        num_channels: int = 1,
        method: str = "dopri5",
        tol: float | None = None,
        steps: int | None = None,
        max_steps: int = 10_000,
    ) -> None:
        """Start every channel at the same neuron."""
        super().__init__(num_channels, method, tol, steps, max_steps)
        if not MINIMUM < b < 1 - MINIMUM:
            raise DualInputError(f"fitzhugh_nagumo: b must lie in ({MINIMUM}, {1 - MINIMUM}), got {b}")
        if not min(tau, span) > MINIMUM:
            raise DualInputError(f"fitzhugh_nagumo: tau and span must exceed {MINIMUM}, got {tau}, {span}")
        share = torch.tensor((b - MINIMUM) / (1 - 2 * MINIMUM), dtype=torch.float64)
        self.a = nn.Parameter(self.per_channel(a))
        self.raw_b = nn.Parameter(self.per_channel(torch.logit(share).item()))
        self.raw_tau = nn.Parameter(self.per_channel(inverse_softplus(tau - MINIMUM)))
        self.raw_span = nn.Parameter(self.per_channel(inverse_softplus(span - MINIMUM)))

    @staticmethod
    def constants(x: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """The current, the voltage's linear and quadratic coefficients, and the rates in units of T."""
        a, b, tau, span = parameters
        v0 = rest(a, b)
        return x, 1 - v0 * v0, v0, span, span / tau, b

    @staticmethod
    def field(state: Sequence[Tensor], *constants: Tensor) -> Sequence[Tensor]:
        """Voltage and recovery, measured from rest: small responses keep their digits."""
        (v, w), (x, linear, v0, span, rate, b) = state, constants
        return span * (v * (linear - v * (v0 + v / 3)) - w + x), rate * (v - b * w)

    @staticmethod
    def begin(x: Tensor) -> Sequence[Tensor]:
        """At rest."""
        return torch.zeros_like(x), torch.zeros_like(x)

    def natural(self) -> tuple[Tensor, ...]:
        """a, b, tau and T, each of shape (num_channels,)."""
        b = MINIMUM + (1 - 2 * MINIMUM) * torch.sigmoid(self.raw_b)
        return self.a, b, MINIMUM + F.softplus(self.raw_tau), MINIMUM + F.softplus(self.raw_span)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests: equal steps, whose result is a smooth function."""
        return [Sample({"tau": 2.0, "span": 0.7, "steps": 1}, (-1.3, 0.0, 0.4, 1.7), _reference)]
