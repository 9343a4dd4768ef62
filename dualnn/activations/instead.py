"""A hard function of a row with the derivative of a smooth one: shared by `hard_topk` and `rank`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualnn.engine.bridge_linear import linear


@dataclass
class Instead:
    """A rule for `dualnn.engine.bridge_linear.linear`: value of `hard`, derivative of a smooth primitive.

    Attributes:
        name: For messages.
        hard: ``hard(x) -> y`` on the last dimension.
        product: ``product(x, t)``: the primitive's Jacobian at x times t. It must be symmetric, so that it serves both
            modes; plain code, which is differentiated again.

    Example:
        >>> mask = Instead("positive", lambda x: (x > 0).to(x.dtype), lambda x, t: t)
        >>> mask(torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """

    name: str
    hard: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    batched: bool = True

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        """The hard value, differentiably in every mode."""
        return linear(self, x)[0]

    def value(self, x: Tensor) -> tuple[Tensor, ...]:
        """The hard value."""
        return (self.hard(x),)

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> Sequence[Tensor]:
        """The primitive's Jacobian."""
        return (self.product(primals[0], tangents[0]),)

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> Sequence[Tensor]:
        """The same: it is symmetric."""
        return (self.product(primals[0], grads[0]),)
