"""What the activations on rows share: a dimension along which every output depends on every input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualnn.activations.base import Activation, widened
from dualnn.engine.errors import DualInputError, DualShapeError


@dataclass(frozen=True)
class RowSample:
    """One setting of an activation on rows and the oracle for it.

    Attributes:
        options: Constructor arguments.
        points: Rows at which value and derivatives are tested, away from kinks.
        reference: (row, *natural parameters) -> row, lists of mpmath numbers, an implementation independent of the
            activation's own.
        primitive: For a hard decision: the function whose derivative stands in for its own. None: `reference`.
    """

    options: dict[str, Any]
    points: tuple[tuple[float, ...], ...]
    reference: Callable[..., Any]
    primitive: Callable[..., Any] | None = None


class Rows(Activation):
    """Base of the activations on rows: y = rows(x, *natural()) along a dimension.

    A subclass sets `rows`, in differentiable code on the last dimension, and `row_samples` for the standard tests.

    Args:
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same. A row with a NaN becomes NaN, and disturbs no other.

    Raises:
        DualInputError: integer, boolean or complex input.
        DualShapeError: the input has no such dimension, or none entries along it.

    Example:
        >>> from dualnn.activations.sparsemax import Sparsemax
        >>> Sparsemax(dim=0)(torch.tensor([0.5, 0.0, -2.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    elementwise: ClassVar[bool] = False

    def __init__(self, dim: int = -1) -> None:
        """Keep the dimension."""
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise DualInputError(f"{self.name}: dim must be an integer, got {dim!r}")
        self.dim = dim

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The function on the last dimension, in float32 at least."""
        raise NotImplementedError

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Settings, inputs and oracles for the standard tests."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every row."""
        args = widened(x, *(p.reshape(()) for p in self.natural()))
        if not -x.ndim <= self.dim < x.ndim or x.shape[self.dim] == 0:
            raise DualShapeError(
                f"{self.name}: the input needs a dimension {self.dim} with at least one entry, got shape "
                f"{tuple(x.shape)}"
            )
        row = args[0].movedim(self.dim, -1)
        y = self.rows(row, *args[1:])
        # Comparisons would hide a NaN.
        y = torch.where(row.isnan().any(-1, keepdim=True), torch.nan, y).movedim(-1, self.dim)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Arguments, for print(module)."""
        return ", ".join(part for part in (f"dim={self.dim}", self.describe()) if part)
