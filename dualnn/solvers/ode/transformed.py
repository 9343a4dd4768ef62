"""An integration as one node for ``torch.func``: its transforms see tensors in and a tensor out, not the steps.

Inside, everything runs on plain tensors: the pullback by autograd over the accepted steps, and it is a node in its
turn, so that transforms nest. A forward derivative runs on duals; that of a pullback is the pullback of the pullback.
``torch.vmap`` takes one sample after the other: a batch ``(B, n)`` is the fast way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter, temporarily_clear_interpreter_stack

from dualnn.engine.bridge import refuse_nested_jvp, save, saved
from dualnn.engine.dual_tensor import top_level
from dualnn.engine.errors import TangentLostError, UnsupportedOpError
from dualnn.engine.transforms import jvp

Map = Callable[..., tuple[Tensor, ...]]


def bare(x: Any) -> Any:
    """The tensor under all of the transforms' wrappers: of the first sample of a batch that one of them runs over."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        axis = maybe_get_bdim(x)
        x = get_unwrapped(x) if axis < 0 else get_unwrapped(x).select(axis, 0)
    return x.detach() if isinstance(x, Tensor) else x


def refuse(fn: Callable[..., Tensor], y0: Tensor, t: Tensor, args: Sequence[Any], further: Sequence[Any]) -> None:
    """Raise for what cannot be had inside the transforms, ``further`` results among it."""
    if top_level((y0, t, *args)):
        raise UnsupportedOpError(
            "odeint of DualTensors inside a torch.func transform: use dualnn.jvp (which nests) or torch.func, not both"
        )
    if any(further):
        raise UnsupportedOpError(
            "events and full_output inside a torch.func transform: use dualnn.jvp for forward derivatives, backward() "
            "or torch.autograd.grad for reverse ones, and a batch (B, n) for vmap"
        )
    with temporarily_clear_interpreter_stack():  # inside, what these operations return would be wrapped again
        y, times, *rest = map(bare, (y0, t, *args))
        start = times[0].expand(*y.shape[:-1], 1) if y.dim() > 1 else times[0]
    if _moved(lambda: fn(start, y, *rest)):
        raise TangentLostError(
            "fn depends on something that is differentiated, or that torch.vmap runs over, and is not among its "
            "arguments, so its derivative would be lost: pass it in args (fn(t, y, *args))"
        )


def _moved(call: Callable[[], Any]) -> bool:
    """Whether a call without arguments is differentiated or vectorised, by any transform or by autograd under all."""
    f = call()
    if not isinstance(f, Tensor) or f.requires_grad:
        return isinstance(f, Tensor)
    stack = get_interpreter_stack()
    if not stack:
        return False
    if stack[-1].key() == TransformType.Jvp and torch.autograd.forward_ad.unpack_dual(f).tangent is not None:
        return True
    if is_functorch_wrapped_tensor(f) and maybe_get_bdim(f) >= 0:
        return True
    with retrieve_current_functorch_interpreter().lower():
        return _moved(call)


def through(fn: Callable[..., Tensor], *args: Any) -> Tensor:
    """``fn(*args)`` inside any transforms of ``torch.func``.

    Args:
        fn: What autograd and duals differentiate on plain tensors.
        *args: What it depends on, and constants.
    """
    refuse_nested_jvp()
    return _Through.apply(lambda *a: (fn(*a),), True, *args)[0]  # type: ignore[no-untyped-call]


class _Through(torch.autograd.Function):
    """A map of plain tensors; ``straight``: duals can run through it."""

    @staticmethod
    def forward(fn: Map, straight: bool, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(y.clone() for y in fn(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:  # noqa: D102
        ctx.fn, ctx.straight, *args = inputs
        save(ctx, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        args, _ = saved(ctx)
        where = [i for i, a in enumerate(args) if ctx.needs_input_grad[i + 2] and _moves(a)]
        found = _Through.apply(_pullback(ctx.fn, where, len(args)), False, *args, *grads)  # type: ignore[no-untyped-call]
        out: list[Tensor | None] = [None] * len(args)
        for i, g in zip(where, found, strict=True):
            out[i] = g
        return None, None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # noqa: D102
        args, _ = saved(ctx)
        where = [i for i, t in enumerate(tangents) if t is not None]
        moved = _pushforward(ctx.fn, where, len(args), ctx.straight)
        return _Through.apply(moved, False, *args, *(tangents[i] for i in where))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, fn: Map, straight: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple]:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims[2:], strict=True)]
            rows.append(_Through.apply(fn, straight, *one))  # type: ignore[no-untyped-call]
        found = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return found, (0,) * len(found)


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _leaves(args: Sequence[Any], where: Sequence[int]) -> tuple[list[Any], list[Tensor], bool]:
    """The arguments with fresh leaves in these places; and whether what comes out is differentiated again."""
    again = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    inner = list(args)
    for i in where:
        x = args[i]
        inner[i] = x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()
    return inner, [inner[i] for i in where], again


def _pullback(fn: Map, where: Sequence[int], count: int) -> Map:
    """Cotangents of some arguments, as a function of all arguments and the results' cotangents."""

    def pulled(*inputs: Any) -> tuple[Tensor, ...]:
        args, grads = inputs[:count], inputs[count:]
        inner, leaves, again = _leaves(args, where)
        again = again or (torch.is_grad_enabled() and any(g.requires_grad for g in grads))
        with torch.enable_grad():
            out = fn(*inner)
        reached = [(y, g) for y, g in zip(out, grads, strict=True) if y.requires_grad]
        if not reached:
            return tuple(map(torch.zeros_like, leaves))
        ys, gs = zip(*reached, strict=True)
        return torch.autograd.grad(ys, leaves, gs, create_graph=again, materialize_grads=True)

    return pulled


def _pushforward(fn: Map, where: Sequence[int], count: int, straight: bool) -> Map:
    """The results' tangents, as a function of all arguments and some arguments' tangents."""

    def pushed(*inputs: Any) -> tuple[Tensor, ...]:
        args, tangents = inputs[:count], inputs[count:]

        def along(*moving: Tensor) -> tuple[Tensor, ...]:
            inner = list(args)
            for i, x in zip(where, moving, strict=True):
                inner[i] = x
            return fn(*inner)

        if straight:
            return jvp(along, tuple(args[i] for i in where), tangents)[1]
        # Linear in the cotangent: its pullback in that is the derivative.
        weights = [torch.zeros_like(y) for y in fn(*args)]
        n = len(weights)
        back = _pullback(fn, where, count)
        return _pullback(lambda *x: back(*x[n:], *x[:n]), range(n), n + count)(*weights, *args, *tangents)

    return pushed
