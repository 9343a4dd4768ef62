r"""Scaled tangents: a chain of elementwise operations multiplies a factor of the value's size, not K directions.

An elementwise operation takes :math:`\dot x_k` to :math:`f'(x)\, \dot x_k`. Where the K directions are large this is
left undone: the tangent is kept as

.. math:: \dot y_k = c \, \varphi \, b_k,

a *base* :math:`b` of shape ``(K, *shape)``, shared by all tangents of the chain, a *factor* :math:`\varphi` that
broadcasts to ``shape``, and a number :math:`c`. The next operation multiplies :math:`\varphi` or c, the sum of two
tangents of one base adds factors, a selection selects them, and the product with the base is formed once, when somebody
asks for directions. Sums over different bases are formed at once.

Four things would make that wrong, and are guarded against:

1. *Somebody writes to an operand, or to a caller's directions, before the product is formed.* A factor is always a
   tensor of our own. A base is a result that nobody else was given (`Base`), or what was lent for the run of one
   function (`lend`); that it was not written to is checked, and a write raises.
2. *The factor leaves the range of its dtype where the directions do not.* Every entry of a factor that a product made
   is checked to be zero because an operand is, or to lie between :math:`2^{-118}` and :math:`2^{60}` (float64:
   :math:`2^{-900}` and :math:`2^{400}`); what a sum made, to lie below. It may be smaller where no direction exceeds
   16, which then underflows as well. Where that fails the product is formed before the operation. (An operand's own
   values may be anything until something else is multiplied in.)
3. *It is formed under another grad mode, transform or dispatch mode than the operation.* What autograd, a transform or
   another level differentiates is never postponed, and what is formed under a mode is not kept.
4. *Zero times infinity.* No factor of a derivative with poles, and no product, is infinite or nan: the dense rules
   decide there.

Postponed are plain tensors on the CPU, in float32 and float64, with at least `DIRECTIONS` directions of
`tangents.LARGE` numbers in all: below that, and on devices where the check would wait for the device, it does not pay.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine import tangents
from dualnn.engine.scaling import ORDINARY, fits, idle, number, sum_of_products, times
from dualnn.engine.tangents import Base, Dense, PerSample, Tangent

DIRECTIONS = 8


class _Switch(threading.local):
    on = True


_switch = _Switch()


@contextmanager
def scaled_tangents(enabled: bool) -> Iterator[None]:
    """Switch scaled tangents on or off, for this thread and the context; they are on by default.

    Results are the same to rounding, save where dense directions overflow or underflow on the way.

    Args:
        enabled: False forms every product when its operation runs.

    Example:
        >>> import torch, dualnn as dn
        >>> with dn.engine.scaled_tangents(False):
        ...     _, slope = dn.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    """
    before, _switch.on = _switch.on, enabled
    try:
        yield
    finally:
        _switch.on = before


class _Range(NamedTuple):
    """How the magnitudes of a dtype are read off its bits."""

    bits: torch.dtype
    width: int
    mantissa: int
    bias: int
    least: int  # factors stay within 2 ** least … 2 ** most,
    most: int
    reach: float  # numbers within 1 / reach … reach, so that the two together are never denormal

    def constant(self, value: int) -> Tensor:
        half = 1 << (self.width - 1)
        return torch.tensor((value + half) % (2 * half) - half, dtype=self.bits, device="cpu")


RANGES = {
    torch.float32: _Range(torch.int32, 32, 23, 127, -118, 60, 2.0**8),
    torch.float64: _Range(torch.int64, 64, 52, 1023, -900, 400, 2.0**60),
}


class _Tests:
    """Tests of magnitudes in one or two passes: of twice the bits, which drops the sign, the largest after a shift."""

    def __init__(self, kind: _Range) -> None:
        self.kind = kind
        half, step = 1 << (kind.width - 1), kind.mantissa + 1
        low, high = (kind.bias + kind.least) << step, (kind.bias + kind.most) << step
        self.inside, self.first_outside = kind.constant(-low - half), high - low - half
        self.below, self.most = kind.constant(-half), 2.0**kind.most
        self.least, self.half, self.step = kind.constant(half - 1), half, step

    def _moved(self, t: Tensor, by: Tensor) -> Tensor:
        return torch.add(by, t.view(self.kind.bits), alpha=2)

    def within(self, t: Tensor) -> bool:
        """Whether all magnitudes lie in the range (a zero does not)."""
        return self._moved(t, self.inside).amax().item() < self.first_outside

    def bounded(self, t: Tensor) -> bool:
        """Whether all magnitudes, zeros among them, lie below the upper end: their norm does."""
        return torch.linalg.vector_norm(t).item() < self.most

    def exponents(self, t: Tensor) -> tuple[int, int]:
        """Of the smallest magnitude that is not zero, and of the largest."""
        found = torch.aminmax(self._moved(t, self.least))  # a zero counts as the largest
        least, greatest = int(found.min.item()) + self.half + 1, int(found.max.item()) + self.half + 1
        if greatest == 2 * self.half:
            greatest = int(self._moved(t, self.below).amax().item()) + self.half
        return (least >> self.step) - self.kind.bias, (greatest >> self.step) - self.kind.bias


_TESTS: dict[torch.dtype, _Tests] = {}


def _tests(dtype: torch.dtype) -> _Tests:
    found = _TESTS.get(dtype)
    if found is None:
        with torch.inference_mode(False):
            found = _TESTS[dtype] = _Tests(RANGES[dtype])
    return found


class _Factor:
    """A tensor of our own, and what is known of its magnitudes.

    Attributes:
        data: The tensor.
        sure: Its entries are in range (those that a sum made too small have lost no more than the sum's terms did).
        span: Bounds for the exponents of the entries that are not zero, where they had to be found.
    """

    __slots__ = ("data", "span", "sure")

    def __init__(self, data: Tensor, sure: bool, span: tuple[int, int] | None = None) -> None:
        self.data, self.sure, self.span = data, sure, span

    def checked(self, base: Base) -> bool:
        """Make sure."""
        if not self.sure:
            tests = _tests(self.data.dtype)
            if base.modest:
                if not tests.bounded(self.data):
                    return False
            elif not tests.within(self.data):
                self.span = tests.exponents(self.data)
                if self.span[0] < tests.kind.least or self.span[1] >= tests.kind.most:
                    return False
            self.sure = True
        return True

    def times(self, b: Tensor, base: Base) -> _Factor | None:
        """The product with a tensor, or None where it may have left the range."""
        a = self.data
        if b.dtype is torch.bool:
            return _Factor(a * b.to(a.dtype), self.sure, self.span)  # products of two kinds are slow
        out, tests = a * b, _tests(a.dtype)
        if base.modest:
            return _Factor(out, True) if tests.bounded(out) else None
        if self.span is None and tests.within(out):
            return _Factor(out, True)
        # Perhaps entries are exactly zero: that an operand is the reason, not the product, the operands' range shows.
        low, high = tests.exponents(b)
        for known in (self.span, None):
            least, most = known or tests.exponents(a)
            least, most = least + low, most + high + 1
            if least >= tests.kind.least and most < tests.kind.most:
                return _Factor(out, True, (least, most))
            if known is None:
                break
        return _Factor(out, True) if _modest(base) and tests.bounded(out) else None


def _modest(base: Base) -> bool:
    """Whether no direction exceeds 16: then it underflows as soon as a factor does, and no earlier product helps."""
    if base.modest is None:
        base.modest = base.data.amax().item() <= 16.0 and base.data.amin().item() >= -16.0
    return base.modest


def may_wait(data: Tensor) -> bool:
    """Whether a product with these directions may be postponed."""
    return (
        data.shape[0] >= DIRECTIONS
        and data.numel() > 0
        and type(data) is Tensor
        and data.dtype in RANGES
        and data.is_cpu
        and not data.requires_grad
        and not data.is_inference()
        and _switch.on
        and idle()
    )


def owned(data: Tensor) -> Dense:
    """Directions that an operation of ours has just made."""
    return Dense(data, Base(data) if may_wait(data) else None)


def postponed(tan: Dense, factor: Any, shape: torch.Size, singular: bool) -> Tangent | None:
    """``tan.scale(factor)`` undone, or None where it must be formed now."""
    base = tan.base
    if base is None or base.given or base.data is not tan.data or not (_switch.on and idle()):
        return None
    if base.shape != shape:
        return None
    return Scaled(base).multiplied(factor, shape, singular)


class Scaled(Tangent):
    """Directions ``number * factor * base``, of which the product has not been formed.

    Args:
        base: The directions that others may share.
        factor: Broadcasts to the value's shape; None for 1.
        number: One more factor.
    """

    __slots__ = ("_parts",)
    waits = True

    def __init__(self, base: Base, factor: _Factor | None = None, number: float = 1.0) -> None:
        self.num = base.data.shape[0]
        self._parts = base, factor, number  # one attribute, so that forming the product is atomic
        base.shared = True

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the directions."""
        return self._parts[0].data.dtype

    @property
    def requires_grad(self) -> bool:
        """Never: what autograd tracks does not wait."""
        return False

    def dense(self) -> Tensor:
        """Form the product; it is kept, unless some mode looks on."""
        return self._formed()[0]

    def given(self) -> Tensor:
        """The product, for a caller who may write to it."""
        data, base = self._formed()
        mine = Dense(data, base)
        out = mine.given()
        if mine.base is not base:
            assert mine.base is not None
            self._parts = mine.base, None, 1.0
        return out

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Apply a linear map to the product."""
        return Dense(*self._formed()).map(fn)

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Multiply the factor where that is safe, the directions otherwise."""
        base = self._parts[0]
        if base.shape == shape:
            if type(factor) is float and factor == 1.0:
                return self
            if _switch.on and not base.given and idle():
                found = self.multiplied(factor, shape, singular)
                if found is not None:
                    return found
        return Dense(*self._formed()).scale(factor, shape, singular)

    def multiplied(self, factor: Any, shape: torch.Size, singular: bool) -> Scaled | None:
        """The same with one more factor, or None where it must not wait."""
        kind = type(factor)
        if kind is float or kind is int:
            return self._numbered(factor)
        if kind not in ORDINARY or (factor.requires_grad and torch.is_grad_enabled()):
            return None
        base, old, n = self._parts
        dtype = factor.dtype
        if dtype is not base.data.dtype and dtype is not torch.bool:
            return None
        if factor.shape != shape:
            if factor.dim() == 0:
                return self._numbered(float(factor.item()))
            if not fits(factor.shape, shape):
                return None
        if old is not None:
            new = old.times(factor, base)
        elif dtype is torch.bool:
            new = _Factor(factor.to(base.data.dtype), True, (0, 0))
        elif factor.layout is not torch.strided or factor.is_neg():
            return None
        else:
            # As long as nothing else is multiplied in, it has no range to leave.
            new = _Factor(factor.clone(), False)
            if (singular or n != 1.0) and not new.checked(base):
                return None
        return None if new is None else Scaled(base, new, n)

    def _numbered(self, factor: float) -> Scaled | None:
        base, old, before = self._parts
        n = before * factor
        if old is not None and not old.checked(base):
            return None
        reach = RANGES[base.data.dtype].reach
        if 1 / reach <= abs(n) <= reach or (n == 0.0 and (factor == 0.0 or before == 0.0)):
            return Scaled(base, old, float(n))
        if old is None or n == 0.0 or not math.isfinite(n):
            return None
        new = old.times(torch.tensor(n, dtype=base.data.dtype), base)
        return None if new is None else Scaled(base, new)

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum: of the factors, for one base."""
        if other is None or other.is_zero:
            return self
        if isinstance(other, PerSample):
            return other.plus(self)
        base = self._parts[0]
        theirs = other if isinstance(other, Scaled) else None
        if type(other) is Dense and other.base is base and other.data is base.data and not base.given:
            theirs = Scaled(base)
        if theirs is not None and theirs._parts[0] is base and not base.given and _switch.on and idle():
            found = self._summed(theirs)
            if found is not None:
                return found
        data, factor = self._terms()
        add, by = other._terms() if isinstance(other, Scaled) else (other.dense(), 1.0)
        return owned(sum_of_products(data, factor, add, by, data.dtype))  # type: ignore[arg-type]

    def _summed(self, other: Scaled) -> Scaled | None:
        """The sum of two tangents of one base, or None where its factor may have left the range."""
        a, b = (self, other) if self._parts[1] is not None else (other, self)
        base, factor, n = a._parts
        _, second, m = b._parts
        if factor is None:
            return Scaled(base)._numbered(n + m)
        total: Tensor
        if second is not None:
            total = torch.add(_product(factor, n), second.data, alpha=m)  # type: ignore[arg-type]
        else:
            total = torch.add(number(m, factor.data), factor.data, alpha=n) if m else times(factor.data, n)
        sure = factor.sure and (second is None or second.sure)
        return Scaled(base, _Factor(total, sure)) if _tests(total.dtype).bounded(total) else None

    def _terms(self) -> tuple[Tensor, Tensor | float]:
        base, factor, n = self._parts
        return base.checked(), _product(factor, n)

    def _formed(self) -> tuple[Tensor, Base | None]:
        """The product, and the base that it has become."""
        data, factor = self._terms()
        if type(factor) is float and factor == 1.0:
            return data, self._parts[0]
        data = times(data, factor)
        if not idle() or torch.is_inference_mode_enabled():
            return data, None
        base = Base(data)
        self._parts = base, None, 1.0
        return data, base


def selected(condition: Tensor, a: Tangent | None, b: Tangent | None, shape: torch.Size) -> Tangent | None:
    """``where(condition, a, b)`` of tangents over one base (None: a constant), or None where it must be formed."""
    terms: list[Tensor | float] = []
    base, sure = None, True
    for t in (a, b):
        if type(t) is Dense and t.base is not None and t.base.data is t.data:
            t = Scaled(t.base)
        if t is None:
            terms.append(0.0)
            continue
        if not isinstance(t, Scaled) or (base is not None and t._parts[0] is not base):
            return None
        base, factor, n = t._parts
        sure = sure and (factor is None or factor.sure)
        terms.append(_product(factor, n))
    if base is None or base.given or base.shape != shape or not (_switch.on and idle()):
        return None
    if type(condition) is not Tensor or not fits(condition.shape, shape):
        return None
    dtype = base.data.dtype
    one, other = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in terms)
    return Scaled(base, _Factor(torch.where(condition, one, other), sure))


def _product(factor: _Factor | None, n: float) -> Tensor | float:
    if factor is None:
        return n
    return factor.data if n == 1.0 else times(factor.data, n)


def lend(seeds: Sequence[Tangent | None]) -> list[tuple[Dense, weakref.ref[Base]]]:
    """Let the directions of seeds be bases while a function runs; returns what `take_back` needs.

    Only the function itself could write to them in that time, which raises (except through ``.data`` or numpy).
    """
    large = []
    for t in seeds:
        if type(t) is Dense and type(t.data) is Tensor and t.base is None and t.data.numel() >= tangents.LARGE:
            if may_wait(t.data):
                t.base = Base(t.data)
                large.append((t, weakref.ref(t.base)))
    return large


def take_back(lent: list[tuple[Dense, weakref.ref[Base]]]) -> None:
    """The function has ended: what outlives it (a dual that it put away) gets directions of its own."""
    for seed, held in lent:
        seed.base = None
        base = held()
        if base is not None:
            base.depart()


def settled(tan: Any) -> Any:
    """A tangent that leaves the run, with its directions formed."""
    return Dense(tan.given()) if isinstance(tan, Scaled) else tan
