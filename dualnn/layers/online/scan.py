r"""Linear recurrences with small matrices, over the steps of a window.

.. math:: h_t = A_t h_{t-1} + b_t, \qquad t = 0, …, T-1,

for a state of S numbers a unit. Two levels: the T steps are cut into blocks of about :math:`\sqrt T`; all blocks
advance together from zero, next to the products of their matrices, and are then joined one after the other. That is
:math:`2\sqrt T` dependent operations on larger tensors where the plain loop has T on small ones, whose time is spent
between operations. Nothing is divided by, so nothing is unstable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLAIN = 12  # steps up to which two levels do not pay


def scan(a: Tensor, b: Tensor | None, start: Tensor, reverse: bool = False, out: Tensor | None = None) -> Tensor:
    """The states after every step.

    Args:
        a: The matrices, ``(T, S, S, …)``, where the rest broadcasts to the state's.
        b: What is added, ``(T, S, …)``; None: nothing.
        start: The state before the first step, ``(S, …)``.
        reverse: Begin with the last entry of ``a`` and ``b``. The results stand where the entries are.
        out: Where to write them.

    Returns:
        ``(T, *start.shape)``.

    Example:
        >>> half = torch.full((3, 1, 1), 0.5)
        >>> scan(half, torch.ones(3, 1), torch.zeros(1)).flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    steps = a.shape[0]
    found = start.new_empty(steps, *start.shape) if out is None else out
    if steps <= PLAIN:
        _plain(a, b, start, found, reverse)
        return found
    length = max(2, round(steps**0.5))
    blocks, rest = divmod(steps, length)

    def cut(x: Tensor) -> Tensor:  # (T, …) -> (length, blocks, …), without the steps that come last
        return (x[rest:] if reverse else x[: steps - rest]).unflatten(0, (blocks, length)).transpose(0, 1)

    inner, target = cut(a), cut(found)
    products = _products(inner, reverse)
    if b is not None:
        _plain(inner, cut(b), torch.zeros_like(target[0]), target, reverse, 1)
    last = 0 if reverse else -1
    entries = torch.empty_like(target[0])
    now = start
    for k in reversed(range(blocks)) if reverse else range(blocks):
        entries[k] = now
        now = times(products[last, k], now, None if b is None else target[last, k])
    times(products, entries.unsqueeze(0), None if b is None else target, target, 2)
    if rest:
        tail = slice(0, rest) if reverse else slice(steps - rest, None)
        _plain(a[tail], None if b is None else b[tail], now, found[tail], reverse)
    return found


def times(a: Tensor, h: Tensor, added: Tensor | None = None, out: Tensor | None = None, lead: int = 0) -> Tensor:
    """``a h + added`` behind ``lead`` axes that the matrices ``(…, S, S, …)`` and the states ``(…, S, …)`` share.

    Args:
        a: The matrices.
        h: The states; not ``out``.
        added: May be ``out``.
        out: Where to write.
        lead: See above.
    """
    for j in range(a.shape[lead]):
        column, entry = a.select(lead + 1, j), h.narrow(lead, j, 1)
        if j:
            out = torch.addcmul(out, column, entry, out=out)  # type: ignore[arg-type]
        elif added is None:
            out = torch.mul(column, entry, out=out)
        else:
            out = torch.addcmul(added, column, entry, out=out)
    return out  # type: ignore[return-value]


def matrices(rows: Sequence[Sequence[Tensor | None]], like: Tensor) -> Tensor:
    """Nested lists of entries ``(T, …)``, None for zeros, as ``(T, S, S, …)``.

    Args:
        rows: The entries.
        like: ``(T, …)``, for the shape where there is none.
    """
    if len(rows) == 1 and rows[0][0] is not None:
        return rows[0][0][:, None, None]
    some = [x for row in rows for x in row if x is not None]
    zero = torch.zeros_like(some[0]) if some else torch.zeros_like(like)
    entries = torch.broadcast_tensors(*(zero if x is None else x for row in rows for x in row))
    return torch.stack(entries, 1).unflatten(1, (len(rows), len(rows)))


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
    total = (a[:32] * b[:32]).sum(0)
    for begin in range(32, len(a), 32):
        total += (a[begin : begin + 32] * b[begin : begin + 32]).sum(0)
    return total


def _plain(a: Tensor, b: Tensor | None, start: Tensor, out: Tensor, reverse: bool, lead: int = 0) -> None:
    """One step after the other."""
    order = list(reversed(range(a.shape[0])) if reverse else range(a.shape[0]))
    matrix, place = a.unbind(0), out.unbind(0)
    added = [None] * len(place) if b is None else b.unbind(0)
    now = start
    for t in order:
        now = times(matrix[t], now, added[t], place[t], lead)


def _products(a: Tensor, reverse: bool) -> Tensor:
    """Running products of the matrices of all blocks, ``(length, blocks, S, S, …)``, where their last factor stands."""
    found = torch.empty_like(a, memory_format=torch.contiguous_format)
    first = -1 if reverse else 0
    found[first] = a[first]
    tail = slice(None, -1) if reverse else slice(1, None)
    _plain(a[tail].unsqueeze(4), None, found[first], found[tail], reverse, 1)
    return found
