"""Elementwise functions of one tensor: each is its derivative, one line of data.

At kinks the derivative is torch's own subgradient (relu'(0) = 0, abs'(0) = 0, clamp' = 1 on its closed range).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.generic import elementwise, operands
from dualnn.engine.registry import Sample, unsupported
from dualnn.engine.scaling import one_minus_square
from dualnn.engine.tangents import Tangent

SQRT_PI = math.sqrt(math.pi)
SQRT_2PI = math.sqrt(2 * math.pi)


def _gelu(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        k = math.sqrt(2 / math.pi)
        th = torch.tanh(k * (x + 0.044715 * x**3))
        return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * k * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / SQRT_2PI


def _mish(x: Tensor, y: Tensor) -> Tensor:
    th = torch.tanh(F.softplus(x))
    return th + x * (1 - th * th) * torch.sigmoid(x)


def _silu(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _softplus(x: Tensor, y: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return torch.where(x * beta > threshold, torch.ones_like(x), torch.sigmoid(x * beta))


def _elu(x: Tensor, y: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    below = torch.exp(input_scale * x.clamp(max=0.0)) * (scale * alpha * input_scale)
    return torch.where(x > 0, scale * torch.ones_like(x), below)


def _logit(x: Tensor, y: Tensor, eps: float | None = None) -> Tensor:
    slope = 1 / (x * (1 - x))
    return slope if eps is None else torch.where((x >= eps) & (x <= 1 - eps), slope, torch.zeros_like(x))


def _polygamma_value(n: int, x: Tensor) -> Tensor:
    """Torch's polygamma(1, x) is good to 5e-10 only; zeta(2, x) to rounding, for x > 0."""
    if n != 1:
        return torch.polygamma(n, x)
    right = x > 0
    inside = torch.where(right, x, torch.ones_like(x))
    outside = torch.where(right, torch.ones_like(x), x)
    return torch.where(right, torch.special.zeta(2.0, inside), torch.polygamma(1, outside))


def _sinc(x: Tensor, y: Tensor) -> Tensor:
    px = math.pi * x
    # Near 0 the quotient cancels: the series of sinc' to the x^5 term is exact to rounding for |pi x| < 0.05.
    small = px.abs() < 0.05
    safe = torch.where(small, torch.ones_like(px), px)
    series = math.pi * px * (-1 / 3 + px * px * (1 / 30 - px * px * (1 / 840 - px * px / 45360)))
    return torch.where(small, series, math.pi * (torch.cos(safe) * safe - torch.sin(safe)) / (safe * safe))


elementwise("neg", lambda x, y: -1.0, also=[torch.negative, Tensor.negative, Tensor.__neg__])
elementwise(
    "abs",
    lambda x, y: torch.sign(x),
    also=[torch.absolute, Tensor.absolute, Tensor.__abs__],
    low=0.1,
    holomorphic=False,
)
elementwise("exp", lambda x, y: y)
elementwise("exp2", lambda x, y: y * math.log(2))
elementwise("expm1", lambda x, y: y + 1)
elementwise("log", lambda x, y: 1 / x, low=0.2, singular=True)
elementwise("log2", lambda x, y: 1 / (x * math.log(2)), low=0.2, singular=True)
elementwise("log10", lambda x, y: 1 / (x * math.log(10)), low=0.2, singular=True)
elementwise("log1p", lambda x, y: 1 / (1 + x), low=-0.8, singular=True)
elementwise("sqrt", lambda x, y: 0.5 / y, low=0.2, singular=True)
elementwise("rsqrt", lambda x, y: -0.5 * y / x, low=0.2, singular=True)
elementwise("reciprocal", lambda x, y: -y * y, low=0.3, singular=True)
elementwise("square", lambda x, y: 2 * x)
elementwise("sin", lambda x, y: torch.cos(x))
elementwise("cos", lambda x, y: -torch.sin(x))
elementwise("tan", lambda x, y: 1 + y * y, low=-1.2, high=1.2)
elementwise(
    "asin", lambda x, y: torch.rsqrt(1 - x * x), low=-0.9, high=0.9, singular=True, also=[torch.arcsin, Tensor.arcsin]
)
elementwise(
    "acos", lambda x, y: -torch.rsqrt(1 - x * x), low=-0.9, high=0.9, singular=True, also=[torch.arccos, Tensor.arccos]
)
elementwise("atan", lambda x, y: 1 / (1 + x * x), also=[torch.arctan, Tensor.arctan])
elementwise("sinh", lambda x, y: torch.cosh(x))
elementwise("cosh", lambda x, y: torch.sinh(x))
elementwise("tanh", lambda x, y: one_minus_square(y))
elementwise("asinh", lambda x, y: torch.rsqrt(1 + x * x), also=[torch.arcsinh, Tensor.arcsinh])
elementwise(
    "acosh", lambda x, y: torch.rsqrt(x * x - 1), low=1.3, high=4.0, singular=True, also=[torch.arccosh, Tensor.arccosh]
)
elementwise(
    "atanh", lambda x, y: 1 / (1 - x * x), low=-0.9, high=0.9, singular=True, also=[torch.arctanh, Tensor.arctanh]
)
elementwise("sigmoid", lambda x, y: y * (1 - y), also=[torch.special.expit])
elementwise("log_sigmoid", lambda x, y: torch.sigmoid(-x))
elementwise("relu", lambda x, y: x > 0, low=0.1)
elementwise("relu6", lambda x, y: (x > 0) & (x < 6), low=0.1)
elementwise("hardtanh", lambda x, y, min_val=-1.0, max_val=1.0: (x > min_val) & (x < max_val), low=-0.9, high=0.9)
elementwise("hardsigmoid", lambda x, y: ((x > -3) & (x < 3)) / 6.0)
elementwise("hardswish", lambda x, y: torch.where(x < -3, 0.0, torch.where(x <= 3, x / 3 + 0.5, 1.0)))
elementwise("leaky_relu", lambda x, y, negative_slope=0.01: torch.where(x > 0, 1.0, negative_slope).to(x.dtype))
elementwise("elu", _elu)
elementwise("selu", lambda x, y: _elu(x, y, 1.6732632423543772, 1.0507009873554805))
elementwise("celu", lambda x, y, alpha=1.0: _elu(x, y, alpha, 1.0, 1 / alpha))
elementwise("gelu", _gelu)
elementwise("silu", _silu)
elementwise("mish", _mish)
elementwise("softplus", _softplus)
elementwise("softshrink", lambda x, y, lambd=0.5: x.abs() > lambd, low=0.7)
elementwise("hardshrink", lambda x, y, lambd=0.5: x.abs() > lambd, low=0.7)
elementwise("threshold", lambda x, y, threshold, value: x > threshold, low=0.7, args=(0.1, 2.0))
elementwise("nan_to_num", lambda x, y, nan=0.0, posinf=None, neginf=None: torch.isfinite(x), holomorphic=False)
elementwise("erf", lambda x, y: 2 / SQRT_PI * torch.exp(-x * x))
elementwise("erfc", lambda x, y: -2 / SQRT_PI * torch.exp(-x * x))
elementwise("erfinv", lambda x, y: SQRT_PI / 2 * torch.exp(y * y), low=-0.9, high=0.9, singular=True)
elementwise("erfcx", lambda x, y: 2 * x * y - 2 / SQRT_PI)
elementwise("ndtr", lambda x, y: torch.exp(-0.5 * x * x) / SQRT_2PI)
elementwise("ndtri", lambda x, y: torch.exp(0.5 * y * y) * SQRT_2PI, low=0.1, high=0.9, singular=True)
elementwise("log_ndtr", lambda x, y: torch.exp(-0.5 * x * x - y) / SQRT_2PI)
elementwise("lgamma", lambda x, y: torch.digamma(x), low=0.3, high=5.0, also=[torch.special.gammaln])
elementwise("digamma", lambda x, y: _polygamma_value(1, x), low=0.3, high=5.0, also=[torch.special.psi])
elementwise("logit", _logit, low=0.1, high=0.9, singular=True)
elementwise("sinc", _sinc)
elementwise("deg2rad", lambda x, y: math.pi / 180)
elementwise("rad2deg", lambda x, y: 180 / math.pi)
elementwise("frac", lambda x, y: 1.0, low=0.1, high=0.9)
elementwise("sign", lambda x, y: 0.0, flat=True, low=0.1)
elementwise("sgn", lambda x, y: 0.0, flat=True, low=0.1, holomorphic=False)
for _name in ("floor", "ceil", "round", "trunc"):
    elementwise(_name, lambda x, y, **_: 0.0, flat=True, low=0.1, high=0.4)


@operands(
    "polygamma",
    lambda rand: [Sample((n, rand(3, low=0.3, high=5.0))) for n in (0, 1, 2)],
    functions=[torch.polygamma, torch.special.polygamma],
)
def _polygamma(y: Tensor, t: dict[str, Tangent | None], n: int, input: Tensor) -> Tangent | None:
    return t["input"].scale(_polygamma_value(n + 1, input), y.shape)  # type: ignore[union-attr]


@operands(
    "zeta",
    lambda rand: [
        Sample((2.0, rand(3, low=0.5, high=5.0))),
        Sample((rand(3, low=2.5, high=4.0), rand(2, 1, low=0.5, high=5.0)), constant=(0,)),
    ],
    functions=[torch.special.zeta],
)
def _zeta(y: Tensor, t: dict[str, Tangent | None], s: Tensor | float, q: Tensor) -> Tangent | None:
    r"""d zeta(s, q) / dq = -s zeta(s + 1, q), for numbers s (torch has no derivative in s)."""
    if t["s"] is not None:
        raise unsupported(torch.special.zeta, "has no derivative in its first argument")
    return t["q"].scale(-s * torch.special.zeta(s + 1, q), y.shape)  # type: ignore[union-attr]
