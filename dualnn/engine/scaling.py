"""Products of directions with derivatives: few kernels, few temporaries, no number read twice.

A *part* is a tensor, or a Python float where nothing has been multiplied yet; a *factor* is a derivative, a tensor or a
number. Every tensor that these functions return is new, except where a docstring says otherwise: an operand may be
overwritten later, and the derivative must not change with it.
"""

from __future__ import annotations

import cmath
import functools
import math

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

ORDINARY = (Tensor, torch.nn.Parameter)


def idle() -> bool:
    """Whether no functorch transform and no dispatch mode (tracing, fake tensors) looks on."""
    return peek_interpreter_stack() is None and not _len_torch_dispatch_stack()


@functools.lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def number(value: float, like: Tensor) -> Tensor | float:
    """A number as a 0-dim tensor of ``like``'s dtype, which torch multiplies by in half the time of a Python number.

    Single and double precision on the CPU only: elsewhere the number itself (half precision would round it).
    """
    if type(like) is Tensor and value and like.is_cpu and idle():
        dtype = like.dtype
        if dtype is torch.float32 or dtype is torch.float64:
            return _constant(value, dtype)
    return value


def times(t: Tensor, factor: Tensor | float) -> Tensor:
    """``t * factor``."""
    return t * (number(factor, t) if type(factor) is float else factor)


def one_minus_square(y: Tensor) -> Tensor:
    """``1 - y * y``, the derivative of tanh, in one kernel."""
    one = number(1.0, y)
    return torch.addcmul(one, y, y, value=-1) if type(one) is Tensor else 1 - y * y


def surely_finite(factor: Tensor | float) -> bool:
    """Whether a look at the numbers shows that they are finite; on devices where a look waits, no."""
    if not isinstance(factor, Tensor):
        return cmath.isfinite(factor) if isinstance(factor, complex) else math.isfinite(factor)
    if type(factor) not in ORDINARY or not factor.is_cpu or not idle():
        return False
    # One pass instead of five (isfinite, all): an infinity or a nan makes the sum one. A sum that overflows is taken
    # for infinite, which costs time and nothing else.
    total = (factor.detach() if factor.requires_grad else factor).sum().item()
    return cmath.isfinite(total) if isinstance(total, complex) else math.isfinite(total)


def product(part: Tensor | float, factor: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """``part * factor``; a factor of another kind (a mask) in ``dtype``. A factor of 1 returns the part itself."""
    if isinstance(part, Tensor):
        return part if not isinstance(factor, Tensor) and factor == 1.0 else times(part, factor)
    if isinstance(factor, Tensor):
        return times(_floating(factor, dtype), part)
    return part * factor


def sum_of_products(
    a: Tensor | float, fa: Tensor | float, b: Tensor | float, fb: Tensor | float, dtype: torch.dtype
) -> Tensor | float:
    """``a * fa + b * fb`` with broadcasting."""
    if not isinstance(a, Tensor) and isinstance(fa, Tensor):
        a, fa = _floating(fa, dtype), a
    if not isinstance(b, Tensor) and isinstance(fb, Tensor):
        b, fb = _floating(fb, dtype), b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensors(a, fa, b, fb)
    if not isinstance(a, Tensor):
        a, fa, b, fb = b, fb, a, fa
    constant: float = b * fb  # type: ignore[assignment]
    if not isinstance(a, Tensor):
        return a * fa + constant
    left = a if not isinstance(fa, Tensor) and fa == 1.0 else times(a, fa)
    return left + number(constant, left)


def _tensors(a: Tensor, fa: Tensor | float, b: Tensor, fb: Tensor | float) -> Tensor:
    """``a * fa + b * fb`` for tensors ``a``, ``b``: one or two kernels."""
    if isinstance(fa, Tensor) and not isinstance(fb, Tensor) and fb == 1.0:
        a, fa, b, fb = b, fb, a, fa
    left = a if not isinstance(fa, Tensor) and fa == 1.0 else times(a, fa)
    if not isinstance(fb, Tensor):
        if fb == 1.0:
            return left + b
        return left - b if fb == -1.0 else torch.add(left, b, alpha=fb)
    plain = type(left) is Tensor and type(b) in ORDINARY and type(fb) in ORDINARY and idle()
    if not plain or left.dtype != fb.dtype or left.dtype != b.dtype:
        return left + b * fb
    # A product that has the result's shape is a temporary of ours: add to it in place.
    own = left is not a and fits(b.shape, left.shape) and fits(fb.shape, left.shape)
    return left.addcmul_(b, fb) if own else torch.addcmul(left, b, fb)


def fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether one shape broadcasts to another."""
    if shape == into:
        return True
    pairs = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(n == 1 or n == m for n, m in pairs)


def _floating(factor: Tensor, dtype: torch.dtype) -> Tensor:
    kind = factor.dtype
    return factor if kind.is_floating_point or kind.is_complex else factor.to(dtype)


def aligned(data: Tensor, ndim: int) -> Tensor:
    """Insert axes after K so that ``data`` broadcasts against results of ``ndim`` dimensions."""
    missing = ndim + 1 - data.dim()
    if missing <= 0:
        return data
    return data.reshape(data.shape[:1] + (1,) * missing + data.shape[1:])


def scaled(data: Tensor, factor: Tensor | float, shape: torch.Size, singular: bool) -> Tensor:
    """``factor * data`` for directions ``(K, *s)``, of shape ``(K, *shape)``; the data itself for a factor of 1."""
    data = aligned(data, len(shape))
    if singular and not surely_finite(factor):
        # log at 0 with directions (0, 1) has derivatives (0, inf): an exact zero does not meet the infinity. Elsewhere
        # a zero keeps its factor: a further level, or reverse mode, may differentiate it (log(2 + x^2) at 0).
        still = _exactly_zero(data) & ~torch.isfinite(factor if isinstance(factor, Tensor) else torch.as_tensor(factor))
        factor = torch.where(still, torch.zeros((), dtype=data.dtype, device=data.device), factor)
    out = data if type(factor) is float and factor == 1.0 else times(data, factor)
    return full(out, data.shape[0], shape)


def _exactly_zero(x: Tensor) -> Tensor:
    """Where a tensor is zero and, if it is a dual, does not move either."""
    tan = getattr(x, "_tan", None)
    if tan is None:
        return x == 0
    zero = _exactly_zero(x._primal)  # type: ignore[attr-defined]
    if tan.is_zero:
        return zero
    return zero & _exactly_zero(tan.data if hasattr(tan, "data") else tan.dense()).all(0)


def full(out: Tensor, num: int, shape: torch.Size) -> Tensor:
    """Directions broadcast to ``(num, *shape)``."""
    return out if out.shape[1:] == shape else out.expand(num, *shape)
