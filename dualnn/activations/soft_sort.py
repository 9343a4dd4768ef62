"""Soft sort: a row sorted, wide gaps drawn together."""

from functools import partial
from typing import Any

from torch import Tensor

from dualnn.activations.permutahedron import block_mean, check_strength, falling, pool, projection_reference
from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample


def soft_sort(x: Tensor, strength: float) -> Tensor:
    """The projection of (n, ..., 1) / strength on the permutahedron of x, along the last dimension: falling."""
    ordered = x.sort(dim=-1, descending=True).values
    z = (falling(x.shape[-1], x) / strength).expand(x.shape)
    mean, blocks = pool(ordered, (z - ordered).detach())
    # Within a block the shape of z around the mean of x: z itself, which may be large, cancels.
    return mean + (z - block_mean(z, blocks))


def _reference(strength: float, row: list) -> list:
    import mpmath as mp

    return projection_reference([(len(row) - i) / mp.mpf(strength) for i in range(len(row))], row)


@register("soft_sort")
class SoftSort(Rows):
    r"""A row sorted, largest first, by a projection; entries that are drawn together share their gradient.

    .. math:: y = \arg\min_{p \in \mathcal{P}(x)} \left\| p - \frac{(n, n - 1, \dots, 1)}{\epsilon} \right\|^2

    P(x) is the hull of all orders of x, eps the strength. While no gap of the sorted row is wider than 1 / eps, y is
    *exactly* the sorted row. Beyond, entries form blocks: y keeps a block's mean, with steps of 1 / eps in it, so that
    no gap of y is wider (eps -> inf: the mean everywhere). The derivative is the sort's permutation followed by means
    over blocks: exact, piecewise constant (the second derivative is 0 between kinks), and its norm is never above 1.
    Time O(n log n) a row (pool adjacent violators, on the CPU).

    Why it exists: `torch.sort` passes each value's gradient to one place; here outliers and what they stand apart from
    learn together, which makes losses on order statistics robust. Of the smooth sorts this is the exact,
    well-conditioned one: NeuralSort and Sinkhorn need n^2 numbers and a temperature at which they are either far from
    sorting or flat.

    Args:
        strength: eps > 0.
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same, falling along `dim`, with the row's sum. A row with a NaN
        becomes NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; strength not positive.
        DualShapeError: no such dimension.

    Reference:
        Blondel, Teboul, Berthet, Djolonga, "Fast differentiable sorting and ranking", 2020, arXiv 2002.08871.

    Example:
        >>> import torch
        >>> SoftSort(strength=0.1)(torch.tensor([1.0, 15.0, 0.0]))  # the gap of 14 shrinks to 10
        tensor([13.,  3.,  0.])
    """

    def __init__(self, strength: float = 1.0, dim: int = -1) -> None:
        """Fix the strength."""
        super().__init__(dim)
        check_strength("soft_sort", strength)
        self.strength = strength

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The projection."""
        return soft_sort(x, self.strength)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"strength={self.strength}"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, -0.2, 1.1, -2.5), (0.2, 5.0, -0.1, 4.8))

        def sample(**options: Any) -> RowSample:
            return RowSample(options, points, partial(_reference, cls(**options).strength))

        return [sample(), sample(strength=0.3)]
