"""The indicator of the k largest entries of a row, trained by the derivative of soft top-k."""

from functools import partial

import torch
from torch import Tensor

from dualnn.activations.instead import Instead
from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample
from dualnn.activations.soft_topk import centred, check_k, soft_topk_reference, weights
from dualnn.engine.errors import DualShapeError


def _hard(k: int, x: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter_(-1, x.topk(k, dim=-1).indices, 1.0)


def _product(k: int, temperature: float, x: Tensor, t: Tensor) -> Tensor:
    u = centred(x, k, temperature)
    (w,) = weights(torch.zeros_like(u[..., :1]), u)
    return torch.sigmoid(u) * torch.sigmoid(-u) / temperature * (t - (w * t).sum(-1, keepdim=True))


def _reference(k: int, row: list) -> list:
    kept = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    return [1 if i in kept else 0 for i in range(len(row))]


@register("hard_topk")
class HardTopK(Rows):
    r"""A mask of the k largest entries of a row, trained by the exact derivative of soft top-k (a surrogate).

    .. math:: y_i = [x_i \text{ is among the } k \text{ largest}], \qquad
       \dot y = \frac{\partial}{\partial x} \mathrm{soft\_topk}(x; k, T) \, \dot x

    The derivative of y itself is 0 almost everywhere: there is nothing to recover. A gradient obtained through it is
    therefore **biased**: it is that of `soft_topk`, of every order, and the same in forward and in reverse mode.

    Why it exists: sparse routing must run k experts, not n weighted ones, and still learn which.

    Args:
        k: 0 < k < length of a row.
        temperature: T > 0 of the primitive.
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same, k ones in every row (the choice among ties is `torch.topk`'s).
        A row with a NaN becomes NaN; the derivative needs finite entries. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; k or temperature out of range.
        DualShapeError: no such dimension; k not below the row's length.

    Reference:
        Sander, Puigcerver, Djolonga, Peyré, Blondel, "Fast, differentiable and sparse top-k: a convex analysis
        perspective", 2023, arXiv 2302.01425.

    Example:
        >>> x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
        >>> y = HardTopK(k=2)(x)
        >>> y[0].backward()
        >>> y.detach(), bool(x.grad[0] > 0 > x.grad[1])
        (tensor([1., 0., 1.]), True)
    """

    def __init__(self, k: int = 1, temperature: float = 1.0, dim: int = -1) -> None:
        """Fix k and the primitive's temperature."""
        super().__init__(dim)
        check_k("hard_topk", k, temperature)
        self.k, self.temperature = k, temperature

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The mask."""
        if not self.k < x.shape[-1]:
            raise DualShapeError(f"top-k needs 0 < k < length of a row, got k={self.k} and {x.shape[-1]} entries")
        return Instead("hard_topk", partial(_hard, self.k), partial(_product, self.k, self.temperature))(x)

    def describe(self) -> str:
        """Arguments for the repr: they say whose derivative is used."""
        return f"k={self.k}, primitive='soft_topk', temperature={self.temperature}, biased gradient: the primitive's"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, -0.2, 1.0, -2.5))
        return [
            RowSample({}, points, partial(_reference, 1), partial(soft_topk_reference, 1, 1.0)),
            RowSample(
                {"k": 2, "temperature": 0.5}, points, partial(_reference, 2), partial(soft_topk_reference, 2, 0.5)
            ),
        ]
