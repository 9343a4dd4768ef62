"""Generic rules: most ops are one line of data handed to one of these.

====================  ==========================================================================================
`elementwise`         y_i = f(x_i): its derivative
`binary`              y = f(a, b) with broadcasting: its two partial derivatives
`pushforward`         any op of one tensor: how its directions move
`operands`            any op of several tensors: the same, with a tangent (or None) for each
`plain`               an op whose result carries no derivative (comparisons, argmax): applied to the values
====================  ==========================================================================================

All of them apply torch's own op to the value, so values are equal bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.dual_tensor import DualTensor, count, make, primal_of, split, top_level
from dualnn.engine.inplace import inplace_of
from dualnn.engine.registry import OpSpec, Rule, Sample, SampleMaker, register, spellings, unsupported
from dualnn.engine.scaling import number
from dualnn.engine.tangents import Tangent, Zero
from dualnn.engine.views import link_view

KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}


def elementwise(
    name: str,
    derivative: Callable[..., Tensor | float],
    *,
    low: float = -2.0,
    high: float = 2.0,
    args: tuple = (),
    singular: bool = False,
    smooth: bool = True,
    flat: bool = False,
    holomorphic: bool = True,
    also: Iterable[Callable] = (),
) -> None:
    """Register y_i = f(x_i).

    Args:
        name: The op's name in torch.
        derivative: ``derivative(x, y, *args, **kwargs)``, plain differentiable torch code.
        low: Lower end of the domain from which samples are drawn.
        high: Upper end.
        args: Further arguments for the sample.
        singular: The derivative may be infinite at a finite point.
        smooth: False where the op has kinks in the sampled domain (samples avoid none of them).
        flat: The derivative is zero almost everywhere: results are structural zeros.
        holomorphic: False where the function of a complex number has no complex derivative: then torch's reverse mode
            gives the directions.
        also: More spellings.
    """

    def rule(func: Callable, call: tuple, kwargs: dict) -> DualTensor:
        if kwargs or len(call) != 1:
            x, call, kwargs = first(func, call, kwargs)
        else:
            (x,), call = call, ()
        primal, tan = x._primal, x._tan
        if not holomorphic and primal.dtype.is_complex:
            return reverse_rule(func, (x, *call), kwargs)
        value = func(primal, *call, **kwargs)
        if flat:
            return make(value, Zero(tan.num), x._level)
        if tan.is_zero:
            return make(value, tan, x._level)
        factor = derivative(primal, value, *call, **kwargs)
        return make(value, tan.scale(factor, value.shape, singular), x._level)

    functions = [*spellings(name), *also]

    def samples(rand: Callable[..., Tensor]) -> Iterable[Sample]:
        for shape in ((3, 4), (), (0, 2)):
            yield Sample((rand(*shape, low=low, high=high), *args))

    register(*functions, rule=rule, spec=OpSpec(name, functions[0], samples, smooth=smooth, flat=flat))
    register_inplace(name, rule, functions)


def binary(
    name: str,
    d_first: Callable[..., Tensor | float],
    d_second: Callable[..., Tensor | float],
    *,
    low: float = -2.0,
    high: float = 2.0,
    singular: bool = False,
    smooth: bool = True,
    also: Iterable[Callable] = (),
    also_inplace: Iterable[Callable] = (),
    joint: Callable[..., Tangent | None] | None = None,
    numbers: bool = False,
) -> Callable[[Callable, Any, Any, dict], DualTensor]:
    """Register y = f(a, b) with broadcasting; either operand may be a number.

    Args:
        name: The op's name in torch.
        d_first: ``d_first(a, b, y, **kwargs)``, the partial derivative in a.
        d_second: The same in b.
        low: Lower end of the sampled domain.
        high: Upper end.
        singular: A partial may be infinite at a finite point.
        smooth: False where the op has kinks.
        also: More spellings.
        also_inplace: More in-place spellings.
        joint: ``joint(ta, tb, fa, y)``: the tangent of two dual operands, where it is cheaper than the two terms
            (``fa`` is the partial in a); None where it does not apply.
        numbers: A Python number may be replaced by a 0-dim tensor, with which torch computes the same in half the time.

    Returns:
        ``pair(func, a, b, kwargs)``: what the rule does once it has sorted its arguments.
    """

    def rule(func: Callable, call: tuple, kwargs: dict) -> DualTensor:
        return pair(func, *(both(func, call, kwargs) if kwargs or len(call) != 2 else (*call, kwargs)))

    def pair(func: Callable, a: Any, b: Any, kwargs: dict) -> DualTensor:
        above = a._level if isinstance(a, DualTensor) else 0
        below = b._level if isinstance(b, DualTensor) else 0
        level = above if above > below else below
        if level == 0:
            raise unsupported(func, "got a dual in an argument that it does not differentiate")
        pa, pb, ta, tb = a, b, None, None
        if above == level:
            pa, ta = a._primal, a._tan
            num = ta.num
        if below == level:
            pb, tb = b._primal, b._tan
            num = tb.num
            if ta is not None and ta.num != num:
                num = count(level, (a, b))
        if not numbers or kwargs:
            value = func(pa, pb, **kwargs)
        elif type(pb) is float:
            value = func(pa, number(pb, pa))
        else:
            value = func(number(pa, pb) if type(pa) is float else pa, pb)
        if ta is None or ta.is_zero:
            if tb is None or tb.is_zero:
                return make(value, Zero(num), level)
            return make(value, tb.scale(d_second(pa, pb, value, **kwargs), value.shape, singular), level)
        fa = d_first(pa, pb, value, **kwargs)
        if tb is None or tb.is_zero:
            return make(value, ta.scale(fa, value.shape, singular), level)
        if joint is not None and not kwargs:
            tan = joint(ta, tb, fa, value)
            if tan is not None:
                return make(value, tan, level)
        fb = d_second(pa, pb, value, **kwargs)
        if a is b and not singular:  # both partials act on the same directions
            return make(value, ta.scale(fa + fb, value.shape), level)
        return make(value, ta.joined(fa, tb, fb, value.shape, singular), level)

    functions = [*spellings(name), *also]

    def samples(rand: Callable[..., Tensor]) -> Iterable[Sample]:
        def new(*shape: int) -> Tensor:
            return rand(*shape, low=low, high=high)

        yield Sample((new(3, 4), new(3, 4)))
        yield Sample((new(3, 4), new(4)))
        yield Sample((new(2, 1), new(3, 1, 4)))
        yield Sample((new(), new(3)))
        yield Sample((new(3, 4), new(3, 4)), constant=(1,))
        yield Sample((new(3, 4), new(3, 4)), constant=(0,))

    register(*functions, rule=rule, spec=OpSpec(name, functions[0], samples, smooth=smooth))
    register_inplace(name, rule, functions, also_inplace)
    return pair


def pushforward(
    name: str,
    samples: SampleMaker | None,
    *,
    also: Iterable[Callable] = (),
    view: bool = False,
    like: bool = False,
    holomorphic: bool = True,
    smooth: bool = True,
    functions: Iterable[Callable] | None = None,
) -> Callable[[Callable], Callable]:
    """Register an op of one tensor by how its directions move.

    The decorated function is called as ``push(t, x, y, *args, **kwargs)`` with dense directions ``t: (K, *x.shape)``
    and returns ``(K, *y.shape)`` (a tuple of them for a tuple result). The K axis leads, so a dimension counted from
    the end means the same in ``t`` and ``x``: `last` converts.
    """

    def decorate(push: Callable) -> Callable:
        rule = pushforward_rule(push, view, like, holomorphic)
        found = list(functions) if functions is not None else spellings(name)
        found = [*found, *also]
        spec = None if samples is None else OpSpec(name, found[0], samples, smooth=smooth)
        register(*found, rule=rule, spec=spec)
        register_inplace(name, rule, found)
        return push

    return decorate


def pushforward_rule(push: Callable, view: bool = False, like: bool = False, holomorphic: bool = True) -> Rule:
    """The rule of `pushforward`, unregistered."""

    def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
        if like:  # of the other tensor only the shape is read
            call, kwargs = (call[0], *map(under, call[1:])), {k: under(v) for k, v in kwargs.items()}
            if not isinstance(call[0], DualTensor):
                return func(*call, **kwargs)
        x, call, kwargs = first(func, call, kwargs)
        if not holomorphic and x.dtype.is_complex:  # the formula is for real numbers
            return reverse_rule(func, (x, *call), kwargs)
        value = func(x._primal, *call, **kwargs)
        if value is x._primal:  # torch returned its argument (contiguous, flatten of a vector, …): so do we
            return x

        def moved(t: Tensor) -> Any:
            try:
                return push(t, x._primal, value, *call, **kwargs)
            except ZeroDim:  # torch takes a 0-dim tensor with dim=0 for one of a single entry
                found = push(t.unsqueeze(1), x._primal.unsqueeze(0), value, *call, **kwargs)
            if isinstance(value, Tensor):
                return found.reshape(t.shape[0], *value.shape)
            return [f if f is None else f.reshape(t.shape[0], *v.shape) for f, v in zip(found, value, strict=True)]

        if isinstance(value, Tensor):
            tan = x._tan.map(moved)
            parts: list[Tensor] = [make(value, tan, x._level)]
        elif x._tan.is_zero:
            parts = [make_float(v, x._tan, x._level) for v in value]
        else:
            pushed = moved(x._tan.dense())
            tangents = [None if t is None else x._tan.map(_constantly(t)) for t in pushed]
            parts = [make_float(v, t, x._level) for v, t in zip(value, tangents, strict=True)]
        if view:
            for part in parts:
                if isinstance(part, DualTensor):
                    link_view(x, part)
        return parts[0] if isinstance(value, Tensor) else type(value)(parts)

    return rule


def _constantly(t: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: t


def operands(
    name: str,
    samples: SampleMaker | None,
    *,
    also: Iterable[Callable] = (),
    functions: Iterable[Callable] | None = None,
    smooth: bool = True,
    reverse: bool = True,
) -> Callable[[Callable], Callable]:
    """Register an op of several tensors.

    The decorated function is called as ``push(y, t, **named)``: the result, a dict of tangents (None where an operand
    has none) and every argument's value by name. Its own signature after ``y, t`` names torch's arguments in order,
    with their defaults. It returns a `Tangent` or None.
    """

    def decorate(push: Callable) -> Callable:
        parameters = list(inspect.signature(push).parameters.values())[2:]
        names = [p.name for p in parameters]
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

        def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
            named = dict(zip(names, call, strict=False))
            for key, value in kwargs.items():
                key = KEYWORDS.get(key, key)
                if key not in names:
                    raise unsupported(func, f"has no dual rule for the argument {key}=")
                named[key] = value
            level = top_level(named.values())
            values, tangents = {}, {}
            for key, operand in named.items():
                values[key], tangents[key] = split(operand, level)
            num = count(level, named.values())
            value = func(*[split(x, level)[0] for x in call], **{k: split(x, level)[0] for k, x in kwargs.items()})
            values = defaults | values
            tangents = dict.fromkeys(names) | tangents
            tan = None
            if any(t is not None for t in tangents.values()):
                tan = push(value, tangents, **values)
            return make(value, tan or Zero(num), level)

        found = list(functions) if functions is not None else spellings(name)
        found = [*found, *also]
        spec = None if samples is None else OpSpec(name, found[0], samples, smooth=smooth, reverse=reverse)
        register(*found, rule=rule, spec=spec)
        register_inplace(name, rule, found)
        return push

    return decorate


def plain(*names: str, functions: Iterable[Callable] = ()) -> None:
    """Register ops whose results carry no derivative: they read the plain values under all levels."""

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        return func(*[under(x) for x in args], **{k: under(x) for k, x in kwargs.items()})

    found = [f for name in names for f in spellings(name)] + list(functions)
    register(*dict.fromkeys(found), rule=rule)


def under(x: Any) -> Any:
    """Plain values, also inside lists and tuples."""
    if isinstance(x, (list, tuple)):
        return type(x)(under(v) for v in x)
    return primal_of(x)


def register_inplace(name: str, rule: Rule, plain_functions: list, also: Iterable[Callable] = ()) -> None:
    """Register the in-place forms (``name_``) of an op next to it."""
    found = [*spellings(name + "_"), *also]
    if found:
        register(*found, rule=inplace_of(rule, plain_functions[0]))


def first(func: Callable, call: tuple, kwargs: dict) -> tuple[DualTensor, tuple, dict]:
    """The dual first argument, the other positional ones, and keywords under torch's own names."""
    if kwargs:
        kwargs = {KEYWORDS.get(key, key): value for key, value in kwargs.items() if value is not None or key != "out"}
        if "out" in kwargs:
            raise unsupported(func, "has no dual rule with out=")
        if not call:
            call = (kwargs.pop("input", None),)
    x = call[0]
    if not isinstance(x, DualTensor) or top_level((*call[1:], *kwargs.values())) > 0:
        raise unsupported(func, "got a dual in an argument that it does not differentiate")
    return x, call[1:], kwargs


def both(func: Callable, call: tuple, kwargs: dict) -> tuple[Any, Any, dict]:
    """The two operands of a binary op, and its keywords."""
    if len(call) == 2 and not kwargs:
        return call[0], call[1], kwargs
    kwargs = dict(kwargs)
    if kwargs.pop("out", None) is not None:
        raise unsupported(func, "has no dual rule with out=")
    ordered = list(call)
    for key in ("input", "other", "exponent", "end", "weight"):
        if key in kwargs and len(ordered) < 2:
            ordered.append(kwargs.pop(key))
    if len(ordered) != 2:
        raise unsupported(func, f"has no dual rule for {len(ordered)} positional arguments")
    return ordered[0], ordered[1], kwargs


def make_float(value: Tensor, tan: Tangent | None, level: int) -> Tensor:
    """A dual from a float result; integer results (indices) stay plain."""
    continuous = value.dtype.is_floating_point or value.dtype.is_complex
    return value if tan is None or not continuous else make(value, tan, level)


def last(dim: int, x: Tensor) -> int:
    """The same dimension counted from the end, so that a leading K axis does not move it."""
    if x.dim() == 0:
        raise ZeroDim
    return dim - x.dim() if dim >= 0 else dim


class ZeroDim(Exception):
    """A 0-dim tensor has no dimension beside K: `pushforward` gives it one and tries again."""


def lasts(dim: Any, x: Tensor) -> tuple[int, ...]:
    """Dimensions counted from the end; None means all of them."""
    if x.dim() == 0:
        raise ZeroDim  # an empty tuple would mean all of the directions' dimensions, K among them
    if dim is None or (isinstance(dim, (list, tuple)) and len(dim) == 0):
        return tuple(range(-x.dim(), 0))
    if isinstance(dim, int):
        dim = (dim,)
    return tuple(last(d, x) for d in dim)


def every(t: Tensor, fn: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """Apply a linear map to each direction in turn: the way for ops that cannot take a leading axis."""
    if t.shape[0] == 0:
        return t.new_zeros((0, *shape))
    return torch.stack([fn(t[k]) for k in range(t.shape[0])])


def folded(t: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Fold K into the batch axis, apply a batched linear map once, unfold."""
    num, batch = t.shape[0], t.shape[1]
    return fn(t.flatten(0, 1)).unflatten(0, (num, batch))
