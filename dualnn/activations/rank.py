"""The ranks of a row's entries, trained by the derivative of the soft rank."""

from functools import partial
from typing import Any

from torch import Tensor

from dualnn.activations.instead import Instead
from dualnn.activations.permutahedron import block_mean, check_strength, falling, pool, projection_reference
from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample


def _ranks(x: Tensor) -> Tensor:
    """1 for the largest entry, n for the smallest; equal entries in the order in which they stand."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) + 1).to(x.dtype)


def _product(strength: float, x: Tensor, t: Tensor) -> Tensor:
    """The Jacobian of the soft rank times t: -(t - mean of t over x's block) / strength."""
    ordered, order = x.detach().sort(dim=-1)  # -x / strength falls
    back = order.argsort(dim=-1)
    n = x.shape[-1]
    _, blocks = pool(ordered, -ordered / strength - falling(n, x))
    blocks = blocks.gather(-1, back)
    return (block_mean(t, blocks) - t) / strength


def _reference(row: list) -> list:
    return [1 + sum(v > u for v in row) for u in row]


def _soft_reference(strength: float, row: list) -> list:
    import mpmath as mp

    return projection_reference([-v / mp.mpf(strength) for v in row], list(range(1, len(row) + 1)))


@register("rank")
class Rank(Rows):
    r"""The rank of every entry (1 the largest), trained by the exact derivative of the soft rank (a surrogate).

    .. math:: y_i = 1 + \#\{j : x_j > x_i\}, \qquad \dot y = \frac{\partial}{\partial x}
       \arg\min_{p \in \mathcal{P}(n, \dots, 1)} \left\| p + \frac{x}{\epsilon} \right\|^2 \dot x

    The derivative of y itself is 0 almost everywhere: there is nothing to recover. A gradient obtained through it is
    therefore **biased**: it is that of the soft rank at strength eps, the projection of -x / eps on the hull of all
    orders of (1, ..., n), the same in forward and in reverse mode: -(dx - mean of dx over the block of near entries) /
    eps. An entry further than eps from all others has a derivative of 0: a larger eps reaches further.

    Why it exists: rank correlations, ranking losses and competition among units are functions of ranks, and torch's
    `argsort` returns integers: backprop ends there.

    Args:
        strength: eps > 0 of the primitive.
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same, 1 ... n; equal entries are ranked in their order. A row with a
        NaN becomes NaN. bfloat16 and float16 are computed in float32 (bfloat16 holds ranks up to 256).

    Raises:
        DualInputError: integer input; strength not positive.
        DualShapeError: no such dimension.

    Reference:
        Blondel, Teboul, Berthet, Djolonga, "Fast differentiable sorting and ranking", 2020, arXiv 2002.08871.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.3, 2.0, 0.0], requires_grad=True)
        >>> y = Rank()(x)
        >>> y[0].backward()
        >>> y.detach(), x.grad
        (tensor([2., 1., 3.]), tensor([-0.5000,  0.0000,  0.5000]))
    """

    def __init__(self, strength: float = 1.0, dim: int = -1) -> None:
        """Fix the primitive's strength."""
        super().__init__(dim)
        check_strength("rank", strength)
        self.strength = strength

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The ranks."""
        return Instead("rank", _ranks, partial(_product, self.strength))(x)

    def describe(self) -> str:
        """Arguments for the repr: they say whose derivative is used."""
        return f"primitive='soft_rank', strength={self.strength}, biased gradient: the primitive's"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, -0.2, 1.1, -2.5), (0.2, 5.0, -0.1, 4.8))

        def sample(**options: Any) -> RowSample:
            return RowSample(options, points, _reference, partial(_soft_reference, cls(**options).strength))

        return [sample(), sample(strength=3.0)]
