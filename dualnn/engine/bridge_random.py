r"""The autograd bridge by random local tangents: an unbiased estimate, for local Jacobians without structure.

K random directions :math:`u_k` of the module's own inputs are pushed through it once; backward estimates

.. math:: \hat g_x = \frac1K \sum_k (g_y \cdot J u_k)\, u_k, \qquad E[\hat g_x] = J^T g_y.

Its relative squared error is about n / K with n the module's *own* number of inputs (per sample, where samples do not
mix), not the network's. The forward mode is exact: J v is pushed as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge import floats, refuse_nested_jvp, save, saved
from dualnn.engine.bridge_columns import Flat, Layout
from dualnn.engine.directions import Directions, mixed
from dualnn.engine.dual_tensor import seed, top_level
from dualnn.engine.errors import TangentLostError, UnsupportedOpError
from dualnn.engine.tangents import Dense, Tangent
from dualnn.engine.transforms import dense_of, push


def estimated(fn: Callable, layout: Layout, directions: Directions, *args: Any) -> Any:
    """Apply ``fn``; backward estimates the gradient of its arguments from random local directions.

    Args:
        fn: Any Python code on tensors.
        layout: Which arguments have batch axes (whose samples do not mix): their directions are drawn, and their
            derivatives used, per sample.
        directions: The sampler, K and the key.
        *args: Its arguments.

    Returns:
        The result of ``fn``. DualTensors and ``torch.func.jvp`` are pushed exactly.

    Raises:
        TangentLostError: No output depends on the arguments.
        UnsupportedOpError: At a second derivative: the estimate is not a derivative of anything.

    Example:
        >>> import torch
        >>> x = torch.ones(5, 3, requires_grad=True)
        >>> y = estimated(lambda x: x.cumsum(-1), Layout(1, frozenset([0])), Directions("rademacher", 64, key=0), x)
        >>> y.sum().backward()
        >>> x.grad.shape
        torch.Size([5, 3])
    """
    if top_level(args):
        return fn(*args)
    refuse_nested_jvp()
    flat = Flat(fn)
    out = _Estimated.apply(flat, layout, directions, *args)  # type: ignore[no-untyped-call]
    return flat.rebuild(out[: len(out) // 2])  # then as many pushed directions, and the key


def keys_before(tensors: Sequence[Any]) -> set[int]:
    """The keys of the estimates in the graph that made ``tensors``.

    The gradient through two estimates in a row is unbiased only if their directions are independent.
    """
    ahead = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    seen, keys = set(ahead), set()
    while ahead:
        node: Any = ahead.pop()
        if isinstance(node, _Estimated._backward_cls):  # type: ignore[attr-defined]
            keys.add(node.directions.key)  # type: ignore[attr-defined]
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        ahead += new
    return keys


class _Estimated(torch.autograd.Function):
    """One node that keeps the pushed directions; the directions themselves are drawn again."""

    @staticmethod
    def forward(flat: Callable, layout: Layout, directions: Directions, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        seeds: list[Tangent | None] = [None] * len(args)
        for i in floats(args):
            seeds[i] = Dense(directions.draw(i, 0, tuple(args[i].shape), args[i]))
        with torch.no_grad():
            values, pushed = push(flat, args, seeds)
        if all(t is None or t.is_zero for t in pushed) and any(v.numel() for v in values):
            raise TangentLostError(
                "the function's outputs do not depend on its inputs by differentiable operations (a constant, or cut "
                "by .detach(), .item() or .numpy())"
            )
        kept = [dense_of(t, y) for t, y in zip(pushed, values, strict=True)]
        # The key stays with what it pushed: checkpointing recomputes both, with another key, and vmap has one a row.
        key = torch.tensor(directions.key, dtype=torch.int64, device="cpu")
        return (*(v.clone() if any(v is a for a in args) else v for v in values), *kept, key)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: D102
        flat, layout, directions, *args = inputs
        half = len(output) // 2
        ctx.flat, ctx.layout, ctx.directions = flat, layout, directions
        ctx.mark_non_differentiable(*output[half:])
        save(ctx, args, *output[half:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, pushed, key = _saved(ctx)
        layout, directions = ctx.layout, ctx.directions
        slopes: Any = 0  # (K, *batch): the loss along each direction, sample by sample
        for g, t in zip(grads, pushed, strict=False):
            product = t * g
            slopes = slopes + (product.flatten(1 + layout.batch).sum(-1) if g.dim() > layout.batch else product)
        out: list[Tensor | None] = [None] * len(args)
        for i in floats(args):
            if ctx.needs_input_grad[i + 3]:
                u = _Drawn.apply(directions, i, key, args[i])  # type: ignore[no-untyped-call]
                weights = slopes * directions.weight
                if i in layout.batched:
                    weights = weights.reshape(*weights.shape, *(1,) * (args[i].dim() - layout.batch))
                else:
                    weights = weights.flatten(1).sum(1) if layout.batch else weights
                    weights = weights.reshape(-1, *(1,) * args[i].dim())
                estimate = (weights * u).sum(0).to(args[i].dtype)
                out[i] = _Final.apply(estimate, *[args[j] for j in floats(args)])  # type: ignore[no-untyped-call]
        return None, None, None, *out

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, pushed, _ = _saved(ctx)
        seeds = [None if t is None else seed(t.unsqueeze(0)) for t in tangents[3:]]
        values, out = push(ctx.flat, args, seeds)
        return *[dense_of(t, y)[0] for t, y in zip(out, values, strict=True)], *[None] * (len(pushed) + 1)  # type: ignore[index]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, flat: Callable, layout: Layout, directions: Directions, *args: Any) -> Any:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims[3:], strict=True)]
            own = dataclasses.replace(directions, key=mixed(directions.key, b))
            rows.append(_Estimated.apply(flat, layout, own, *one))  # type: ignore[no-untyped-call]
        out = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return out, tuple(0 for _ in out)


class _Drawn(torch.autograd.Function):
    """The directions of one argument, drawn again from their key."""

    @staticmethod
    def forward(directions: Directions, index: int, key: Tensor, like: Tensor) -> Tensor:  # noqa: D102
        return dataclasses.replace(directions, key=int(key)).draw(index, 0, tuple(like.shape), like)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # noqa: D102
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, directions: Directions, index: int, key: Tensor, like: Tensor) -> Any:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            own, x = (t if d is None else t.select(d, b) for t, d in zip((key, like), in_dims[2:], strict=True))
            rows.append(_Drawn.apply(directions, index, own, x))  # type: ignore[no-untyped-call]
        return torch.stack(rows), 0


class _Final(torch.autograd.Function):
    """An estimate that says so when it is differentiated again."""

    @staticmethod
    def forward(estimate: Tensor, *args: Tensor) -> Tensor:  # noqa: D102
        return estimate.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        return

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        raise UnsupportedOpError(
            "a second derivative was taken through a random local estimate (structure='random'), which is not the "
            "derivative of a function. Use an exact structure ('elementwise', 'block', 'dense') for that module."
        )

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple, estimate: Tensor, *args: Tensor) -> Any:  # noqa: D102
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip((estimate, *args), in_dims, strict=True)]
        return _Final.apply(*moved), None if in_dims[0] is None else 0  # type: ignore[no-untyped-call]


def _saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor], Tensor]:
    """Arguments in their places, what was pushed, and the key of its directions."""
    args, (*pushed, key) = saved(ctx)
    return args, pushed, key
