"""What becomes of entries in operations that are not elementwise: moved, summed, solved for.

A rule gets the program, tensors like the results, and the operation's arguments with `Entries` for tensors. It raises
`WholeError` where the samples would mix, or where there would be too many entries.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualnn.engine.entries import LARGEST, Builder, Entries, Entry, WholeError, shape_of
from dualnn.engine.written import Op

aten = torch.ops.aten


def _cast(p: Builder, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
    if x.dtype == out.dtype:
        return x
    once = _cut(x.data, [d for d, s in enumerate(x.data.strides) if s == 0])
    data: Any = np.empty(once.shape, dtype=object)
    for index in np.ndindex(*data.shape):
        e = once[index]
        known = not isinstance(e, Op)
        data[index] = torch.tensor(e).to(out.dtype).item() if known else p.emit("cast", out.dtype, e)
    return Entries(np.broadcast_to(data, x.data.shape), x.batch, out.dtype)


# Views and what else only moves entries.


def _same(p: Builder, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
    return x


def _select(p: Builder, out: Tensor, x: Entries, dim: int, index: int) -> Entries:
    dim %= x.data.ndim
    if dim == x.batch:
        raise WholeError
    index %= x.data.shape[dim]
    batch = None if x.batch is None else x.batch - (dim < x.batch)
    return Entries(x.data[(slice(None),) * dim + (slice(index, index + 1),)].squeeze(dim), batch, x.dtype)


def _unbind(p: Builder, out: Sequence[Tensor], x: Entries, dim: int = 0) -> list[Entries]:
    return [_select(p, o, x, dim, i) for i, o in enumerate(out)]


def _slice(
    p: Builder, out: Tensor, x: Entries, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Entries:
    dim %= x.data.ndim
    if dim == x.batch:
        if out.shape[dim] != p.size:
            raise WholeError
        return x
    return Entries(x.data[(slice(None),) * dim + (slice(start, end, step),)], x.batch, x.dtype)


def _unsqueeze(p: Builder, out: Tensor, x: Entries, dim: int) -> Entries:
    dim %= out.dim()
    return Entries(np.expand_dims(x.data, dim), None if x.batch is None else x.batch + (dim <= x.batch), x.dtype)


def _permute(p: Builder, out: Tensor, x: Entries, order: Sequence[int]) -> Entries:
    order = [d % x.data.ndim for d in order]
    return Entries(x.data.transpose(order), None if x.batch is None else order.index(x.batch), x.dtype)


def _transpose(p: Builder, out: Tensor, x: Entries, a: int = 0, b: int = 1) -> Entries:
    order = list(range(x.data.ndim))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permute(p, out, x, order)


def _expand(p: Builder, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
    batch = None if x.batch is None else x.batch + out.dim() - x.data.ndim
    return Entries(np.broadcast_to(x.data, shape_of(out, batch)), batch, x.dtype)


def _view(p: Builder, out: Tensor, x: Entries, *_: Any) -> Entries:
    batch = None
    if x.batch is not None:
        before = int(np.prod(x.data.shape[: x.batch]))
        places = [i for i, n in enumerate(out.shape) if n == p.size and int(np.prod(out.shape[:i])) == before]
        if not places:
            raise WholeError
        batch = places[0]
    shape = shape_of(out, batch)
    if np.prod(shape) > LARGEST:
        raise WholeError
    return Entries(x.data.reshape(shape), batch, x.dtype)


def _cat(p: Builder, out: Tensor, parts: Sequence[Entries], dim: int = 0) -> Entries:
    arrays, batch = p.aligned(parts, out.dim())
    dim %= out.dim()
    if dim == batch:
        raise WholeError
    return Entries(_joined(np.concatenate, arrays, dim, [d for d in range(out.dim()) if d != dim]), batch, out.dtype)


def _stack(p: Builder, out: Tensor, parts: Sequence[Entries], dim: int = 0) -> Entries:
    arrays, batch = p.aligned(parts, out.dim() - 1)
    dim %= out.dim()
    data = _joined(np.stack, arrays, dim, range(out.dim() - 1))
    return Entries(data, None if batch is None else batch + (dim <= batch), out.dtype)


def _joined(join: Callable[..., Any], arrays: list[Any], dim: int, axes: Iterable[int]) -> Any:
    """Arrays put together; an axis along which none of them varies stays such a one."""
    idle = [d for d in axes if all(a.strides[d] == 0 or a.shape[d] == 1 for a in arrays)]
    length = [arrays[0].shape[d] for d in idle]
    arrays = [_cut(a, idle) for a in arrays]
    if sum(a.size for a in arrays) > LARGEST:
        raise WholeError
    data = join(arrays, dim)
    shape = list(data.shape)
    for d, n in zip(idle, length, strict=True):
        shape[d + (data.ndim > arrays[0].ndim and d >= dim)] = n
    return np.broadcast_to(data, shape)


def _cut(data: Any, axes: Iterable[int]) -> Any:
    """The first entries along some axes."""
    axes = set(axes)
    return data[(*(slice(0, 1) if d in axes else slice(None) for d in range(data.ndim)), ...)]


# Constants.


def _filled(number: Any) -> Callable[..., Entries]:
    def rule(p: Builder, out: Tensor, *_: Any, **__: Any) -> Entries:
        value = torch.tensor(number, dtype=out.dtype).item()
        return Entries(np.broadcast_to(np.array(value, dtype=object), tuple(out.shape)), None, out.dtype)

    return rule


def _full(p: Builder, out: Tensor, shape: Any, number: Any, **_: Any) -> Entries:
    if not isinstance(number, (int, float)):
        raise WholeError
    return _filled(number)(p, out)


def _scalar(p: Builder, out: Tensor, number: Any, **_: Any) -> Entries:
    return _full(p, out, (), number)


def _eye(p: Builder, out: Tensor, *_: Any, **__: Any) -> Entries:
    return numbers(torch.eye(*out.shape, dtype=out.dtype))


def numbers(x: Any) -> Entries:
    """A tensor that is known."""
    if not isinstance(x, Tensor) or x.numel() > LARGEST or x.is_complex():
        raise WholeError
    return Entries(np.array(x.tolist(), dtype=object).reshape(tuple(x.shape)), None, x.dtype)


# Over the entries of a sample, one after the other.


def _reduced(p: Builder, out: Tensor, x: Entries, dims: Any, step: Callable[[Any, Any], Any]) -> Entries:
    every = range(x.data.ndim) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    axes = {d % x.data.ndim for d in every}
    rest = [d for d in range(x.data.ndim) if d not in axes]
    thin = _cut(x.data, [d for d in rest if x.data.strides[d] == 0])
    if x.batch in axes or thin.size > LARGEST:
        raise WholeError
    flat = thin.transpose([*rest, *sorted(axes)]).reshape(*(thin.shape[d] for d in rest), -1)
    data: Any = np.empty(flat.shape[:-1], dtype=object)
    for index in np.ndindex(*data.shape):
        total = flat[index][0]
        for entry in flat[index][1:]:
            total = step(total, entry)
        data[index] = total
    keep = out.dim() == x.data.ndim
    batch = x.batch if x.batch is None or keep else rest.index(x.batch)
    data = np.expand_dims(data, sorted(axes)) if keep else data
    return Entries(np.broadcast_to(data, shape_of(out, batch)), batch, out.dtype)


def _by(target: Any) -> Callable[..., Entries]:
    def rule(p: Builder, out: Tensor, x: Entries, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Entries:
        if kwargs.get("dtype") is not None or x.dtype != out.dtype:
            raise WholeError
        return _reduced(p, out, x, dim, partial(p.pair, target, out.dtype))

    return rule


def _norm(p: Builder, out: Tensor, x: Entries, order: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Entries:
    if order != 2 or x.data.size > LARGEST:
        raise WholeError
    squares: Any = np.empty(x.data.shape, dtype=object)
    for index in np.ndindex(*x.data.shape):
        squares[index] = p.pair(aten.mul.Tensor, out.dtype, x.data[index], x.data[index])
    total = _reduced(p, out, x._replace(data=squares), dim, partial(p.pair, aten.add.Tensor, out.dtype))
    data: Any = np.empty(total.data.shape, dtype=object)
    for index in np.ndindex(*data.shape):
        e = total.data[index]
        data[index] = p.emit("sqrt.default", out.dtype, e) if isinstance(e, Op) else e**0.5
    return total._replace(data=data)


def _product(p: Builder, out: Tensor, a: Entries, b: Entries) -> Entries:
    """Of matrices or of a matrix and a vector, maybe in a batch."""
    vector = b.data.ndim == 1
    right = _unsqueeze(p, torch.empty(*b.data.shape, 1, device="meta"), b, 1) if vector else b
    if b.batch is None and a.batch == a.data.ndim - 2:  # samples are rows
        x, y, batch = a.data, right.data, a.batch
    elif a.batch is None and b.batch == b.data.ndim - 1 and not vector:  # or columns
        x, y, batch = a.data, right.data, b.batch
    else:
        (x, y), batch = p.aligned([a, right], right.data.ndim)
        if batch is not None and batch >= x.ndim - 2:
            raise WholeError
    dims = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    data: Any = np.empty((*dims, x.shape[-2], y.shape[-1]), dtype=object)
    if data.size * x.shape[-1] > LARGEST:
        raise WholeError
    x, y = np.broadcast_to(x, (*dims, *x.shape[-2:])), np.broadcast_to(y, (*dims, *y.shape[-2:]))
    for *lead, i, k in np.ndindex(*data.shape):
        terms = [p.pair(aten.mul.Tensor, out.dtype, x[(*lead, i, j)], y[(*lead, j, k)]) for j in range(x.shape[-1])]
        total = terms[0]
        for term in terms[1:]:
            total = p.pair(aten.add.Tensor, out.dtype, total, term)
        data[(*lead, i, k)] = total
    return Entries(data[..., 0] if vector else data, batch, out.dtype)


class _Factors(NamedTuple):
    """Of a matrix for each sample: rows after elimination, which of two were exchanged, and multiples subtracted."""

    rows: list[list[Entry]]
    swaps: list[Entry]
    multiples: list[Entry]


def _factored(p: Builder, out: Sequence[Tensor], a: Entries, pivot: bool = True, **_: Any) -> list[Any]:
    """LU with partial pivoting; only `_solved` can read it."""
    dtype, n = a.dtype, a.data.shape[-1]
    if not pivot or a.data.size != n * n or n * n > LARGEST:
        raise WholeError
    rows = [list(row) for row in a.data.reshape(n, n)]
    found = _Factors(rows, [], [])
    for c in range(n):
        for r in range(c + 1, n):  # the largest entry of the column comes up
            sizes = [p.emit("abs.default", dtype, rows[i][c]) for i in (r, c)]
            found.swaps.append(p.emit("gt.Tensor", torch.bool, *sizes))
            for k in range(c, n):
                rows[c][k], rows[r][k] = _exchanged(p, dtype, found.swaps[-1], rows[c][k], rows[r][k])
        for r in range(c + 1, n):
            found.multiples.append(p.pair(aten.div.Tensor, dtype, rows[r][c], rows[c][c]))
            for k in range(c + 1, n):
                rows[r][k] = _less(p, dtype, rows[r][k], found.multiples[-1], rows[c][k])
    return [found, None, None]


def _solved(
    p: Builder, out: Tensor, lu: Any, pivots: Any, b: Entries, *, left: bool = True, adjoint: bool = False
) -> Entries:
    if not isinstance(lu, _Factors) or adjoint or not left or b.data.size != b.data.shape[-2] * b.data.shape[-1]:
        raise WholeError
    n, columns = b.data.shape[-2:]
    data: Any = np.empty((n, columns), dtype=object)
    for k in range(columns):
        x: list[Any] = list(b.data.reshape(n, columns)[:, k])
        swaps, multiples = iter(lu.swaps), iter(lu.multiples)
        for c in range(n):
            for r in range(c + 1, n):
                x[c], x[r] = _exchanged(p, b.dtype, next(swaps), x[c], x[r])
            for r in range(c + 1, n):
                x[r] = _less(p, b.dtype, x[r], next(multiples), x[c])
        for i in reversed(range(n)):
            for j in range(i + 1, n):
                x[i] = _less(p, b.dtype, x[i], lu.rows[i][j], x[j])
            x[i] = p.pair(aten.div.Tensor, b.dtype, x[i], lu.rows[i][i])
        data[:, k] = x
    return Entries(data.reshape(b.data.shape), b.batch, b.dtype)


def _exchanged(p: Builder, dtype: torch.dtype, mask: Entry, a: Entry, b: Entry) -> tuple[Entry, Entry]:
    if a is b:
        return a, b
    return p.emit("where.self", dtype, mask, b, a), p.emit("where.self", dtype, mask, a, b)


def _less(p: Builder, dtype: torch.dtype, a: Entry, factor: Entry, b: Entry) -> Entry:
    return p.pair(aten.sub.Tensor, dtype, a, p.pair(aten.mul.Tensor, dtype, factor, b))


RULES: dict[Any, Callable[..., Any]] = {
    operator.getitem: lambda p, out, parts, index: parts[index],
    aten._to_copy.default: _cast,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _slice,
    aten.unsqueeze.default: _unsqueeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.eye.default: _eye,
    aten.eye.m: _eye,
    aten.full.default: _full,
    aten.scalar_tensor.default: _scalar,
    aten.linalg_vector_norm.default: _norm,
    aten.linalg_lu_factor_ex.default: _factored,
    aten.linalg_lu_solve.default: _solved,
    aten.sum.dim_IntList: _by(aten.add.Tensor),
    aten.sum.default: _by(aten.add.Tensor),
    aten.prod.dim_int: _by(aten.mul.Tensor),
    aten.all.dim: _by(aten.bitwise_and.Tensor),
    aten.any.dim: _by(aten.bitwise_or.Tensor),
    aten.amax.default: _by(aten.maximum.default),
    aten.amin.default: _by(aten.minimum.default),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default), _product),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _view),
    **dict.fromkeys((aten.clone.default, aten.detach.default, aten.alias.default), _same),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled(0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled(1)),
}
