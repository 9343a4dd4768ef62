"""Reductions and scans. Sums over the batch axis keep samples apart where a signal asks for it (`per_sample`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import make
from dualnn.engine.generic import first, last, lasts, pushforward, pushforward_rule, register_inplace
from dualnn.engine.per_sample import reduce_batch
from dualnn.engine.registry import RULES, OpSpec, Sample, register, spellings

Rand = Callable[..., Tensor]


def _calls(rand: Rand) -> list[Sample]:
    return [
        Sample((rand(2, 3, 4),)),
        Sample((rand(2, 3, 4), 1)),
        Sample((rand(2, 3, 4), (0, -1)), {"keepdim": True}),
        Sample((rand(3), 0)),
        Sample((rand(),)),
    ]


def _sum_like(name: str, mean: bool) -> None:
    """``sum``, ``mean`` and their nan-less kin: linear, and the place where a batch axis disappears."""

    def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
        x, call, kwargs = first(func, call, kwargs)
        value = func(x._primal, *call, **kwargs)
        named = dict(zip(("dim", "keepdim"), call, strict=False)) | kwargs
        keep, tan = named.get("keepdim", False), x._tan
        if not tan.is_zero and x.ndim > 0:
            dims = lasts(named.get("dim"), x._primal)
            where = tuple(d + x.ndim for d in dims)
            tan = reduce_batch(tan, x._level, where, keep, x.ndim) or tan.map(lambda t: t.sum(dims, keepdim=keep))
            if mean:
                size = 1
                for d in dims:
                    size *= x.shape[d]
                # 1 / 0 samples: torch's mean of nothing is nan, and so is its derivative.
                tan = tan.scale(1 / size if size else float("nan"), value.shape)
        return make(value, tan, x._level)

    register(*spellings(name), rule=rule, spec=OpSpec(name, spellings(name)[0], _calls))
    register_inplace(name, rule, spellings(name))


_sum_like("sum", mean=False)
_sum_like("mean", mean=True)


@pushforward("cumsum", lambda rand: [Sample((rand(2, 3), 1)), Sample((rand(2, 3), 0))])
def _cumsum(t: Tensor, x: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return t.cumsum(last(dim, x))


@pushforward(
    "softmax",
    lambda rand: [Sample((rand(2, 3), 1)), Sample((rand(3, 2), 0)), Sample((rand(3), -1))],
    also=[torch.softmax],
)
def _softmax(t: Tensor, x: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return y * (t - (y * t).sum(last(dim, x), keepdim=True))


@pushforward("log_softmax", lambda rand: [Sample((rand(2, 3), 1)), Sample((rand(3, 2), 0))])
def _log_softmax(t: Tensor, x: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return t - (torch.exp(y) * t).sum(last(dim, x), keepdim=True)


@pushforward(
    "logsumexp", lambda rand: [Sample((rand(2, 3), 1)), Sample((rand(2, 3), (0, 1))), Sample((rand(2, 3), 0, True))]
)
def _logsumexp(t: Tensor, x: Tensor, y: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = lasts(dim, x)
    top = y if keepdim or x.dim() == 0 else _keep(y, dims)
    return (torch.exp(x - top) * t).sum(dims, keepdim=keepdim)


def _keep(y: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Put reduced dimensions (negative, of the unreduced tensor) back with size 1."""
    for d in sorted(dims, reverse=True):
        y = y.unsqueeze(d)
    return y


def _moments(x: Tensor, dim: Any, correction: float) -> tuple[Tensor, tuple[int, ...], float]:
    dims = lasts(dim, x)
    size = 1
    for d in dims:
        size *= x.shape[d]
    return x - x.mean(dims, keepdim=True), dims, size - correction


def _correction(dim: Any, unbiased: Any, correction: Any) -> float:
    """``var(x, False)`` and ``var(x, dim, False)`` both mean unbiased=False."""
    if isinstance(dim, bool):
        unbiased = dim
    if unbiased is not None:
        return 1.0 if unbiased else 0.0
    return 1.0 if correction is None else correction


_VAR = [((2, 3, 4),), ((2, 3, 4), 1), ((2, 3, 4), (0, 2), False, True)]


@pushforward("var", lambda rand: [Sample((rand(*s), *a)) for s, *a in _VAR], holomorphic=False)
def _var(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    centred, dims, free = _moments(x, None if isinstance(dim, bool) else dim, _correction(dim, unbiased, correction))
    return 2 / free * (centred * t).sum(dims, keepdim=keepdim)


@pushforward("std", lambda rand: [Sample((rand(*s), *a)) for s, *a in _VAR], holomorphic=False)
def _std(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    pushed = _var(t, x, y, dim, unbiased, keepdim, correction=correction) / 2
    return torch.where(y == 0, torch.zeros_like(pushed), pushed / torch.where(y == 0, torch.ones_like(y), y))


def _norm_push(t: Tensor, x: Tensor, y: Tensor, p: float, dim: Any, keepdim: bool) -> Tensor:
    r"""d||x||_p = sum sign(x) |x|^(p-1) dx / ||x||^(p-1); torch's subgradient 0 at the origin."""
    dims = lasts(dim, x)
    top = y if keepdim or x.dim() == 0 else _keep(y, dims)
    origin = top == 0
    safe = torch.where(origin, torch.ones_like(top), top)
    if p == float("inf") or p == float("-inf"):
        hit = (x.abs() == top).to(x.dtype)
        weight = hit * torch.sign(x) / hit.sum(dims, keepdim=True)
    elif p == 2:
        weight = x / safe
    elif p == 0:
        weight = torch.zeros_like(x)
    elif p == 1:
        weight = torch.sign(x)
    else:
        zero = x == 0
        base = torch.where(zero, torch.ones_like(x), x.abs())
        weight = torch.where(zero, torch.zeros_like(x), torch.sign(x) * (base / safe) ** (p - 1))
    weight = torch.where(origin, torch.zeros_like(weight), weight)
    return (weight * t).sum(dims, keepdim=keepdim)


@pushforward(
    "linalg_vector_norm",
    lambda rand: [
        Sample((rand(2, 3),)),
        Sample((rand(2, 3), 3, 1)),
        Sample((rand(2, 3), 1, 0, True)),
        Sample((rand(2, 3), float("inf"))),
    ],
    functions=[torch.linalg.vector_norm],
    holomorphic=False,
)
def _vector_norm(
    t: Tensor, x: Tensor, y: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    return _norm_push(t, x, y, ord, dim, keepdim)


def _vf_norm(t: Tensor, x: Tensor, y: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    return _norm_push(t, x, y, 2.0 if p is None else float(p), dim, keepdim)


pushforward("norm_kernel", None, functions=[torch._VF.norm], holomorphic=False)(_vf_norm)


def _pick(t: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of the directions at the positions an index-valued op chose."""
    return t.gather(dim, index.expand(t.shape[0], *index.shape))


def _extremum(name: str) -> None:
    """``max`` and ``min``: of everything (ties shared), along a dimension (the chosen index), or of two tensors."""
    pairwise = getattr(torch, name + "imum")

    def push(t: Tensor, x: Tensor, y: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            if x.dim() == 0:
                return t
            hit = (x == y).to(t.dtype)
            return (t * (hit / hit.sum())).flatten(1).sum(1)
        if x.dim() == 0:
            return t, None
        d = last(dim, x)
        chosen = _pick(t, y[1] if keepdim else y[1].unsqueeze(d), d)
        return (chosen if keepdim else chosen.squeeze(d)), None

    single = pushforward_rule(push)

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        if "other" in kwargs or any(isinstance(x, Tensor) for x in args[1:]):
            return RULES[pairwise](pairwise, args, kwargs)
        return single(func, args, kwargs)

    samples = [((2, 3),), ((2, 3), 1), ((2, 3), 0, True)]
    spec = OpSpec(name, getattr(torch, name), lambda rand: [Sample((rand(*s), *a)) for s, *a in samples])
    register(*spellings(name), rule=rule, spec=spec)


_extremum("max")
_extremum("min")


def _ordered(name: str, *calls: tuple, default: int = -1) -> None:
    """Ops that return values and their positions along a dimension: tangents follow the positions."""

    def push(t: Tensor, x: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(ORDER[name], args, strict=False)) | kwargs
        if x.dim() == 0:
            return t, None
        d = last(int(named.get("dim", default)), x)
        return _pick(t, y[1], d), None

    pushforward(name, lambda rand: [Sample((rand(*s), *a)) for s, *a in calls])(push)


ORDER = {
    "sort": ("dim", "descending"),
    "topk": ("k", "dim", "largest", "sorted"),
    "cummax": ("dim",),
    "cummin": ("dim",),
}
_ordered("sort", ((2, 3),), ((2, 3), 0, True))
_ordered("topk", ((2, 5), 2), ((5, 2), 2, 0))
_ordered("cummax", ((2, 5), 1))
_ordered("cummin", ((2, 5), 1))


def _extreme_values(name: str) -> None:
    """``amax`` and ``amin``: ties share the derivative equally, as in torch."""

    def push(t: Tensor, x: Tensor, y: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        dims = lasts(dim, x)
        top = y if keepdim or x.dim() == 0 else _keep(y, dims)
        hit = (x == top).to(t.dtype)
        return (t * (hit / hit.sum(dims, keepdim=True))).sum(dims, keepdim=keepdim)

    pushforward(name, lambda rand: [Sample((rand(2, 3), 1)), Sample((rand(2, 3, 2), (0, 2), True))])(push)


_extreme_values("amax")
_extreme_values("amin")


def _aminmax(func: Callable, args: tuple, kwargs: dict) -> Any:
    x, call, kwargs = first(func, args, kwargs)
    named = dict(zip(("dim", "keepdim"), call, strict=False)) | kwargs
    dim = named.get("dim")
    reduced, keep = () if dim is None else dim, named.get("keepdim", False)
    return torch.return_types.aminmax((torch.amin(x, reduced, keep), torch.amax(x, reduced, keep)))


register(
    *spellings("aminmax"),
    rule=_aminmax,
    spec=OpSpec(
        "aminmax", torch.aminmax, lambda rand: [Sample((rand(2, 3),), {"dim": 1}), Sample((rand(3),))], reverse=False
    ),
)
