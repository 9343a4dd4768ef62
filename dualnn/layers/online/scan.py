r"""Linear recurrences with small matrices, over the steps of a window.

.. math:: h_t = A_t h_{t-1} + b_t, \qquad t = 0, …, T-1,

for a state of S numbers a unit: A is S x S tensors, h and b are S tensors, each ``(T, …)``. Two levels: the T steps are
cut into blocks of about :math:`\sqrt T`; all blocks advance together from zero, next to the products of their matrices,
and are then joined one after the other. That is :math:`2\sqrt T` dependent operations on larger tensors where the plain
loop has T on small ones, whose time is spent between operations. Nothing is divided by, so nothing is unstable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# None where an entry is zero in every step.
Vector = Sequence[Tensor | None]
Matrix = Sequence[Sequence[Tensor | None]]

PLAIN = 12  # steps up to which two levels do not pay


def scan(a: Matrix, b: Vector, start: Sequence[Tensor], reverse: bool = False) -> list[Tensor]:
    """The states after every step.

    Args:
        a: The matrices' entries, ``(T, …)``, where they broadcast to the state.
        b: What is added.
        start: The state before the first step.
        reverse: Begin with the last entry of ``a`` and ``b``. The results stand where the entries are.

    Returns:
        S tensors ``(T, *start.shape)``.

    Example:
        >>> half = torch.full((3, 1), 0.5)
        >>> scan([[half]], [torch.ones(3, 1)], [torch.zeros(1)])[0].flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    steps = next(x.shape[0] for x in [*b, *(x for row in a for x in row)] if x is not None)
    if steps <= PLAIN:
        return _plain(a, b, start, steps, reverse)
    length = max(2, round(steps**0.5))
    blocks, rest = divmod(steps, length)
    whole = steps - rest

    def cut(x: Tensor | None) -> Tensor | None:  # (T, …) -> (length, blocks, …), without the steps that come last
        if x is None:
            return None
        return (x[rest:] if reverse else x[:whole]).unflatten(0, (blocks, length)).transpose(0, 1)

    def remaining(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:rest] if reverse else x[whole:]

    size, last = range(len(start)), 0 if reverse else -1
    inner_a, inner_b = [[cut(x) for x in row] for row in a], [cut(x) for x in b]
    out = [s.new_empty(blocks, length, *s.shape) for s in start]
    if all(x is None for x in b):
        local: list[Tensor] | None = None
    else:
        zero = [s.new_zeros(blocks, *s.shape) for s in start]
        local = _plain(inner_a, inner_b, zero, length, reverse)
    products = _products(inner_a, length, reverse)
    ends = [[None if x is None else x[last] for x in row] for row in products]
    added = [None] * len(start) if local is None else [x[last] for x in local]
    joined = _plain(ends, added, start, blocks, reverse)
    pairs = zip(start, joined, strict=True)
    entries = [torch.cat([x[1:], s.unsqueeze(0)] if reverse else [s.unsqueeze(0), x[:-1]]) for s, x in pairs]
    for i in size:
        target = out[i].transpose(0, 1)
        y: Tensor | None = None if local is None else local[i]
        present = [j for j in size if products[i][j] is not None]
        for n, j in enumerate(present):
            y = _multiplied(y, products[i][j], entries[j], target if n == len(present) - 1 else None)  # type: ignore[arg-type]
        if not present:
            target.zero_() if y is None else target.copy_(y)
    found = [x.flatten(0, 1) for x in out]
    if rest:
        begin = [x[last] for x in found]
        tail = _plain([[remaining(x) for x in row] for row in a], [remaining(x) for x in b], begin, rest, reverse)
        found = [torch.cat([t, x] if reverse else [x, t]) for x, t in zip(found, tail, strict=True)]
    return found


def steady(rate: Tensor, b: Tensor, start: Tensor | None = None, reverse: bool = False) -> Tensor:
    """The same for one state and a rate that never changes, ``h_t = rate h_{t-1} + b_t``, written over ``b``.

    Args:
        rate: Broadcasts to a state.
        b: What is added, ``(T, …)``.
        start: The state before the first step; None: zero.
        reverse: Begin with the last entry.

    Example:
        >>> steady(torch.tensor(0.5), torch.ones(4, 1)).flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    steps = b.shape[0]
    length = max(1, round(steps**0.5)) if steps > PLAIN else 1
    blocks, rest = divmod(steps, length)
    cut = (b[rest:] if reverse else b[: steps - rest]).unflatten(0, (blocks, length))
    rows = cut.unbind(1)[::-1] if reverse else cut.unbind(1)
    for before, now in zip(rows, rows[1:], strict=False):
        now.addcmul_(rate, before)
    powers = running(rate, length)
    entries = torch.empty_like(rows[0])
    state = torch.zeros_like(b[0]) if start is None else start
    for end, entry in list(zip(rows[-1], entries, strict=True))[:: -1 if reverse else 1]:
        state = torch.addcmul(end, powers[-1], entry.copy_(state))
    if length > 1:
        cut.addcmul_((powers.flip(0) if reverse else powers).unsqueeze(1), entries.unsqueeze(1))
    else:
        cut.addcmul_(rate, entries.unsqueeze(1))
    for row in reversed(b[:rest].unbind(0)) if reverse else b[steps - rest :].unbind(0):
        state = row.addcmul_(rate, state)
    return b


def running(rate: Tensor, steps: int) -> Tensor:
    """``rate``, its square, … up to ``rate ** steps``, ``(steps, *rate.shape)``: to rounding, whatever the dtype."""
    wide = torch.promote_types(rate.dtype, torch.float64)
    return torch.cumprod(rate.to(wide).expand(steps, *rate.shape), 0).to(rate.dtype)


def summed(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum(0)``, a few steps at a time: fresh memory for the product would cost more than the product."""
    parts = zip(a.split(32), b.split(32), strict=True)
    first, second = next(parts)
    total = (first * second).sum(0)
    for first, second in parts:
        total += (first * second).sum(0)
    return total


def _plain(a: Matrix, b: Vector, start: Sequence[Tensor], steps: int, reverse: bool) -> list[Tensor]:
    """One step after the other."""
    size = range(len(start))
    rows = [[None if x is None else x.unbind(0) for x in row] for row in a]
    added = [None if x is None else x.unbind(0) for x in b]
    state, found = list(start), [start[0].new_empty(steps, *s.shape) for s in start]
    places = [f.unbind(0) for f in found]
    for t in reversed(range(steps)) if reverse else range(steps):
        new = []
        for i in size:
            now = None if added[i] is None else added[i][t]  # type: ignore[index]
            present = [j for j in size if rows[i][j] is not None]
            for n, j in enumerate(present):
                out = places[i][t] if n == len(present) - 1 else None
                now = _multiplied(now, rows[i][j][t], state[j], out)  # type: ignore[index]
            if not present:
                now = places[i][t].zero_() if now is None else places[i][t].copy_(now)
            new.append(now)
        state = new  # type: ignore[assignment]
    return found


def _multiplied(added: Tensor | None, factor: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(factor, x, out=out) if added is None else torch.addcmul(added, factor, x, out=out)


def _products(a: Matrix, steps: int, reverse: bool) -> list[list[Tensor | None]]:
    """Running products of the matrices, each where its last factor stands."""
    size = range(len(a))
    if any(x is None for row in a for x in row):  # products of a matrix with zeros need not have them
        some = next((x for row in a for x in row if x is not None), None)
        if some is None:
            return [[None] * len(a) for _ in a]
        zero = torch.zeros_like(some)
        return _products([[zero if x is None else x for x in row] for row in a], steps, reverse)
    entries = torch.broadcast_tensors(*(x for row in a for x in row))  # type: ignore[misc]
    rows = [[x.unbind(0) for x in entries[i * len(a) : (i + 1) * len(a)]] for i in size]
    found = [[torch.empty_like(x, memory_format=torch.contiguous_format) for _ in size] for x in entries[: len(a)]]
    places = [[x.unbind(0) for x in row] for row in found]
    order = list(reversed(range(steps)) if reverse else range(steps))
    for i in size:
        for j in size:
            places[i][j][order[0]].copy_(rows[i][j][order[0]])
    for before, t in zip(order, order[1:], strict=False):
        for i in size:
            for j in size:
                value: Tensor | None = None
                for k in size:
                    out = places[i][j][t] if k == len(a) - 1 else None
                    value = _multiplied(value, rows[i][k][t], places[k][j][before], out)
    return found  # type: ignore[return-value]
