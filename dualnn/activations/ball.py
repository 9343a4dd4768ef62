"""Projection of a row on a ball of the l1, l2 or maximum norm."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample
from dualnn.activations.sparsemax import project_simplex, simplex_reference
from dualnn.engine.errors import DualInputError, unknown_name


def project_l1(x: Tensor, radius: float) -> Tensor:
    """Soft thresholding, at the threshold that gives the norm `radius`."""
    outside = x.abs().sum(-1, keepdim=True) > radius
    return torch.where(outside, torch.sign(x) * project_simplex(x.abs(), radius), x)


def project_l2(x: Tensor, radius: float) -> Tensor:
    """Scaling."""
    squared = (x * x).sum(-1, keepdim=True)
    outside = squared > radius * radius
    # In the branch that is not taken the root's derivative at 0 would be 0 * inf.
    return torch.where(outside, x * (radius / torch.where(outside, squared, 1.0).sqrt()), x)


def project_linf(x: Tensor, radius: float) -> Tensor:
    """Clipping."""
    return x.clamp(-radius, radius)


PROJECTIONS = {"l1": project_l1, "l2": project_l2, "linf": project_linf}


def _reference(norm: str, radius: float, row: list) -> list:
    import mpmath as mp

    if norm == "linf":
        return [min(max(v, -radius), radius) for v in row]
    if norm == "l2":
        return [v * min(1, radius / mp.norm(row, 2)) for v in row]
    if mp.norm(row, 1) <= radius:
        return row
    return [mp.sign(v) * p for v, p in zip(row, simplex_reference(radius, [abs(v) for v in row]), strict=True)]


@register("ball")
class Ball(Rows):
    r"""The projection on a ball: the nearest row whose norm is at most r; inside the ball the identity.

    .. math:: y = \arg\min_{\|p\| \le r} \|p - x\|_2

    "l1": soft thresholding at a threshold that the row itself decides (sparse); "l2": scaling; "linf": clipping.

    Why it exists: a bound that always holds (a trust region, an adversarial budget, a bounded control) as a part of the
    network, 1-Lipschitz, so that gradients never grow through it. torch clips gradients, not activations, this way; and
    `x / x.norm().clamp(min=r)` has a NaN derivative at 0.

    Args:
        norm: "l1", "l2" or "linf".
        radius: r > 0.
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same. On the sphere itself the derivative is the identity's. A row
        with a NaN becomes NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; radius not positive.
        DualShapeError: no such dimension.
        UnknownNameError: another norm.

    Reference:
        Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient projections onto the l1-ball for learning in high
        dimensions", 2008.

    Example:
        >>> Ball("l1")(torch.tensor([1.0, -0.5]))
        tensor([ 0.7500, -0.2500])
    """

    def __init__(self, norm: str = "l2", radius: float = 1.0, dim: int = -1) -> None:
        """Fix the ball."""
        super().__init__(dim)
        if norm not in PROJECTIONS:
            raise unknown_name("norm of ball", norm, PROJECTIONS)
        if not 0 < radius < math.inf:
            raise DualInputError(f"ball: radius must be positive, got {radius}")
        self.norm, self.radius = norm, radius

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The projection."""
        return PROJECTIONS[self.norm](x, self.radius)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"norm={self.norm!r}, radius={self.radius}"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, -0.2, 1.0, -2.5), (0.02, 0.1, 0.2, -0.1))

        def sample(**options: Any) -> RowSample:
            act = cls(**options)
            return RowSample(options, points, partial(_reference, act.norm, act.radius))

        return [sample(), sample(norm="l1", radius=1.3), sample(norm="linf", radius=0.7)]
