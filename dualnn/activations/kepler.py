"""Kepler's equation E - e sin E = x, solved by Newton's method and differentiated at the solution."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, apply
from dualnn.activations.monotone import increasing_root
from dualnn.activations.registry import register
from dualnn.engine.bridge import Equation
from dualnn.engine.errors import DualInputError


def residual(y: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """F(y; x, e) = y - e sin(y) - x, elementwise and differentiable in every argument."""
    return y - e * torch.sin(y) - x


@torch.no_grad()
def solve(x: Tensor, e: Tensor, tol: float | None = None, max_steps: int = 100) -> Tensor:
    """The E with E - e sin E = x: value only, in place, data-dependent stop; converges from any x.

    Args:
        x: Mean anomaly, in radians (any real number, not reduced to one turn).
        e: Eccentricity, 0 <= e < 1.
        tol: Largest residual relative to abs(E) + e + abs(x); None: 4 eps of the dtype; 0: exactly `max_steps` steps.
        max_steps: Number of steps after which to give up.

    Shape:
        x, e: broadcastable to (*) -> E: (*). A NaN entry gives NaN there and disturbs no other.

    Raises:
        DualInputError: an eccentricity outside [0, 1).
        ConvergenceError: not converged after `max_steps` (tol > 0 only).
    """
    outside = (e < 0) | (e >= 1)
    if bool(outside.any()):
        raise DualInputError(
            f"kepler: the eccentricity must satisfy 0 <= e < 1, got {e[outside].flatten()[0].item():.9g} "
            f"({int(outside.sum())} of {e.numel()} entries)"
        )
    x, e = torch.broadcast_tensors(x, e)
    # E - x has the sign of sin(E), hence of sin(x), and is at most e. On that side, up to the next multiple of pi,
    # the residual curves away from zero: from the far end of the bracket Newton falls monotonically.
    side = torch.sign(torch.sin(x))
    slack = 4 * torch.finfo(x.dtype).eps * (x.abs() + 1)
    near, far = x - side * slack, x + side * (e + slack)
    # Close to x = 0, where e -> 1 makes the root steep: abs(E) <= abs(x) / (1 - e), as abs(sin E) <= abs(E).
    start = torch.where(far.abs() * (1 - e) > x.abs(), x / (1 - e), far)

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = e * torch.sin(y)
        # 1 - e cos y, without its cancellation at y = 0, e -> 1.
        return y - s - x, (1 - e) + 2 * e * torch.sin(y / 2) ** 2, y.abs() + s.abs() + x.abs()

    lower, upper = torch.minimum(near, far), torch.maximum(near, far)
    return increasing_root(evaluate, lower, upper, start, tol, max_steps, name="kepler")


def parametrise(raw: Tensor, margin: float) -> Tensor:
    """e = (1 - margin) sigmoid(raw), in (0, 1 - margin)."""
    return (1 - margin) * torch.sigmoid(raw)


def eccentric_anomaly(x: Tensor, e: Tensor, tol: float | None = None, max_steps: int = 100) -> Tensor:
    """Differentiable E with E - e sin E = x, for an eccentricity e that broadcasts with x (see `solve`).

    Example:
        >>> x, e = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
        >>> eccentric_anomaly(x, e)
        tensor(0.6308, dtype=torch.float64)
    """
    return apply(Equation(partial(solve, tol=tol, max_steps=max_steps), residual), x, e)


def _reference(x: Any, e: Any) -> Any:
    import mpmath as mp

    low, high = x - 1, x + 1
    return mp.findroot(lambda y: y - e * mp.sin(y) - x, (low, high), solver="anderson", verify=False)


@register("kepler")
class Kepler(Activation):
    r"""The eccentric anomaly y of a mean anomaly x, with a learnable eccentricity e per channel.

    .. math:: y - e \sin y = x, \qquad 0 < e < 1

    A staircase with smooth, learnable steps around the identity: steep (1 / (1 - e)) at multiples of 2 pi, flat
    (1 / (1 + e)) between. dy/dx = 1 / (1 - e cos y), dy/de = sin(y) / (1 - e cos y).

    Why it exists: Kepler's equation has no closed-form solution; its Newton loop under `no_grad` cuts backprop's
    graph. One dual evaluation of the residual at the solution gives all derivatives.

    Args:
        eccentricity: Initial e, in (0, 1 - margin).
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        margin: e < 1 - margin is guaranteed, so the slope never exceeds 1 / margin.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. A NaN input gives NaN at that entry only. bfloat16 and
        float16 are computed in float32.

    Raises:
        DualInputError: integer input; eccentricity or margin out of range at construction.
        ConvergenceError: the solver took more than 100 steps (not seen: 4 to 9 are usual, 12 at e = 0.99999).

    Reference:
        Kepler, "Astronomia nova", 1609. Starting values and convergence: Danby, Burkardt, "The solution of Kepler's
        equation I", Celestial Mechanics 31, 1983.

    Example:
        >>> act = Kepler(eccentricity=0.9)
        >>> x = torch.tensor([0.1], requires_grad=True)
        >>> act(x).backward()
        >>> x.grad
        tensor([3.6600])
    """

    def __init__(self, eccentricity: float = 0.5, num_channels: int = 1, margin: float = 1e-3) -> None:
        """Start every channel at the same eccentricity."""
        super().__init__(num_channels)
        if not 0 < margin < 1:
            raise DualInputError(f"kepler: margin must lie in (0, 1), got {margin}")
        if not 0 < eccentricity < 1 - margin:
            raise DualInputError(f"kepler: eccentricity must lie in (0, 1 - margin = {1 - margin}), got {eccentricity}")
        self.margin = margin
        share = torch.tensor(eccentricity / (1 - margin), dtype=torch.float64)
        self.raw = nn.Parameter(self.per_channel(torch.logit(share).item()))

    @property
    def local(self) -> Equation:
        """The equation and its solver."""
        return Equation(solve, residual)

    def natural(self) -> tuple[Tensor]:
        """The current eccentricity, of shape (num_channels,)."""
        return (parametrise(self.raw, self.margin),)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"margin={self.margin}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-40.0, -3.3, -1.0, -0.1, 0.0, 0.1, 0.7, 2.0, 3.1, 6.5, 100.0)
        return [Sample({}, points, _reference), Sample({"eccentricity": 0.9}, points, _reference)]
