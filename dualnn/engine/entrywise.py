"""A recorded program on small tensors, taken apart into its entries.

Compilers of tensor programs make a loop for every tensor. Where tensors have three or nine entries for each of many
samples, loops over the entries are all overhead: no vector is full, every `stack` is a chain of selections. Taken
apart, picking entries and putting them together costs nothing, and what remains is arithmetic on numbers, one for each
sample: `written` makes a C++ function of it, in seconds.

Entries that are 0 by construction (the seeds of a Jacobian) are structural zeros, as in `Zero`: their products are not
computed. Equal operations are one. What has no rule here, or is large, is for a compiler of tensor programs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from dualnn.engine.written import Op, Written, written

aten = torch.ops.aten
LARGEST = 4096  # entries of a tensor that is taken apart
MOST = 50_000  # operations

Entry = Op | float | int | bool


class Entries(NamedTuple):
    """A tensor taken apart.

    Attributes:
        data: Its entries, an array of objects; of length 1 along the batch.
        batch: Axis of the samples, or None.
        dtype: Of the tensor.
    """

    data: Any
    batch: int | None
    dtype: torch.dtype


class _WholeError(Exception):
    """Something can only be done with whole tensors."""


def entrywise(graph: fx.GraphModule, batched: Sequence[bool]) -> Written | None:
    """The program as one C++ function, for CPUs; None where it is not one of few entries and known operations.

    Args:
        graph: Of aten operations with metadata, as `make_fx` records it.
        batched: For each input, whether its last axis is the batch. (Only a hint: what it means is read off the graph.)
    """
    program = _Program(graph, batched)
    try:
        program.run()
    except _WholeError:
        return None
    outputs = [([*value.data.reshape(-1)], like) for value, like in program.outputs]
    return written(program.inputs, batched, outputs, program.ops, program.size)


class _Program:
    def __init__(self, graph: fx.GraphModule, batched: Sequence[bool]) -> None:
        self.graph, self.batched = graph, batched
        self.size = 0  # of the batch
        self.inputs: list[Tensor] = []
        self.outputs: list[tuple[Entries, Tensor]] = []
        self.ops: list[Op] = []
        self._env: dict[fx.Node, Any] = {}
        self._known: dict[Any, Op] = {}

    def run(self) -> None:
        places = [node.meta["val"] for node in self.graph.graph.nodes if node.op == "placeholder"]
        for like, batched in zip(places, self.batched, strict=True):
            if batched:
                self.size = like.shape[-1]
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self._env[node] = self._taken_apart(node.meta["val"])
            elif node.op == "call_function":
                self._env[node] = self._call(node)
            elif node.op == "output":
                self.outputs = [(self._settled(self._env[n], n.meta["val"]), n.meta["val"]) for n in node.args[0]]
            else:  # a tensor that was captured: as it is now
                self._env[node] = _numbers(getattr(self.graph, str(node.target)))

    def emit(self, target: str, dtype: torch.dtype, *args: Any) -> Op:
        """An operation, or the same one if it is there already."""
        key = target, dtype, tuple((type(a), a) for a in args)  # 1, 1.0 and True are equal
        op = self._known.get(key)
        if op is None:
            if len(self.ops) >= MOST:
                raise _WholeError
            op = self._known[key] = Op(target, args, dtype, any(isinstance(a, Op) and a.varies for a in args))
            self.ops.append(op)
        return op

    def pair(self, target: Any, dtype: torch.dtype, a: Entry, b: Entry) -> Entry:
        """An operation of two entries of one dtype."""
        simple = _simplified(target, [a, b], [dtype, dtype], dtype)
        if simple is not None:
            return simple[0]
        if isinstance(a, Op) or isinstance(b, Op):
            return self.emit(_name(target), dtype, a, b)
        return target(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)).item()

    def aligned(self, values: Sequence[Entries], dim: int) -> tuple[list[Any], int | None]:
        """Arrays of ``dim`` axes that broadcast, and the batch's axis."""
        axes = {dim - v.data.ndim + v.batch for v in values if v.batch is not None}  # from the end, as in broadcasting
        if len(axes) > 1:
            raise _WholeError
        batch = axes.pop() if axes else None
        arrays = []
        for v in values:
            data = v.data[(None,) * (dim - v.data.ndim) + (...,)]
            if batch is not None and v.batch is None and data.shape[batch] > 1:
                if data.strides[batch] != 0:  # one number for each sample, which no input said
                    raise _WholeError
                data = data[(slice(None),) * batch + (slice(0, 1),)]
            arrays.append(data)
        return arrays, batch

    def _taken_apart(self, like: Tensor) -> Entries:
        batched = self.batched[len(self.inputs)]
        shape = [*like.shape[:-1], 1] if batched else list(like.shape)
        if np.prod(shape) > LARGEST:
            raise _WholeError
        step = self.size if batched else 1
        data: Any = np.empty(shape, dtype=object)
        for i, index in enumerate(np.ndindex(*shape)):
            op = data[index] = Op("load", (len(self.inputs), i * step), like.dtype, batched)
            self.ops.append(op)
        self.inputs.append(like)
        return Entries(data, like.dim() - 1 if batched else None, like.dtype)

    def _settled(self, value: Any, like: Tensor) -> Entries:
        """A result, whose batch is its last axis."""
        if not isinstance(value, Entries) or value.batch not in (None, like.dim() - 1):
            raise _WholeError
        if self.size and value.batch is None:
            if like.dim() == 0 or like.shape[-1] != self.size or value.data.strides[-1] != 0:
                raise _WholeError
            value = Entries(value.data[..., :1], like.dim() - 1, value.dtype)
        return value

    def _call(self, node: fx.Node) -> Any:
        rule, out = RULES.get(node.target), node.meta["val"]
        if rule is not None:
            args = [self._arg(a) for a in node.args]
            return rule(self, out, *args, **{k: self._arg(a) for k, a in node.kwargs.items()})
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or node.kwargs:
            raise _WholeError
        return self._pointwise(node.target, [self._arg(a) for a in node.args], out)

    def _arg(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            return self._env[a]
        return [self._arg(x) for x in a] if isinstance(a, (list, tuple)) else a

    def _pointwise(self, target: Any, args: list[Any], out: Tensor) -> Entries:
        places = [i for i, a in enumerate(args) if isinstance(a, Entries)]
        operands, batch = self.aligned([args[i] for i in places], out.dim())
        dtypes = [args[i].dtype for i in places]
        if len({t for t in dtypes if t.is_floating_point}) > 1:
            raise _WholeError  # what is promoted to what depends on the number of axes
        shape = _shape(out, batch)
        # An axis along which nothing varies is done once.
        once = [all(x.shape[d] == 1 or x.strides[d] == 0 for x in operands) for d in range(len(shape))]
        cut = tuple(slice(0, 1) if o else slice(None) for o in once)
        small = [1 if o else n for o, n in zip(once, shape, strict=True)]
        if np.prod(small) > LARGEST:
            raise _WholeError
        operands = [np.broadcast_to(x[(*cut, ...)], small) for x in operands]
        data: Any = np.empty(small, dtype=object)
        for index in np.ndindex(*small):
            entries = [x[index] for x in operands]
            data[index] = self._entry(target, args, places, entries, dtypes, out.dtype)
        return Entries(np.broadcast_to(data, shape), batch, out.dtype)

    def _entry(
        self, target: Any, args: list[Any], places: list[int], entries: list[Entry], dtypes: list[torch.dtype], out: Any
    ) -> Entry:
        if len(places) == 1 and len(args) == 2 and isinstance(args[1], (int, float)):
            simple = _simplified(target, [*entries, args[1]], [*dtypes, out], out)
        else:
            simple = _simplified(target, entries, dtypes, out) if len(places) == len(args) else None
        if simple is not None:
            return simple[0]
        called = list(args)
        known = not any(isinstance(e, Op) for e in entries)
        for i, e, dtype in zip(places, entries, dtypes, strict=True):
            called[i] = torch.tensor(e, dtype=dtype) if known else e
        return target(*called).item() if known else self.emit(_name(target), out, *called)


def _name(target: Any) -> str:
    return str(target).removeprefix("aten.")


def _simplified(target: Any, entries: list[Entry], dtypes: list[torch.dtype], out: torch.dtype) -> list[Entry] | None:
    """The result of an operation with a structural 0 or a 1, which needs no computing."""
    if target is aten.where.self:
        mask, a, b = entries
        if not isinstance(mask, Op):
            return [a if mask else b]
        return [a] if a is b else None
    if target not in NEUTRAL or len(entries) != 2:
        return None
    neutral, absorbing, both = NEUTRAL[target]
    for i in (1, 0) if both else (1,):
        if not isinstance(entries[i], Op) and entries[i] == neutral and dtypes[1 - i] == out:
            return [entries[1 - i]]
    for i in (0, 1) if both else (0,):
        if absorbing is not None and not isinstance(entries[i], Op) and entries[i] == absorbing:
            return [torch.tensor(absorbing, dtype=out).item()]
    return None


# What leaves the other operand as it is, what the result is whatever the other one is, and whether from both sides.
NEUTRAL: dict[Any, tuple[Any, Any, bool]] = {
    aten.mul.Tensor: (1, 0, True),
    aten.add.Tensor: (0, None, True),
    aten.sub.Tensor: (0, None, False),
    aten.div.Tensor: (1, 0, False),
    aten.bitwise_and.Tensor: (True, False, True),
    aten.bitwise_or.Tensor: (False, True, True),
}


def _shape(out: Tensor, batch: int | None) -> list[int]:
    return [1 if d == batch else n for d, n in enumerate(out.shape)]


def _cast(p: _Program, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
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


def _same(p: _Program, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
    return x


def _select(p: _Program, out: Tensor, x: Entries, dim: int, index: int) -> Entries:
    dim %= x.data.ndim
    if dim == x.batch:
        raise _WholeError
    index %= x.data.shape[dim]
    batch = None if x.batch is None else x.batch - (dim < x.batch)
    return Entries(x.data[(slice(None),) * dim + (slice(index, index + 1),)].squeeze(dim), batch, x.dtype)


def _unbind(p: _Program, out: Sequence[Tensor], x: Entries, dim: int = 0) -> list[Entries]:
    return [_select(p, o, x, dim, i) for i, o in enumerate(out)]


def _slice(
    p: _Program, out: Tensor, x: Entries, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Entries:
    dim %= x.data.ndim
    if dim == x.batch:
        if out.shape[dim] != p.size:
            raise _WholeError
        return x
    return Entries(x.data[(slice(None),) * dim + (slice(start, end, step),)], x.batch, x.dtype)


def _unsqueeze(p: _Program, out: Tensor, x: Entries, dim: int) -> Entries:
    dim %= out.dim()
    return Entries(np.expand_dims(x.data, dim), None if x.batch is None else x.batch + (dim <= x.batch), x.dtype)


def _permute(p: _Program, out: Tensor, x: Entries, order: Sequence[int]) -> Entries:
    order = [d % x.data.ndim for d in order]
    return Entries(x.data.transpose(order), None if x.batch is None else order.index(x.batch), x.dtype)


def _transpose(p: _Program, out: Tensor, x: Entries, a: int = 0, b: int = 1) -> Entries:
    order = list(range(x.data.ndim))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permute(p, out, x, order)


def _expand(p: _Program, out: Tensor, x: Entries, *_: Any, **__: Any) -> Entries:
    batch = None if x.batch is None else x.batch + out.dim() - x.data.ndim
    return Entries(np.broadcast_to(x.data, _shape(out, batch)), batch, x.dtype)


def _view(p: _Program, out: Tensor, x: Entries, *_: Any) -> Entries:
    batch = None
    if x.batch is not None:
        before = int(np.prod(x.data.shape[: x.batch]))
        places = [i for i, n in enumerate(out.shape) if n == p.size and int(np.prod(out.shape[:i])) == before]
        if not places:
            raise _WholeError
        batch = places[0]
    shape = _shape(out, batch)
    if np.prod(shape) > LARGEST:
        raise _WholeError
    return Entries(x.data.reshape(shape), batch, x.dtype)


def _cat(p: _Program, out: Tensor, parts: Sequence[Entries], dim: int = 0) -> Entries:
    arrays, batch = p.aligned(parts, out.dim())
    dim %= out.dim()
    if dim == batch:
        raise _WholeError
    return Entries(_joined(np.concatenate, arrays, dim, [d for d in range(out.dim()) if d != dim]), batch, out.dtype)


def _stack(p: _Program, out: Tensor, parts: Sequence[Entries], dim: int = 0) -> Entries:
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
        raise _WholeError
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
    def rule(p: _Program, out: Tensor, *_: Any, **__: Any) -> Entries:
        value = torch.tensor(number, dtype=out.dtype).item()
        return Entries(np.broadcast_to(np.array(value, dtype=object), tuple(out.shape)), None, out.dtype)

    return rule


def _full(p: _Program, out: Tensor, shape: Any, number: Any, **_: Any) -> Entries:
    if not isinstance(number, (int, float)):
        raise _WholeError
    return _filled(number)(p, out)


def _scalar(p: _Program, out: Tensor, number: Any, **_: Any) -> Entries:
    return _full(p, out, (), number)


def _eye(p: _Program, out: Tensor, *_: Any, **__: Any) -> Entries:
    return _numbers(torch.eye(*out.shape, dtype=out.dtype))


def _numbers(x: Any) -> Entries:
    if not isinstance(x, Tensor) or x.numel() > LARGEST or x.is_complex():
        raise _WholeError
    return Entries(np.array(x.tolist(), dtype=object).reshape(tuple(x.shape)), None, x.dtype)


# Over the entries of a sample, one after the other.


def _reduced(p: _Program, out: Tensor, x: Entries, dims: Any, step: Callable[[Any, Any], Any]) -> Entries:
    every = range(x.data.ndim) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    axes = {d % x.data.ndim for d in every}
    rest = [d for d in range(x.data.ndim) if d not in axes]
    thin = _cut(x.data, [d for d in rest if x.data.strides[d] == 0])
    if x.batch in axes or thin.size > LARGEST:
        raise _WholeError
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
    return Entries(np.broadcast_to(data, _shape(out, batch)), batch, out.dtype)


def _by(target: Any) -> Callable[..., Entries]:
    def rule(p: _Program, out: Tensor, x: Entries, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Entries:
        if kwargs.get("dtype") is not None or x.dtype != out.dtype:
            raise _WholeError
        return _reduced(p, out, x, dim, partial(p.pair, target, out.dtype))

    return rule


def _norm(p: _Program, out: Tensor, x: Entries, order: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Entries:
    if order != 2 or x.data.size > LARGEST:
        raise _WholeError
    squares: Any = np.empty(x.data.shape, dtype=object)
    for index in np.ndindex(*x.data.shape):
        squares[index] = p.pair(aten.mul.Tensor, out.dtype, x.data[index], x.data[index])
    total = _reduced(p, out, x._replace(data=squares), dim, partial(p.pair, aten.add.Tensor, out.dtype))
    data: Any = np.empty(total.data.shape, dtype=object)
    for index in np.ndindex(*data.shape):
        e = total.data[index]
        data[index] = p.emit("sqrt.default", out.dtype, e) if isinstance(e, Op) else e**0.5
    return total._replace(data=data)


def _product(p: _Program, out: Tensor, a: Entries, b: Entries) -> Entries:
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
            raise _WholeError
    dims = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    data: Any = np.empty((*dims, x.shape[-2], y.shape[-1]), dtype=object)
    if data.size * x.shape[-1] > LARGEST:
        raise _WholeError
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


def _factored(p: _Program, out: Sequence[Tensor], a: Entries, pivot: bool = True, **_: Any) -> list[Any]:
    """LU with partial pivoting; only `_solved` can read it."""
    dtype, n = a.dtype, a.data.shape[-1]
    if not pivot or a.data.size != n * n or n * n > LARGEST:
        raise _WholeError
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
    p: _Program, out: Tensor, lu: Any, pivots: Any, b: Entries, *, left: bool = True, adjoint: bool = False
) -> Entries:
    if not isinstance(lu, _Factors) or adjoint or not left or b.data.size != b.data.shape[-2] * b.data.shape[-1]:
        raise _WholeError
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


def _exchanged(p: _Program, dtype: torch.dtype, mask: Entry, a: Entry, b: Entry) -> tuple[Entry, Entry]:
    if a is b:
        return a, b
    return p.emit("where.self", dtype, mask, b, a), p.emit("where.self", dtype, mask, a, b)


def _less(p: _Program, dtype: torch.dtype, a: Entry, factor: Entry, b: Entry) -> Entry:
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
