r"""The autograd bridge for functions of few inputs: the whole Jacobian, in one dual pass.

Any Python code of any outputs; the forward pass pushes one direction per input number and keeps
:math:`J = \partial y / \partial x`; backward multiplies, :math:`g_x = J^T g_y`. The Jacobian is a function of the same
kind, so higher derivatives are exact as well, one dual level up each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.bridge import floats, refuse_nested_jvp
from dualnn.engine.dual_tensor import count, make, seed, split, top_level
from dualnn.engine.errors import TangentLostError
from dualnn.engine.tangents import Tangent, Zero
from dualnn.engine.transforms import basis, dense_of, push


class _Flat:
    """A function whose result is flattened to a tuple of float tensors; the rest is remembered."""

    def __init__(self, fn: Callable) -> None:
        self.fn = fn
        self.spec: Any = None
        self.others: list[Any] = []

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        leaves, self.spec = pytree.tree_flatten(self.fn(*args))
        self.others = [None if _is_float(x) else (x,) for x in leaves]
        return tuple(x for x in leaves if _is_float(x))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The function's own structure around new tensors."""
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if o is None else o[0] for o in self.others], self.spec)


class _Jacobian:
    """All partial derivatives of a flat function: ``(inputs, *out.shape)`` for each of its outputs."""

    def __init__(self, fn: Callable) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        return _value_and_jacobian(self.fn, args)[1]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point


def _value_and_jacobian(fn: Callable, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    where = floats(args)
    total = sum(args[i].numel() for i in where)
    tangents: list[Tangent | None] = [None] * len(args)
    start = 0
    for i in where:
        unit = basis(args[i], 0, args[i].numel())
        before, after = start, total - start - args[i].numel()
        tangents[i] = seed(
            torch.nn.functional.pad(unit.flatten(1), (0, 0, before, after)).reshape(total, *args[i].shape)
        )
        start += args[i].numel()
    out, pushed = push(fn, args, tangents)
    return out, tuple(dense_of(t, y) for t, y in zip(pushed, out, strict=True))  # type: ignore[misc]


def dense(fn: Callable, *args: Any) -> Any:
    """Apply ``fn`` with its whole Jacobian kept for backward.

    Args:
        fn: Any Python code on tensors; returns a tensor or nested tuples, lists, dicts of them.
        *args: Its arguments; every floating point tensor is differentiated: one tangent per number in them.

    Returns:
        The result of ``fn``, differentiable by backward, ``torch.func`` and duals.

    Raises:
        TangentLostError: No output depends on the inputs.

    Example:
        >>> import torch
        >>> def spring(k):  # a loop, in place, under no_grad: autograd sees nothing of it
        ...     with torch.no_grad():
        ...         x = torch.ones_like(k)
        ...         for _ in range(3):
        ...             x = x - 0.1 * k * x
        ...     return x
        >>> k = torch.tensor([1.0], requires_grad=True)
        >>> dense(spring, k).sum().backward()
        >>> round(float(k.grad), 4)  # d/dk (1 - 0.1 k)^3
        -0.243
    """
    flat = _Flat(fn)
    return flat.rebuild(_apply(flat, args, strict=True))


def _apply(flat: Callable, args: Sequence[Any], strict: bool = False) -> tuple[Tensor, ...]:
    level = top_level(args)
    if not level:
        refuse_nested_jvp()
        out = _Dense.apply(flat, strict, *args)  # type: ignore[no-untyped-call]
        return out[: len(out) // 2]
    parts = [split(a, level) for a in args]
    primals = [p for p, _ in parts]
    values = _apply(flat, primals, strict)
    num = count(level, args)
    tangents: list[Tangent | None] = [None] * len(values)
    jacobians = _apply(_Jacobian(flat), primals)
    start = 0
    for i in floats(primals):
        stop = start + primals[i].numel()
        t = parts[i][1]
        if t is not None:
            rows = t.dense().reshape(num, -1)
            for j, jac in enumerate(jacobians):
                term = seed(torch.tensordot(rows, jac[start:stop], dims=1))
                before = tangents[j]
                tangents[j] = term if before is None else before.plus(term)
        start = stop
    return tuple(make(v, t or Zero(num), level) for v, t in zip(values, tangents, strict=True))


class _Dense(torch.autograd.Function):
    """One node that keeps the Jacobian."""

    @staticmethod
    def forward(flat: Callable, strict: bool, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        with torch.no_grad():
            values, jacobians = _value_and_jacobian(flat, args)
        if strict and not any(bool(j.any()) for j in jacobians) and not any(j.isnan().any() for j in jacobians):
            raise TangentLostError(
                "the function's outputs do not depend on its inputs by differentiable operations (a constant, or cut "
                "by .detach(), .item() or .numpy())"
            )
        return (*(v.clone() if any(v is a for a in args) else v for v in values), *jacobians)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: D102
        flat, _, *args = inputs
        half = len(output) // 2
        tensors = [a for a in args if isinstance(a, Tensor)]
        ctx.flat = flat
        ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
        ctx.mark_non_differentiable(*output[half:])
        ctx.save_for_backward(*tensors, *output[half:])
        ctx.save_for_forward(*tensors, *output[half:])

    @staticmethod
    def _pieces(ctx: Any, higher: bool) -> tuple[list[Any], Sequence[Tensor]]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if c is None else c[0] for c in ctx.constants]
        kept = list(tensors)
        return args, _apply(_Jacobian(ctx.flat), args) if higher else kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, jacobians = _Dense._pieces(ctx, torch.is_grad_enabled())
        total: Any = 0
        for g, jac in zip(grads, jacobians, strict=False):
            total = total + jac.flatten(1) @ g.flatten()
        out: list[Tensor | None] = [None] * len(args)
        start = 0
        for i in floats(args):
            stop = start + args[i].numel()
            if ctx.needs_input_grad[i + 2]:
                out[i] = total[start:stop].reshape(args[i].shape).to(args[i].dtype)
            start = stop
        return None, None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, jacobians = _Dense._pieces(ctx, True)
        pushed: list[Any] = [0] * len(jacobians)
        start = 0
        for i in floats(args):
            stop = start + args[i].numel()
            t = tangents[i]
            if t is not None:
                pushed = [
                    p + torch.tensordot(t.flatten(), j[start:stop], 1) for p, j in zip(pushed, jacobians, strict=True)
                ]
            start = stop
        return *pushed, *[None] * len(jacobians)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, flat: Callable, strict: bool, *args: Any) -> tuple[tuple, tuple]:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims[2:], strict=True)]
            rows.append(_Dense.apply(flat, strict, *one))  # type: ignore[no-untyped-call]
        out = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return out, tuple(0 for _ in out)
