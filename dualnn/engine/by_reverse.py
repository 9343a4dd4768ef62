r"""Directional derivatives of any order of one torch op from its own reverse mode.

For an op without a rule of ours, whose backward formula torch offers and can itself be differentiated. With
:math:`s_0(u) = \langle u, f(x) \rangle` and :math:`s_i(u) = \langle \nabla_x s_{i-1}(u), v_i \rangle`,

.. math:: D^n f(x)[v_1, …, v_n] = \nabla_u s_n(u),

because :math:`s_n` is linear in :math:`u`, whose value does not matter (it is one: some formulas skip the work for
zeros). The derivative of such a derivative is one more direction,

.. math:: \mathrm d\, D^n f(x)[v_1, …] = D^{n+1} f(x)[v_1, …, \mathrm dx] + \sum_i D^n f(x)[…, \mathrm dv_i, …],

so nested duals (forward over forward) are exact to any order that torch's reverse mode reaches, unlike torch's own
forward over forward, which is wrong for some ops. Reverse over forward records as usual.

The cost is about four evaluations for the first direction and two for each further one: a rule of ours is cheaper,
and comes first. Which ops are trusted to this is data (`rules/trusted.py`): the conformance suite has checked them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, count, make, split, top_level
from dualnn.engine.errors import StructureError
from dualnn.engine.registry import unsupported
from dualnn.engine.releases import TESTED, release, warn_untested
from dualnn.engine.tangents import Dense, PerSample, Zero
from dualnn.engine.views import link_view

Direction = Sequence[Any]  # one entry for each differentiable argument: a tensor of its shape, or None
Flat = Callable[..., list[Tensor]]


def reverse_rule(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The rule: ``func`` on duals, its directions from torch's reverse mode."""
    if kwargs.get("out") is not None:
        raise unsupported(func, "has no dual rule with out=")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, x in enumerate(leaves) if _continuous(x)]
    shape: list[Any] = []

    def everything(*xs: Any) -> list[Any]:
        filled = list(leaves)
        for i, x in zip(where, xs, strict=True):
            filled[i] = x
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        out, out_spec = pytree.tree_flatten(func(*call_args, **call_kwargs))
        shape[:] = [out_spec]
        return out

    if release() not in TESTED:
        warn_untested(torch.__version__)
        raise unsupported(
            func, "relies on torch's reverse mode, which dualnn has not verified on this release of torch"
        )
    xs = [leaves[i] for i in where]
    if any(is_functorch_wrapped_tensor(_bottom(x)) for x in xs):
        raise unsupported(func, "is differentiated by torch's reverse mode, which does not run inside torch.func here")
    outputs, _ = _push(func, everything, xs)
    for x in xs:
        if isinstance(x, DualTensor):
            for y in outputs:
                if isinstance(y, DualTensor) and y is not x and y._level == x._level:
                    link_view(x, y)
    return pytree.tree_unflatten(outputs, shape[0])


def _push(func: Callable, everything: Callable[..., list[Any]], xs: list[Any]) -> tuple[list[Any], list[int]]:
    """All leaves of the result, dual where they can be, and which those are."""
    level = top_level(xs)
    if level == 0:
        out = everything(*xs)
        return out, [i for i, y in enumerate(out) if _continuous(y)]
    num = count(level, xs)
    parts = [split(x, level) for x in xs]
    primals = [p for p, _ in parts]
    out, kept = _push(func, everything, primals)

    def flat(*inner: Any) -> list[Tensor]:
        found = everything(*inner)
        return [found[i] for i in kept]

    batches = {t.batch if isinstance(t, PerSample) else 0 for _, t in parts if t is not None}
    if len(batches) > 1:
        raise StructureError(
            f"{getattr(func, '__name__', func)} combines a value reduced over the batch with one that still depends "
            "on every sample: samples mix before the loss. Use per_sample=False."
        )
    if not batches:
        for i in kept:
            out[i] = make(out[i], Zero(num), level)
        return out, kept
    dense = [None if t is None else t.dense() for _, t in parts]
    pushed = stacked(flat, primals, [], dense, num, [out[i] for i in kept])
    for i, d in zip(kept, pushed, strict=True):
        tan = PerSample(d, batches.copy().pop()) if 0 not in batches else Dense(d)
        out[i] = make(out[i], tan, level)
    return out, kept


def stacked(
    flat: Flat, xs: Sequence[Any], before: Sequence[Direction], last: Sequence[Any], num: int, like: Sequence[Tensor]
) -> list[Tensor]:
    """``D^n f(x)[before..., last_k]`` for all k: ``(K, *shape)`` for each output."""
    if num == 0:
        return [torch.zeros((0, *y.shape), dtype=y.dtype, device=y.device) for y in like]
    operands = [*xs, *last, *(v for direction in before for v in direction)]
    if top_level(operands) == 0:
        return by_gradients(flat, xs, before, last, num)
    each = [directional(flat, xs, [*before, [None if t is None else t[k] for t in last]]) for k in range(num)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def directional(flat: Flat, xs: Sequence[Any], along: Sequence[Direction]) -> list[Any]:
    """``D^n f(x)[v_1, …, v_n]``, where x and the directions may be duals."""
    level = top_level([*xs, *(v for direction in along for v in direction)])
    if level == 0:
        *before, last = along
        pushed = by_gradients(flat, xs, before, [None if t is None else t.unsqueeze(0) for t in last], 1)
        return [p.squeeze(0) for p in pushed]
    operands = [*xs, *(v for direction in along for v in direction)]
    num = count(level, operands)
    points = [split(x, level) for x in xs]
    routes = [[split(v, level) for v in direction] for direction in along]
    primals = [p for p, _ in points]
    plain = [[p for p, _ in route] for route in routes]
    value = directional(flat, primals, plain)
    total: list[Any] = [None] * len(value)

    def add(pushed: list[Tensor]) -> None:
        total[:] = [p if t is None else t + p for t, p in zip(total, pushed, strict=True)]

    dx = [None if t is None else t.dense() for _, t in points]
    if any(t is not None for t in dx):
        add(stacked(flat, primals, plain, dx, num, value))
    for i, route in enumerate(routes):
        dv = [None if t is None else t.dense() for _, t in route]
        if any(t is not None for t in dv):
            add(stacked(flat, primals, plain[:i] + plain[i + 1 :], dv, num, value))  # the order does not matter
    return [make(v, Zero(num) if t is None else Dense(t), level) for v, t in zip(value, total, strict=True)]


def by_gradients(
    flat: Flat, xs: Sequence[Tensor], before: Sequence[Direction], last: Sequence[Any], num: int
) -> list[Tensor]:
    """The case of plain tensors: nested gradients in x, then one in u for each direction."""
    given = [*xs, *last, *(v for direction in before for v in direction)]
    # Without a tensor that asks for it the result keeps no graph: nothing is taped.
    record = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given)
    with torch.enable_grad():
        moving = {i for direction in (*before, last) for i, v in enumerate(direction) if v is not None}
        # A fresh node for each argument: the same tensor twice is two arguments.
        ins = [_leaf(x, record) if i in moving else (x if record else x.detach()) for i, x in enumerate(xs)]
        ys = flat(*ins)
        us = [torch.ones_like(y, memory_format=torch.contiguous_format).requires_grad_() for y in ys]
        targets, seeds = list(ys), list(us)
        for direction in before:
            gs = _gradients(targets, ins, seeds, direction)
            targets = [g for g, _ in gs]
            seeds = [v for _, v in gs]
        gs = _gradients(targets, ins, seeds, last)
        sources = [g for g, _ in gs]
        columns: list[list[Tensor]] = [[] for _ in us]
        for k in range(num):
            found: Sequence[Tensor | None] = [None] * len(us)
            if sources:
                found = torch.autograd.grad(
                    sources, us, [v[k] for _, v in gs], retain_graph=True, create_graph=record, allow_unused=True
                )
            for column, u, f in zip(columns, us, found, strict=True):
                column.append(torch.zeros_like(u) if f is None else f)
    out = [torch.stack(column) for column in columns]
    return out if record and any(o.requires_grad for o in out) else [o.detach() for o in out]


def _gradients(
    targets: Sequence[Tensor], ins: Sequence[Tensor], seeds: Sequence[Tensor], direction: Direction
) -> list[tuple[Tensor, Tensor]]:
    """Gradients with a graph in the arguments that the direction moves, each with its direction."""
    alive = [(t, s) for t, s in zip(targets, seeds, strict=True) if t.requires_grad]
    chosen = [(x, v) for x, v in zip(ins, direction, strict=True) if v is not None]
    if not alive or not chosen:
        return []
    found = torch.autograd.grad(
        [t for t, _ in alive], [x for x, _ in chosen], [s for _, s in alive], create_graph=True, allow_unused=True
    )
    return [(g, v) for g, (_, v) in zip(found, chosen, strict=True) if g is not None and g.requires_grad]


def _leaf(x: Tensor, record: bool) -> Tensor:
    """A node of its own to differentiate in; connected to ``x`` where autograd records x."""
    if record and x.requires_grad:
        return x.view_as(x)
    return x.detach().requires_grad_()


def _continuous(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def _bottom(x: Any) -> Any:
    while isinstance(x, DualTensor):
        x = x._primal
    return x
