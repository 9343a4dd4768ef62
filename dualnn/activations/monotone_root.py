"""The inverse of a learned increasing function, by a bracketed Newton method."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, inverse_softplus
from dualnn.activations.monotone import increasing_root
from dualnn.activations.registry import register
from dualnn.engine.bridge import Equation
from dualnn.engine.errors import DualInputError

#: Slopes and heights stay above this.
MINIMUM = 1e-3


def learned(y: Tensor, slope: Tensor, *steps: Tensor) -> Tensor:
    """g(y) = slope y + sum_j a_j tanh(b_j (y - c_j)), `steps` being all a, then all b, then all c."""
    n = len(steps) // 3
    total = slope * y
    for a, b, c in zip(steps[:n], steps[n : 2 * n], steps[2 * n :], strict=True):
        total = total + a * torch.tanh(b * (y - c))
    return total


def residual(y: Tensor, x: Tensor, slope: Tensor, *steps: Tensor) -> Tensor:
    """F(y; x, ...) = g(y) - x."""
    return learned(y, slope, *steps) - x


def solve(x: Tensor, slope: Tensor, *steps: Tensor, max_steps: int = 100) -> Tensor:
    """The y with g(y) = x: value only, data-dependent stop.

    Shape:
        x, slope, steps: broadcastable to (*) -> y: (*). A NaN entry gives NaN there and disturbs no other.

    Raises:
        ConvergenceError: not converged after `max_steps`.
    """
    x, slope, *steps = torch.broadcast_tensors(x, slope, *steps)  # type: ignore[assignment]
    n = len(steps) // 3
    triples = list(zip(steps[:n], steps[n : 2 * n], steps[2 * n :], strict=True))
    reach = sum(a for a, _, _ in triples)  # g lies within it of slope * y
    reach = reach + 4 * torch.finfo(x.dtype).eps * (x.abs() + reach)

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, rise, size = slope * y - x, slope.clone(), (slope * y).abs() + x.abs()
        for a, b, c in triples:
            t = torch.tanh(b * (y - c))
            steep = a * b * (1 - t) * (1 + t)
            f, rise = f + a * t, rise + steep
            size = size + (a * t).abs() + steep * (y.abs() + c.abs())  # the rounding of y - c, through tanh
        return f, rise, size

    lower, upper = (x - reach) / slope, (x + reach) / slope
    return increasing_root(evaluate, lower, upper, x / slope, max_steps=max_steps, name="monotone_root")


def _reference(x: Any, slope: Any, *steps: Any) -> Any:
    import mpmath as mp

    n = len(steps) // 3
    triples = list(zip(steps[:n], steps[n : 2 * n], steps[2 * n :], strict=True))
    reach = sum(a for a, _, _ in triples) + 1

    def g(y: Any) -> Any:
        return slope * y + mp.fsum(a * mp.tanh(b * (y - c)) for a, b, c in triples) - x

    return mp.findroot(g, ((x - reach) / slope, (x + reach) / slope), solver="anderson", verify=False)


@register("monotone_root")
class MonotoneRoot(Activation):
    r"""The inverse of an increasing function that is learned: y with g(y) = x, per channel.

    .. math:: g(y) = s y + \sum_{j=1}^{m} a_j \tanh(b_j (y - c_j)) = x, \qquad s, a_j, b_j > 0

    Each step of g is a plateau of y: the unit learns a soft staircase (heights, widths and places), and its inverse is
    g itself (`inverse`), in closed form: an invertible layer. dy/dx = 1 / g'(y) <= 1 / s.

    Why it exists: there is no closed form for y; the iterations run under `no_grad` with a stop that depends on the
    data. `implicit_tanh` is the case of one step at 0, with either sign.

    Args:
        steps: m, the number of steps, >= 1; they start evenly spaced on [-2, 2].
        height: Initial a_j, > 0.001.
        steepness: Initial b_j, > 0.001.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        max_steps: Newton or bisection steps after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. A NaN input gives NaN at that entry only. bfloat16 and float16
        are computed in float32.

    Raises:
        DualInputError: integer input; steps, height or steepness out of range.
        ConvergenceError: see `max_steps`.

    Reference:
        The implicit function theorem on a solved equation. Huang, Krueger, Lacoste, Courville, "Neural autoregressive
        flows", 2018, arXiv 1804.00779 (the learned increasing function).

    Example:
        >>> act = MonotoneRoot(steps=2)
        >>> x = torch.tensor([-1.0, 0.3, 2.0])
        >>> bool((act.inverse(act(x)) - x).abs().max() < 1e-6)
        True
    """

    def __init__(
        self, steps: int = 2, height: float = 0.5, steepness: float = 2.0, num_channels: int = 1, max_steps: int = 100
    ) -> None:
        """Start every channel at the same staircase."""
        super().__init__(num_channels)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise DualInputError(f"monotone_root: steps must be an integer >= 1, got {steps!r}")
        if not min(height, steepness) > MINIMUM:
            raise DualInputError(
                f"monotone_root: height and steepness must exceed {MINIMUM}, got {height}, {steepness}"
            )
        self.steps, self.max_steps = steps, max_steps
        places = [0.0] if steps == 1 else [-2 + 4 * j / (steps - 1) for j in range(steps)]
        self.raw_slope = nn.Parameter(self.per_channel(inverse_softplus(1 - MINIMUM)))
        self.raw_heights = nn.Parameter(self.per_channel_row([inverse_softplus(height - MINIMUM)] * steps))
        self.raw_steepness = nn.Parameter(self.per_channel_row([inverse_softplus(steepness - MINIMUM)] * steps))
        self.places = nn.Parameter(self.per_channel_row(places))

    @property
    def local(self) -> Equation:
        """The equation and its solver."""
        return Equation(partial(solve, max_steps=self.max_steps), residual)

    def natural(self) -> tuple[Tensor, ...]:
        """s, all a, all b, all c, each of shape (num_channels,)."""
        heights, steepness = MINIMUM + F.softplus(self.raw_heights), MINIMUM + F.softplus(self.raw_steepness)
        slope = MINIMUM + F.softplus(self.raw_slope)
        return (slope, *heights.unbind(-1), *steepness.unbind(-1), *self.places.unbind(-1))

    def inverse(self, y: Tensor) -> Tensor:
        """g(y), the x that gives y."""
        return learned(y, *(self._spread(p, y) for p in self.natural()))

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"steps={self.steps}, max_steps={self.max_steps}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        return [
            Sample({"steps": 1}, (-30.0, -1.1, 0.0, 0.4, 3.0), _reference),
            Sample({"steepness": 4.0}, (-2.3, -0.1, 1.4), _reference),
        ]
