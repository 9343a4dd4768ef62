"""A case: one call of an op as a function of its differentiable tensors, to a list of differentiable results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor


@dataclasses.dataclass
class Case:
    """One sample of one op.

    Attributes:
        name: The op's name in the database.
        number: Which sample.
        tensors: Its differentiable tensors, plain and detached.
        fn: ``fn(*tensors)``: the call with other tensors in their place; seeded, so that random ops repeat.
        outputs: Which leaves of the result carry a derivative.
        step: The first step of its differences.
    """

    name: str
    number: int
    tensors: list[Tensor]
    fn: Callable[..., list[Any]]
    outputs: list[int]
    step: float = 1e-3

    def __call__(self, *tensors: Any) -> list[Any]:
        """The differentiable results of a call."""
        leaves = self.fn(*tensors)
        return [leaves[i] for i in self.outputs]


def case_of(name: str, number: int, function: Callable, args: Any, chosen: Callable[[Tensor], bool]) -> Case | None:
    """A case of ``function(*args, **kwargs)`` with ``args = (args, kwargs)``; None where nothing is differentiable.

    Args:
        name: Of the op.
        number: Of the sample.
        function: What is called.
        args: ``(positional, keyword)`` arguments.
        chosen: Which tensors among them are differentiated.
    """
    leaves, spec = pytree.tree_flatten(args)
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and chosen(x)]
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in leaves]

    def call(*tensors: Any) -> list[Any]:
        # Constants are copied: an op may write into them (running statistics).
        filled = [x.clone() if isinstance(x, Tensor) and not i_differentiable(i) else x for i, x in enumerate(fixed)]
        for i, t in zip(where, tensors, strict=True):
            filled[i] = t
        positional, keywords = pytree.tree_unflatten(filled, spec)
        torch.manual_seed(0)
        return pytree.tree_leaves(function(*positional, **keywords))

    def i_differentiable(i: int) -> bool:
        return i in where

    tensors = [fixed[i] for i in where]
    if not tensors or any(t.layout != torch.strided for t in tensors):
        return None
    outputs = differentiable_outputs(call, tensors)
    return Case(name, number, tensors, call, outputs) if outputs else None


def differentiable_outputs(call: Callable[..., list[Any]], tensors: Sequence[Tensor]) -> list[int]:
    """The leaves of a result that torch says depend on the inputs by differentiable operations."""
    leaves = call(*[t.detach().clone().requires_grad_() for t in tensors])
    return [
        i
        for i, y in enumerate(leaves)
        if isinstance(y, Tensor) and y.requires_grad and y.layout == torch.strided and is_continuous(y)
    ]


def is_continuous(x: Tensor) -> bool:
    """Whether a dtype can carry a derivative."""
    return x.dtype.is_floating_point or x.dtype.is_complex


def real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.dtype.is_complex else x


def plain(x: Any) -> Any:
    """The value under all levels."""
    while isinstance(x, DualTensor):
        x = x.primal
    return x
