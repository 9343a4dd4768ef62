"""Indexing: reading, gathering and writing entries, by position, index tensor or mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.by_parts import of_kind, samples_of
from dualnn.engine.dual_tensor import DualTensor, count, make, primal_of, split, top_level
from dualnn.engine.generic import every, last, operands, pushforward
from dualnn.engine.inplace import write
from dualnn.engine.registry import OpSpec, Sample, register, unsupported
from dualnn.engine.tangents import Dense, Tangent, Zero, aligned
from dualnn.engine.views import link_view, shows

Rand = Callable[..., Tensor]


def _index_tuple(index: Any) -> tuple:
    if isinstance(index, tuple):
        return index
    return (index,)


def _leads(index: tuple) -> bool:
    """Whether prefixing a full slice keeps the meaning: at most one tensor or list among the indices."""
    return sum(isinstance(i, (Tensor, list)) for i in index) <= 1


def _read(t: Tensor, index: tuple, shape: torch.Size) -> Tensor:
    if _leads(index):
        return t[(slice(None), *index)]
    return every(t, lambda d: d[index], shape)


def _getitem(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, index = args
    index = _index_tuple(index)
    if not isinstance(x, DualTensor):
        # A plain tensor indexed by duals would be indexed by floats: let torch say so on the values.
        return x[tuple(primal_of(i) for i in index)]
    index = tuple(primal_of(i) for i in index)
    value = x._primal[index]
    out = make(value, x._tan.map(lambda t: _read(t, index, value.shape)), x._level)
    if not any(isinstance(i, (Tensor, list)) for i in index):
        link_view(x, out)
    return out


def _read_samples(rand: Rand) -> list[Sample]:
    mask = torch.tensor([True, False, True])
    rows, cols = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    indices = [
        0,
        (slice(None), 1),
        (..., None, -1),
        mask,
        rows,
        (rows, cols),
        (0, slice(None), rows[:2] // 2),
        (rows, slice(None), cols),
        [0, 1],
        (slice(0, 3, 2),),
        (None, rows),
    ]
    return [Sample((rand(3, 3, 3), i)) for i in indices]


register(Tensor.__getitem__, rule=_getitem, spec=OpSpec("getitem", Tensor.__getitem__, _read_samples))


def _setitem(func: Callable, args: tuple, kwargs: dict) -> None:
    x, index, value = args
    if not isinstance(x, DualTensor):
        write(x, value, func)
    index = _index_tuple(index)
    if shows(x, index, value):
        return  # the last step of x[i] += v: value is the view x[i], and already holds the sum
    write(x, _written(x, index, value), func)


def _written(x: DualTensor, index: tuple, value: Any) -> DualTensor:
    """A copy of ``x`` with ``value`` at ``index``."""
    index = tuple(primal_of(i) for i in index)
    level = x._level
    if top_level((value,)) > level:
        return value  # write() explains
    new, tv = split(value, level)
    primal = _holding(x._primal.clone(), new)
    primal[index] = new
    if x._tan.is_zero and tv is None:
        return make(primal, x._tan, level)
    num = count(level, (x, value))
    batch = samples_of(x._tan, tv)
    tangent = (torch.zeros((num, *x.shape), dtype=x.dtype, device=x.device) if x._tan.is_zero else x.tangent).clone()
    if tv is None:
        fill: Tensor = torch.zeros((), dtype=x.dtype, device=x.device).expand(num)
    else:
        fill = aligned(tv.dense(), x._primal[index].dim())
    if _leads(index):
        tangent = _holding(tangent, fill)
        tangent[(slice(None), *index)] = fill.reshape(num, *(1,) * x._primal[index].dim()) if tv is None else fill
    else:
        rows = [_holding(tangent[k].clone(), fill) for k in range(num)]
        for k, row in enumerate(rows):
            row[index] = fill[k]
        tangent = torch.stack(rows)
    return make(primal, of_kind(tangent, batch), level)


def _holding(x: Tensor, value: Any) -> Tensor:
    """``x``, made a dual of the value's level if it is not one, so that the value can be written into it."""
    level = top_level((value,))
    return x if level <= top_level((x,)) else make(x, Zero(value._tan.num), level)


register(Tensor.__setitem__, rule=_setitem)

pushforward("index_select", lambda r: [Sample((r(3, 4), 1, torch.tensor([0, 3, 3])))])(
    lambda t, x, y, dim, index: t.index_select(last(dim, x) % t.dim(), index.reshape(-1))
)
pushforward("gather", lambda r: [Sample((r(3, 4), 1, torch.tensor([[0], [3], [1]])))])(
    lambda t, x, y, dim, index, sparse_grad=False: t.gather(last(dim, x), _for_each(t, index))
)
pushforward("take_along_dim", lambda r: [Sample((r(3, 4), torch.tensor([[0], [3], [1]]), 1))])(
    lambda t, x, y, index, dim=None: every(t, lambda d: d.take_along_dim(index, dim), y.shape)
)
pushforward("masked_select", lambda r: [Sample((r(3, 4), torch.eye(3, 4) > 0))])(
    lambda t, x, y, mask: every(t, lambda d: d.masked_select(mask), y.shape)
)


@operands(
    "masked_fill", lambda r: [Sample((r(3, 4), torch.eye(3, 4) > 0, 1.5)), Sample((r(3, 4), torch.eye(3, 4) > 0, r()))]
)
def _masked_fill(y: Tensor, t: dict, input: Tensor, mask: Tensor, value: Any) -> Tangent | None:
    kept = t["input"]
    if t["value"] is None:
        return kept.map(lambda d: aligned(d, y.dim()).expand(-1, *y.shape).masked_fill(mask, 0.0))
    filled = t["value"].scale(mask.to(y.dtype), y.shape)
    if kept is None:
        return filled
    return kept.map(lambda d: aligned(d, y.dim()).expand(-1, *y.shape).masked_fill(mask, 0.0)).plus(filled)


@operands("embedding", lambda r: [Sample((r(5, 3), torch.tensor([[0, 4], [2, 2]])))], functions=[torch.embedding])
def _embedding(
    y: Tensor,
    t: dict,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tangent | None:
    # padding_idx only freezes the row in torch's backward; its derivative in the value is not zero.
    keep = (indices != padding_idx).unsqueeze(-1) if padding_idx >= 0 else None
    tan = t["weight"].map(lambda d: d[:, indices])
    return tan if keep is None else tan.scale(keep.to(y.dtype), y.shape)


@operands("scatter", lambda r: [Sample((r(3, 4), 1, torch.tensor([[0], [3], [1]]), r(3, 1)))])
def _scatter(y: Tensor, t: dict, input: Tensor, dim: int, index: Tensor, src: Any, *, reduce: Any = None) -> Any:
    if reduce is not None:
        raise unsupported(torch.scatter, "has no dual rule with reduce=")
    return _scattered(y, t, input, dim, index, src, torch.scatter)


@operands("scatter_add", lambda r: [Sample((r(3, 4), 1, torch.tensor([[0], [3], [1]]), r(3, 1)))])
def _scatter_add(y: Tensor, t: dict, input: Tensor, dim: int, index: Tensor, src: Any) -> Any:
    return _scattered(y, t, input, dim, index, src, torch.scatter_add)


def _for_each(t: Tensor, index: Tensor) -> Tensor:
    """An index of each direction; a 0-dim one counts as one of a single entry."""
    return index.reshape(index.shape or (1,)).expand(t.shape[0], *(index.shape or (1,)))


def _scattered(y: Tensor, t: dict, input: Tensor, dim: int, index: Tensor, src: Any, op: Callable) -> Tangent:
    num = (t["input"] or t["src"]).num

    def dense(tan: Tangent | None, shape: Any) -> Tensor:
        return torch.zeros((num, *shape), dtype=y.dtype, device=y.device) if tan is None else tan.dense()

    source = dense(t["src"], src.shape if isinstance(src, Tensor) else index.shape)
    base = dense(t["input"], input.shape)
    if input.dim() == 0 or index.dim() == 0:
        return Dense(
            every(torch.stack([base, source.reshape(base.shape)], 1), lambda d: op(d[0], dim, index, d[1]), y.shape)
        )
    return Dense(op(base, last(dim, input), index.expand(num, *index.shape), source))
