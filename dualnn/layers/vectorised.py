"""Elementwise functions under ``torch.func.vmap``: all samples at once where they allow it, else one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dualnn.layers.structure import close


@dataclasses.dataclass(frozen=True)
class Rows:
    """An elementwise function under ``torch.func.vmap``, which puts axes before those that it knows.

    Attributes:
        fn: The function.
        shapes: Those of its arguments.
        stacks: It takes all samples at once; otherwise it is called for one after the other.
    """

    fn: Callable
    shapes: Sequence[torch.Size]
    stacks: bool

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Call it; a tensor with more axes than its own has those of ``vmap`` in front."""
        deepest = max(t.dim() for t in tensors)
        if deepest == max(len(s) for s in self.shapes):
            pairs = zip(tensors, self.shapes, strict=True)
            return self.fn(*(t if t.shape == s else t.reshape(s) for t, s in pairs))
        batched = [t.dim() == deepest for t in tensors]
        fits = all(t.shape[t.dim() - len(s) :] == s for t, s in zip(tensors, self.shapes, strict=True))
        if self.stacks and fits:
            return self.fn(*tensors)
        size = max(t.shape[0] for t, b in zip(tensors, batched, strict=True) if b)
        return torch.stack(
            [self(*(t[i] if b else t for t, b in zip(tensors, batched, strict=True))) for i in range(size)]
        )


def stacks(fn: Callable, tensors: Sequence[Tensor], inputs: int) -> bool:
    """Whether an elementwise ``fn`` gives two samples at once, stacked on a new leading axis, as it does one by one."""
    moved = [t * 0.9 for t in tensors[:inputs]]
    deepest = max((t.dim() for t in tensors[:inputs]), default=0)
    both = [torch.stack(pair) for pair in zip(tensors[:inputs], moved, strict=True)]
    both = [t.reshape(2, *(1,) * (deepest + 1 - t.dim()), *t.shape[1:]) for t in both]
    with torch.no_grad():
        alone = torch.stack([fn(*tensors), fn(*moved, *tensors[inputs:])])
        try:
            together = fn(*both, *tensors[inputs:])
        except Exception:  # whatever it says of a shape that it was not written for
            return False
    return together.shape == alone.shape and close(together, alone, alone)
