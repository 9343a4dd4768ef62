"""Functions of two tensors with broadcasting: each is its two partial derivatives."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.generic import binary, operands
from dualnn.engine.registry import Rule, Sample, register
from dualnn.engine.scaled import selected
from dualnn.engine.scaling import surely_finite
from dualnn.engine.tangents import Tangent, aligned

Pair = Callable[[Callable, Any, Any, dict], Any]


def _pow_base(a: Any, b: Any, y: Tensor) -> Any:
    if isinstance(b, Tensor):
        return torch.where(b == 0, torch.zeros((), dtype=y.dtype), b * a ** (b - 1))
    return 0.0 if b == 0 else b * a ** (b - 1)


def _pow_exponent(a: Any, b: Any, y: Tensor) -> Any:
    if y.is_complex():
        return y * torch.log(torch.as_tensor(a, dtype=y.dtype, device=y.device))
    if not isinstance(a, Tensor):
        return y * math.log(a) if a > 0 else torch.where(b >= 0, torch.zeros_like(y), torch.full_like(y, math.nan))
    # 0**b is 0 for every b > 0, so its derivative in b is 0; log(0) must not be formed.
    zero = (a == 0) & (b >= 0)
    return torch.where(zero, torch.zeros_like(y), y * torch.log(torch.where(zero, torch.ones_like(a), a)))


def _larger(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return (a > b).to(y.dtype) + 0.5 * (a == b).to(y.dtype)  # ties are shared, as in torch


def _smaller(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return (a < b).to(y.dtype) + 0.5 * (a == b).to(y.dtype)


def _quotient(a: Any, b: Any, y: Tensor, rounding_mode: str | None = None) -> Any:
    return 1 / b if rounding_mode is None else 0.0


def _quotient_tangent(ta: Tangent, tb: Tangent, inverse: Tensor, y: Tensor) -> Tangent | None:
    """(da - y db) / b: one product less than da / b - (y / b) db."""
    if not (surely_finite(inverse) and surely_finite(y)):
        return None
    return ta.joined(1.0, tb, -y, y.shape).delayed(inverse, y.shape)


ADD = binary(
    "add",
    lambda a, b, y, alpha=1: 1.0,
    lambda a, b, y, alpha=1: float(alpha),
    also=[Tensor.__add__, Tensor.__radd__],
    also_inplace=[Tensor.__iadd__],
    numbers=True,
)
SUB = binary(
    "sub",
    lambda a, b, y, alpha=1: 1.0,
    lambda a, b, y, alpha=1: -float(alpha),
    also=[torch.subtract, Tensor.subtract, Tensor.__sub__],
    also_inplace=[Tensor.__isub__],
    numbers=True,
)
MUL = binary(
    "mul",
    lambda a, b, y: b,
    lambda a, b, y: a,
    also=[torch.multiply, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__],
    also_inplace=[Tensor.__imul__],
    numbers=True,
)
DIV = binary(
    "div",
    _quotient,
    lambda a, b, y, rounding_mode=None: -y / b if rounding_mode is None else 0.0,
    low=0.5,
    singular=True,
    joint=_quotient_tangent,
    also=[torch.divide, torch.true_divide, Tensor.divide, Tensor.true_divide, Tensor.__div__, Tensor.__truediv__],
    also_inplace=[Tensor.__itruediv__, Tensor.__idiv__],
)
POW = binary(
    "pow",
    _pow_base,
    _pow_exponent,
    low=0.3,
    singular=True,
    also_inplace=[Tensor.__ipow__],
    also=[torch.float_power, Tensor.float_power],
)
binary("maximum", _larger, lambda a, b, y: _larger(b, a, y), also=[torch.fmax, Tensor.fmax])
binary("minimum", _smaller, lambda a, b, y: _smaller(b, a, y), also=[torch.fmin, Tensor.fmin])
binary(
    "atan2",
    lambda a, b, y: b / (a * a + b * b),
    lambda a, b, y: -a / (a * a + b * b),
    low=0.3,
    singular=True,
    also=[torch.arctan2, Tensor.arctan2],
)
binary("hypot", lambda a, b, y: a / y, lambda a, b, y: b / y, low=0.3, singular=True)
binary("logaddexp", lambda a, b, y: torch.exp(a - y), lambda a, b, y: torch.exp(b - y))
binary("xlogy", lambda a, b, y: torch.log(b), lambda a, b, y: a / b, low=0.3, singular=True)
binary("remainder", lambda a, b, y: 1.0, lambda a, b, y: -torch.floor(a / b), low=0.6, high=0.9, also=[Tensor.__mod__])
# Not torch's own: its derivative for integer exponents is zero below 0 on some releases (2.0 ** -3 in integers).
binary("ldexp", lambda a, b, y: torch.exp2(torch.as_tensor(b, dtype=y.dtype)), lambda a, b, y: y * math.log(2))
binary("copysign", lambda a, b, y: torch.sign(a) * torch.sign(y), lambda a, b, y: 0.0, low=0.2)


def _rsub(input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    return other - (input if alpha == 1 else alpha * input)


def _swapped(pair: Pair, plain: Callable) -> Rule:
    """The rule of ``rsub``-like methods: the first argument is the right operand."""

    def reflected(func: Callable, args: tuple, kwargs: dict) -> Any:
        return pair(plain, args[1], args[0], kwargs)

    return reflected


register(torch.rsub, rule=lambda func, args, kwargs: _rsub(*args, **kwargs))
register(Tensor.__rsub__, rule=_swapped(SUB, operator.sub))
register(Tensor.__rtruediv__, Tensor.__rdiv__, rule=_swapped(DIV, operator.truediv))
register(Tensor.__rpow__, rule=_swapped(POW, operator.pow))
register(Tensor.__pow__, rule=lambda func, args, kwargs: POW(operator.pow, args[0], args[1], kwargs))


def _where_samples(rand: Callable[..., Tensor]) -> list[Sample]:
    mask = torch.tensor([True, False, True])
    return [Sample((mask, rand(2, 3), rand(2, 3))), Sample((mask, rand(3), rand(2, 1))), Sample((mask, rand(), 1.0))]


@operands("where", _where_samples, functions=[torch.where])
def _where(y: Tensor, t: dict, condition: Tensor, input: Tensor, other: Tensor) -> Tangent:
    # Selects tangents, never multiplies by a mask: an infinite derivative in the branch not taken stays out.
    first, second = t["input"], t["other"]
    if (first is not None and first.waits) or (second is not None and second.waits):
        tan = selected(condition, first, second, y.shape)
        if tan is not None:
            return tan
    none = torch.zeros((), dtype=y.dtype, device=y.device)

    def full(tan: Tangent | None) -> Tensor:
        return none if tan is None else aligned(tan.dense(), y.dim())

    present: Tangent = first or second  # type: ignore[assignment]
    return present.map(lambda _: torch.where(condition, full(first), full(second)).expand(-1, *y.shape))


register(Tensor.where, rule=lambda func, args, kw: _where_method(*args, **kw))


def _where_method(self: Tensor, condition: Tensor, other: Any) -> Tensor:
    return torch.where(condition, self, other)


@operands("lerp", lambda rand: [Sample((rand(2, 3), rand(2, 3), rand(2, 3))), Sample((rand(3), rand(3), 0.3))])
def _lerp(y: Tensor, t: dict, input: Tensor, end: Tensor, weight: Any) -> Tangent | None:
    parts = [(t["input"], 1 - weight), (t["end"], weight), (t["weight"], end - input)]
    return _sum_scaled(parts, y)


@operands("addcmul", lambda rand: [Sample((rand(2, 3), rand(3), rand(2, 1)), {"value": 0.7})])
def _addcmul(
    y: Tensor, t: dict, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tangent | None:
    return _sum_scaled([(t["input"], 1.0), (t["tensor1"], value * tensor2), (t["tensor2"], value * tensor1)], y)


@operands("addcdiv", lambda rand: [Sample((rand(2, 3), rand(3), rand(2, 1, low=0.5)), {"value": 0.7})])
def _addcdiv(
    y: Tensor, t: dict, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tangent | None:
    slope = value / tensor2
    return _sum_scaled([(t["input"], 1.0), (t["tensor1"], slope), (t["tensor2"], -slope * tensor1 / tensor2)], y)


def _sum_scaled(parts: list[tuple[Tangent | None, Any]], y: Tensor) -> Tangent | None:
    """Sum of tangents times their factors."""
    out: Tangent | None = None
    for tan, factor in parts:
        if tan is not None:
            term = tan.scale(factor, y.shape)
            out = term if out is None else out.plus(term)
    return out


def _operator(pair: Pair, plain: Callable, swap: bool = False) -> Callable:
    """A Python operator of DualTensor that skips the C dispatcher (about 1 us an op)."""

    def forward(self: DualTensor, other: Any) -> Any:
        return pair(plain, self, other, {})

    def reflected(self: DualTensor, other: Any) -> Any:
        return pair(plain, other, self, {})

    return reflected if swap else forward


def _operators() -> None:
    # operator.add and not torch.add: the left operand may be a Python number.
    for name, pair in (("add", ADD), ("sub", SUB), ("mul", MUL), ("truediv", DIV), ("pow", POW)):
        plain = getattr(operator, name)
        setattr(DualTensor, f"__{name}__", _operator(pair, plain))
        setattr(DualTensor, f"__r{name}__", _operator(pair, plain, swap=True))


_operators()
