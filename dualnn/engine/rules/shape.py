"""Linear ops that move entries without mixing them: views, permutations, copies, joins and splits.

Each is torch's own op applied to the directions; dimensions count from the end so that the K axis stays in front.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, count, make, split, top_level
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.generic import every, last, lasts, pushforward
from dualnn.engine.registry import Sample, register, unsupported
from dualnn.engine.tangents import PerSample, Zero, aligned

Rand = Callable[..., Tensor]


def _samples(*calls: tuple) -> Callable[[Rand], list[Sample]]:
    """Samples from ``(shape, *args)`` tuples."""
    return lambda rand: [Sample((rand(*shape), *args), constant=(1,)) for shape, *args in calls]


def _by_result(t: Tensor, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    """Ops that keep the order of entries: the result's shape says it all."""
    if y.dtype != x.dtype:
        raise UnsupportedOpError(f"a dual of {x.dtype} cannot be reinterpreted as {y.dtype}: convert it with .to()")
    return t.reshape(t.shape[0], *y.shape)


for _name, _calls in {
    "view": [((2, 6), 3, 4), ((2, 6), (-1,))],
    "reshape": [((2, 6), (3, -1)), ((0, 3), (3, 0))],
    "view_as": [((2, 3), torch.zeros(6))],
    "reshape_as": [((2, 3), torch.zeros(6))],
    "flatten": [((2, 3, 4), 1), ((),)],
    "ravel": [((2, 3),)],
    "unflatten": [((2, 6), 1, (2, 3))],
    "squeeze": [((2, 1, 3), 1), ((1, 2, 1),), ((2, 3), 0)],
    "unsqueeze": [((2, 3), 1), ((2, 3), -1), ((), 0)],
}.items():
    pushforward(_name, _samples(*_calls), view=True, like=_name.endswith("_as"))(_by_result)


def _expand(t: Tensor, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return aligned(t, y.dim()).expand(t.shape[0], *y.shape)


pushforward("expand", _samples(((3, 1), 2, 3, 4), ((), (2,))), view=True)(_expand)
pushforward("broadcast_to", _samples(((3, 1), (2, 3, 4))), view=True)(_expand)
pushforward("expand_as", _samples(((3, 1), torch.zeros(2, 3, 4))), view=True, like=True)(_expand)


def _same(t: Tensor, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return t


pushforward("clone", _samples(((2, 3),)))(_same)
pushforward("contiguous", _samples(((2, 3),)), view=True)(_same)
pushforward("alias", None, view=True)(_same)
pushforward("positive", _samples(((2, 3),)), view=True, also=[Tensor.__pos__])(_same)
for _name in ("requires_grad_", "resolve_conj", "resolve_neg"):
    pushforward(_name, None)(_same)


def _convert(t: Tensor, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return t.to(device=y.device, dtype=y.dtype)


def _conversion(func: Callable, args: tuple, kwargs: dict) -> Any:
    """``.to``, ``.float``, …: a dual stays dual in floating dtypes and becomes plain in integer ones."""
    x = args[0]
    if not isinstance(x, DualTensor):  # plain.to(dual) and plain.type_as(dual): only dtype and device are read
        other = args[1]
        return x.to(device=other.device, dtype=other.dtype)
    args = tuple(split(a, top_level(args))[0] if isinstance(a, DualTensor) else a for a in args[1:])
    value = func(x._primal, *args, **kwargs)
    if value is x._primal:  # nothing to convert: torch returns x itself, so that a later in-place op reaches x
        return x
    if not isinstance(value, Tensor):  # x.type() names the type
        return value
    if not (value.dtype.is_floating_point or value.dtype.is_complex):
        return value
    return make(value, x._tan.map(lambda t: _convert(t, x, value)), x._level)


register(
    *(
        getattr(Tensor, n)
        for n in (
            "to",
            "float",
            "double",
            "cfloat",
            "cdouble",
            "chalf",
            "half",
            "bfloat16",
            "type_as",
            "cpu",
            "cuda",
            "long",
            "int",
            "bool",
            "type",
            "short",
            "char",
            "byte",
        )
    ),
    rule=_conversion,
)

pushforward(
    "transpose",
    _samples(((2, 3, 4), 0, 2), ((2, 3), -1, 0)),
    view=True,
    also=[torch.swapaxes, torch.swapdims, Tensor.swapaxes, Tensor.swapdims],
)(lambda t, x, y, dim0, dim1: t.transpose(last(dim0, x), last(dim1, x)) if x.dim() else t)
pushforward("t", _samples(((2, 3),), ((3,),)), view=True)(lambda t, x, y: t.transpose(-1, -2) if x.dim() == 2 else t)
pushforward(
    "movedim",
    _samples(((2, 3, 4), 0, 2), ((2, 3, 4), (0, 1), (1, 0))),
    view=True,
    also=[torch.moveaxis, Tensor.moveaxis],
)(lambda t, x, y, source, destination: t.movedim(lasts(source, x), lasts(destination, x)))


@pushforward("permute", _samples(((2, 3, 4), (2, 0, 1)), ((2, 3, 4), (-1, 0, 1))), view=True)
def _permute(t: Tensor, x: Tensor, y: Tensor, *dims: Any) -> Tensor:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return t.permute(0, *(d % x.dim() + 1 for d in order))


def _transposed(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return t.permute(0, *range(x.dim(), 0, -1))


def _swap_last(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return t.transpose(-1, -2)


for _getter, _push in ((Tensor.T, _transposed), (Tensor.mT, _swap_last)):
    pushforward(f"get.{_getter.__name__}", None, functions=[_getter.__get__], view=True)(_push)


def _varargs(given: tuple) -> Any:
    """``x.op(1, 2)`` and ``x.op((1, 2))`` mean the same."""
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


pushforward("flip", _samples(((2, 3), (0,)), ((2, 3), (0, -1))))(
    lambda t, x, y, *given, dims=None: t.flip(
        [last(d, x) for d in _varargs(given if dims is None else (dims,)) if x.dim()]
    )
)


@pushforward("roll", _samples(((2, 3), 1, 0), ((2, 3), 2), ((2, 3), (1, 2), (0, 1))))
def _roll(t: Tensor, x: Tensor, y: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    if dims is None or dims == () or x.dim() == 0:
        return t.reshape(t.shape[0], -1).roll(shifts, -1).reshape(t.shape)
    return t.roll(shifts, lasts(dims, x))


for _name in ("tril", "triu"):
    pushforward(_name, _samples(((3, 3),), ((2, 3, 4), 1)))(
        lambda t, x, y, diagonal=0, name=_name: getattr(torch, name)(t, diagonal)
    )
pushforward("diagonal", _samples(((3, 4),), ((2, 3, 3), 1, 1, 2)), view=True)(
    lambda t, x, y, offset=0, dim1=0, dim2=1: t.diagonal(offset, last(dim1, x), last(dim2, x))
)
pushforward("diag_embed", _samples(((2, 3),)))(
    lambda t, x, y, offset=0, dim1=-2, dim2=-1: torch.diag_embed(t, offset, last(dim1, y), last(dim2, y))
)
pushforward("diag", _samples(((3,),), ((3, 3), 1)))(
    lambda t, x, y, diagonal=0: torch.diag_embed(t, diagonal) if x.dim() == 1 else t.diagonal(diagonal, -2, -1)
)
pushforward("repeat", _samples(((2, 3), 2, 2), ((3,), (2, 1))))(
    lambda t, x, y, *n: aligned(t, y.dim()).repeat(1, *(n[0] if isinstance(n[0], (tuple, list)) else n))
)
pushforward("tile", _samples(((2, 3), (2,)), ((3,), (2, 1))))(
    lambda t, x, y, *n: every(t, lambda d: d.tile(*n), y.shape)
)
pushforward("repeat_interleave", _samples(((2, 3), 2, 0), ((2, 3), 2)))(
    lambda t, x, y, repeats, dim=None, output_size=None: every(
        t, lambda d: d.repeat_interleave(repeats, dim, output_size=output_size), y.shape
    )
)

pushforward("narrow", _samples(((2, 5), 1, 1, 3)), view=True)(
    lambda t, x, y, dim, start, length: t.narrow(last(dim, x), start, length)
)
pushforward("select", _samples(((2, 5), 1, -1)), view=True)(lambda t, x, y, dim, index: t.select(last(dim, x), index))
pushforward("unbind", _samples(((2, 3), 1), ((2, 3),)), view=True)(lambda t, x, y, dim=0: t.unbind(last(dim, x)))
pushforward("chunk", _samples(((4, 3), 2), ((3, 5), 2, 1)), view=True)(
    lambda t, x, y, chunks, dim=0: t.chunk(chunks, last(dim, x))
)
pushforward("split", _samples(((5, 3), 2), ((3, 5), [2, 3], 1)), view=True, also=[torch.functional.split])(
    lambda t, x, y, split_size, dim=0: t.split(split_size, last(dim, x))
)
for _name in ("split_with_sizes", "tensor_split"):
    pushforward(_name, _samples(((5, 3), (2, 3))), view=True)(
        lambda t, x, y, sizes, dim=0, name=_name: getattr(t, name)(sizes, dim=last(dim, x))
    )
pushforward("unfold", _samples(((2, 6), 1, 3, 2)), functions=[Tensor.unfold], view=True)(
    lambda t, x, y, dim, size, step: t.unfold(last(dim, x), size, step)
)


@pushforward(
    "pad",
    _samples(
        ((2, 3), (1, 2)),
        ((2, 3), (1, 0, 0, 2), "constant", 5.0),
        ((1, 2, 5), (2, 1), "reflect"),
        ((1, 2, 5), (2, 1), "circular"),
    ),
)
def _pad(t: Tensor, x: Tensor, y: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    if mode == "constant":
        return F.pad(t, pad)
    return every(t, lambda d: F.pad(d, pad, mode), y.shape)


def _join(func: Callable, args: tuple, kwargs: dict) -> Any:
    """``cat``, ``stack`` and their kin: operands without a tangent join with zeros."""
    kwargs = dict(kwargs)
    if kwargs.pop("out", None) is not None:
        raise unsupported(func, "has no dual rule with out=")
    tensors = list(args[0] if args else kwargs.pop("tensors"))
    if func not in (torch.stack,):  # torch skips empty vectors among tensors of other shapes
        tensors = [x for x in tensors if x.shape != (0,)] or tensors
    dim = args[1] if len(args) > 1 else kwargs.pop("dim", kwargs.pop("axis", 0))
    level = top_level(tensors)
    num = count(level, tensors)
    parts = [split(x, level) for x in tensors]
    value = func([p for p, _ in parts], dim, **kwargs)
    tangents = [t for _, t in parts if t is not None]
    if not tangents:
        return make(value, Zero(num), level)
    if any(isinstance(t, PerSample) for t in tangents):
        # plus() is where tangents of different kinds are told apart; the kind must agree here too.
        tangents[0].plus(tangents[-1]) if len({type(t) for t in tangents}) > 1 else None
    dense = [_zeros(p, num, value) if t is None else t.dense() for p, t in parts]
    joined = func(dense, last(dim, value), **kwargs)
    return make(value, tangents[0].map(lambda _: joined), level)


def _zeros(x: Tensor, num: int, like: Tensor) -> Tensor:
    return torch.zeros((num, *x.shape), dtype=like.dtype, device=like.device)


register(torch.cat, torch.concat, torch.concatenate, torch.stack, rule=_join)


def _at_least(view: Callable) -> Callable:
    """``atleast_nd`` of one tensor, of several, or of a list of them."""

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        tensors = args[0] if len(args) == 1 else args
        if isinstance(tensors, Tensor):
            return view(tensors)
        return tuple(view(x) for x in tensors)

    return rule


register(
    torch.atleast_1d,
    torch.functional.atleast_1d,
    torch._VF.atleast_1d,
    rule=_at_least(lambda x: x if x.dim() else x.reshape(1)),
)
register(
    torch.atleast_2d,
    torch.functional.atleast_2d,
    torch._VF.atleast_2d,
    rule=_at_least(lambda x: x if x.dim() > 1 else x.reshape(1, -1)),
)
