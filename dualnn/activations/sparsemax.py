"""Sparsemax: the projection of a row on the simplex, a softmax with true zeros."""

import math
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample
from dualnn.engine.errors import DualInputError


def project_simplex(x: Tensor, total: float = 1.0) -> Tensor:
    """The point nearest to x, along the last dimension, with entries >= 0 and that sum: by sorting, differentiably.

    Example:
        >>> project_simplex(torch.tensor([2.0, 1.5, 0.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    ordered = x.sort(dim=-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, device=x.device)
    # The support is a comparison, so that it carries no tangent; given the support the projection is linear.
    size = (total + k * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True).clamp(min=1)
    support = x >= ordered.gather(-1, size - 1)
    # Ties count as one; a row of NaN supports nothing. In x's dtype: a division by integers is rounded to float32 in
    # torch.func.vmap of a gradient.
    size = support.to(x.dtype).sum(-1, keepdim=True).clamp(min=1)
    tau = (torch.where(support, x, 0.0).sum(-1, keepdim=True) - total) / size
    return torch.where(support, x - tau, 0.0)


def simplex_reference(total: float, row: list) -> list:
    """The nearest of the projections on all faces that lies in the simplex (mpmath numbers)."""
    best, found = math.inf, row
    for count in range(1, len(row) + 1):
        for face in combinations(range(len(row)), count):
            tau = (sum(row[i] for i in face) - total) / count
            point = [row[i] - tau if i in face else 0 for i in range(len(row))]
            distance = sum((p - v) ** 2 for p, v in zip(point, row, strict=True))
            if min(point) >= 0 and distance < best:
                best, found = distance, point
    return found


@register("sparsemax")
class Sparsemax(Rows):
    r"""The projection on the simplex: probabilities with true zeros.

    .. math:: y = \arg\min_{p \ge 0, \; \sum_i p_i = s} \|p - x\|^2 = \max(x - \tau(x), 0)

    The derivative is dy_i = dx_i - (mean of dx over the support) on the support {y > 0} and 0 outside; it is piecewise
    constant, so that the second derivative is 0 between the kinks.

    Why it exists: torch has softmax only, which gives everything some weight: attention and routing over many
    candidates cannot ignore any. The support is found by sorting, exactly, with no iteration.

    Args:
        dim: The dimension along which a row lies.
        total: s > 0, the sum of a row.

    Shape:
        x: (*), at least one-dimensional -> y: the same, >= 0, sums s along `dim`. Entries of -inf (masks) become 0, as
        long as one is finite. A row with a NaN or inf becomes NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; total not positive.
        DualShapeError: no such dimension.

    Reference:
        Martins, Astudillo, "From softmax to sparsemax: a sparse model of attention and multi-label classification",
        2016, arXiv 1602.02068. Held, Wolfe, Crowder, "Validation of subgradient optimization", 1974 (by sorting).

    Example:
        >>> Sparsemax()(torch.tensor([0.5, 0.0, -2.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    def __init__(self, dim: int = -1, total: float = 1.0) -> None:
        """Fix dimension and sum."""
        super().__init__(dim)
        if not 0 < total < math.inf:
            raise DualInputError(f"sparsemax: total must be positive, got {total}")
        self.total = total

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The projection."""
        return project_simplex(x, self.total)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"total={self.total}"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, 0.0, 1.0, 2.5), (0.0, 0.1, 0.2, -0.1))
        return [
            RowSample({}, points, partial(simplex_reference, 1.0)),
            RowSample({"total": 2.5}, points, partial(simplex_reference, 2.5)),
        ]
