r"""Representations of a tangent: one small protocol, several ways to store K directions.

A dual number is :math:`x + \sum_k \varepsilon_k \dot x_k`, with :math:`\varepsilon_j \varepsilon_k = 0`. Its tangent
is the tensor of all :math:`\dot x_k`, of shape ``(K, *primal.shape)``. Often it need not exist as such: it is
structurally zero, of low rank, or can be drawn again when it is needed. A rule asks the protocol
(`scale`, `map`, `plus`, `dense`) and never the class, except where an op can use a factorisation (linear, conv).

=============  =================================================================================
`Zero`         no dependence at all: 0 times infinity stays 0, and nothing is computed
`Dense`        the tensor itself
`Scaled`       a factor of the value's size times directions that a chain of operations shares (`scaled.py`)
`PerSample`    dense, after the batch axis was reduced: direction ``k * batch + b`` perturbs sample b only
`Separate`     one direction per argument of an elementwise function, kept apart and unbroadcast
`LowRank`      :math:`\dot W_k = \sum_r a_{kr} b_{kr}^T`, for weights (never forms the matrix in linear)
`Drawn`        regenerated from its key at every use, not stored
=============  =================================================================================

A factor of exactly 1 shares the tensor it multiplies; every other result is new.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _is_alias_of  # type: ignore[attr-defined]
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.errors import DualInputError, StructureError
from dualnn.engine.scaling import aligned, full, idle, number, product, scaled, sum_of_products, surely_finite, times

LARGE = 1 << 18  # numbers in all directions together, from which on it is looked for ways to form them less often


class Tangent:
    """K directions of one tensor: base of all representations."""

    __slots__ = ("num",)
    is_zero = False
    waits = False  # whether a product with the directions has been postponed

    def __init__(self, num: int) -> None:
        self.num = num

    def dense(self) -> Tensor:
        """The directions as one tensor ``(K, *shape)``."""
        raise NotImplementedError

    def given(self) -> Tensor:
        """The same, for somebody who may write to it."""
        return self.dense()

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Multiply every direction by ``factor``, broadcast to the result's ``shape``.

        Args:
            factor: A derivative, of any shape that broadcasts to ``shape``, or a number.
            shape: Shape of the op's result.
            singular: The factor may be infinite; a direction that is exactly zero there stays zero.
        """
        return Dense(scaled(self.dense(), factor, shape, singular))

    def joined(
        self,
        factor: Tensor | float,
        other: Tangent,
        other_factor: Tensor | float,
        shape: torch.Size,
        singular: bool = False,
    ) -> Tangent:
        """``self * factor + other * other_factor``: what an op of two operands needs, in fewer passes."""
        return self.scale(factor, shape, singular).plus(other.scale(other_factor, shape, singular))

    def delayed(self, factor: Tensor, shape: torch.Size) -> Tangent:
        """`scale` by a finite factor which nobody else holds, and which may therefore be multiplied in later."""
        return self.scale(factor, shape)

    @property
    def requires_grad(self) -> bool:
        """Whether autograd tracks the directions."""
        return self.dense().requires_grad

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Apply a linear map to the dense directions: ``(K, *shape) -> (K, *out)``."""
        return Dense(fn(self.dense()))

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum of two tangents of the same tensor."""
        if other is None or other.is_zero:
            return self
        if isinstance(other, PerSample):
            return other.plus(self)
        return Dense(self.dense() + other.dense())


class Zero(Tangent):
    """A structural zero: the value does not depend on the directions."""

    __slots__ = ()
    is_zero = True

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Zero, whatever the factor is (also infinity and nan)."""
        return self

    @property
    def requires_grad(self) -> bool:
        """Never."""
        return False

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Zero, without calling ``fn``."""
        return self

    def plus(self, other: Tangent | None) -> Tangent:
        """The other tangent."""
        return self if other is None else other


class Base:
    """Directions that nobody writes to, so that a product with them may wait (`scaled.py`).

    Attributes:
        data: The directions ``(K, *shape)``.
        shape: Shape of the value.
        shared: A product with them may be waiting.
        given: Somebody else was given the tensor, and may write to it from now on.
        modest: Whether no direction is large, if that is known.
    """

    __slots__ = ("__weakref__", "_version", "data", "given", "modest", "shape", "shared")

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self._version = data, data.shape[1:], data._version
        self.shared = self.given = False
        self.modest: bool | None = None

    def checked(self) -> Tensor:
        """The directions; raises if they were written to."""
        if self.data._version != self._version and not self.given:
            raise DualInputError(
                f"directions of shape {tuple(self.data.shape)} were overwritten in place after an operation on their "
                "dual, and before its tangent was read. Write to a clone of them, or run the operations under "
                "dualnn.engine.scaled_tangents(False)."
            )
        return self.data

    def depart(self) -> None:
        """Part from a tensor that somebody else may write to from now on."""
        if self.data._version == self._version:  # otherwise whoever reads the directions is told
            self.data = self.data.clone()
            self._version = self.data._version


class Dense(Tangent):
    """All directions in one tensor ``(K, *shape)``.

    Args:
        data: The tensor.
        base: Of whom it is known who holds it: the tensor, or what it is a view of.
    """

    __slots__ = ("base", "data")

    def __init__(self, data: Tensor, base: Base | None = None) -> None:
        self.num = data.shape[0]
        self.data = data
        self.base = base

    def dense(self) -> Tensor:
        """The stored tensor itself."""
        return self.data

    def given(self) -> Tensor:
        """The stored tensor, or a copy (stored from now on) where products with it are waiting."""
        if self.base is not None:
            if self.base.shared and not self.base.given:
                self.data = self.data.clone()
                self.base = Base(self.data)
            self.base.given = True
        return self.data

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Multiply the tensor."""
        data = self.data
        if type(factor) is float and factor == 1.0:
            out = data
        else:
            if self.base is not None:
                waiting = _postponed(self, factor, shape, singular)
                if waiting is not None:
                    return waiting
            if singular:
                return _new(scaled(data, factor, shape, True))
            if data.dim() <= len(shape):
                data = aligned(data, len(shape))
            out = data * (number(factor, data) if type(factor) is float else factor)
        found = out.shape
        if len(found) != len(shape) + 1 or found[1:] != shape:
            return Dense(aligned(out, len(shape)).expand(data.shape[0], *shape))
        if out is data:
            return self
        return Dense(out) if type(out) is not Tensor or out.numel() < LARGE else _new(out)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Apply a linear map to the directions; the result may be a view of them."""
        out = fn(self.data)
        if type(out) is not Tensor or (self.base is None and out.numel() < LARGE) or is_functorch_wrapped_tensor(out):
            return Dense(out)
        return Dense(out, self.base) if _is_alias_of(out, self.data) else _new(out)

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum."""
        if other is None or other.is_zero:
            return self
        if other.waits or isinstance(other, PerSample):
            return other.plus(self)
        return _new(self.data + other.dense())

    def joined(
        self,
        factor: Tensor | float,
        other: Tangent,
        other_factor: Tensor | float,
        shape: torch.Size,
        singular: bool = False,
    ) -> Tangent:
        """The same, in one or two passes over the directions."""
        if type(self) is not Dense or type(other) is not Dense:
            return super().joined(factor, other, other_factor, shape, singular)
        if singular and not (surely_finite(factor) and surely_finite(other_factor)):
            return super().joined(factor, other, other_factor, shape, singular)
        if self.base is not None and self.base is other.base:
            return super().joined(factor, other, other_factor, shape, singular)
        a, b = aligned(self.data, len(shape)), aligned(other.data, len(shape))
        return _new(full(sum_of_products(a, factor, b, other_factor, a.dtype), self.num, shape))  # type: ignore[arg-type]


class PerSample(Dense):
    """Directions that each perturb one sample only: ``(K * batch, *shape)``, sample index last."""

    __slots__ = ("batch",)

    def __init__(self, data: Tensor, batch: int) -> None:
        super().__init__(data)
        self.batch = batch

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Scale, keeping the samples apart."""
        return PerSample(scaled(self.data, factor, shape, singular), self.batch)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Map, keeping the samples apart."""
        return PerSample(fn(self.data), self.batch)

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum; only with a tangent whose samples are kept apart as well."""
        if other is None or other.is_zero:
            return self
        if not isinstance(other, PerSample) or other.batch != self.batch:
            raise StructureError(
                "a value reduced over the batch was combined with one that still depends on every sample, so the "
                "derivative per sample is not defined (samples mix before the loss). Use per_sample=False."
            )
        return PerSample(self.data + other.data, self.batch)

    def samples(self) -> Tensor:
        """The directions as ``(K, batch, *shape)``."""
        return self.data.unflatten(0, (-1, self.batch))


class Separate(Tangent):
    """Directions that most tensors depend on one or two of: ``{k: part}`` with parts that broadcast to the shape.

    An elementwise function of n arguments is seeded with direction k on argument k. An intermediate that depends on
    two of them then costs two products, not n, and a per-channel parameter's part stays per channel until it meets
    a full tensor. A part is a number where it is the same in every entry: a seed costs nothing.

    Args:
        num: K.
        parts: The parts that are present.
        shape: Shape of the value.
        zero: A 0-dim zero of the parts' dtype and device (that of any part which is a tensor).
        factor: A tensor of our own by which every part is still to be multiplied.
        sign: 1 or -1, likewise. (Nothing else waits: a product of two factors may overflow or vanish where the
            derivative does not.)
    """

    __slots__ = ("_factor", "_parts", "_sign", "shape", "zero")

    def __init__(
        self,
        num: int,
        parts: dict[int, Tensor | float],
        shape: torch.Size,
        zero: Tensor | None = None,
        factor: Tensor | None = None,
        sign: float = 1.0,
    ) -> None:
        super().__init__(num)
        if zero is None:
            some = next(p for p in parts.values() if isinstance(p, Tensor))
            zero = torch.zeros((), dtype=some.dtype, device=some.device)
        self.shape, self.zero = shape, zero
        self._parts, self._factor, self._sign = parts, factor, sign

    @property
    def parts(self) -> dict[int, Tensor | float]:
        """The parts, with everything multiplied in (once: the products are kept)."""
        if self._factor is not None or self._sign != 1.0:
            factor = _signed(1.0 if self._factor is None else self._factor, self._sign)
            self._parts = {k: product(p, factor, self.zero.dtype) for k, p in self._parts.items()}
            self._factor, self._sign = None, 1.0
        return self._parts

    def part(self, k: int) -> Tensor:
        """Direction k, broadcast to the shape."""
        p = self.parts.get(k, 0.0)
        return (p if isinstance(p, Tensor) else self.zero + p).expand(self.shape)

    def dense(self) -> Tensor:
        """All directions, with zeros for those that are absent."""
        return torch.stack([self.part(k) for k in range(self.num)])

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Scale each part that is present; a sign waits for the next sum or factor."""
        if type(factor) is float and factor == -1.0 and self._can_wait():
            return Separate(self.num, self._parts, shape, self.zero, self._factor, -self._sign)
        parts = self.parts
        if singular and not surely_finite(factor):
            parts = {
                k: scaled((p if isinstance(p, Tensor) else self.zero + p)[None], factor, shape, True)[0]
                for k, p in parts.items()
            }
        else:
            parts = {k: product(p, factor, self.zero.dtype) for k, p in parts.items()}
        return Separate(self.num, parts, shape, self.zero)

    def delayed(self, factor: Tensor, shape: torch.Size) -> Tangent:
        """The factor waits: a sum that comes next multiplies and adds in one pass."""
        if self._factor is not None or type(factor) is not Tensor or factor.requires_grad or not self._can_wait():
            return self.scale(factor, shape)
        return Separate(self.num, self._parts, shape, self.zero, factor, self._sign)

    def _can_wait(self) -> bool:
        """Whether it makes no difference when a product is formed: nothing records it, nothing looks on."""
        return idle() and all(
            not isinstance(p, Tensor) or (type(p) is Tensor and not p.requires_grad) for p in self._parts.values()
        )

    def joined(
        self,
        factor: Tensor | float,
        other: Tangent,
        other_factor: Tensor | float,
        shape: torch.Size,
        singular: bool = False,
    ) -> Tangent:
        """The same, part by part."""
        if not isinstance(other, Separate):
            return super().joined(factor, other, other_factor, shape, singular)
        if singular and not (surely_finite(factor) and surely_finite(other_factor)):
            return super().joined(factor, other, other_factor, shape, singular)
        dtype, out = self.zero.dtype, {}
        mine, fa = self._taken(factor)
        theirs, fb = other._taken(other_factor)
        for k, p in mine.items():
            q = theirs.get(k)
            out[k] = product(p, fa, dtype) if q is None else sum_of_products(p, fa, q, fb, dtype)
        for k, q in theirs.items():
            if k not in out:
                out[k] = product(q, fb, dtype)
        return Separate(self.num, out, shape, self.zero)

    def _taken(self, factor: Tensor | float) -> tuple[dict[int, Tensor | float], Tensor | float]:
        """Parts, and one factor which they are to be multiplied by, for this tangent times ``factor``."""
        if self._factor is None:
            return self._parts, _signed(factor, self._sign)
        if type(factor) is float and abs(factor) == 1.0:
            return self._parts, _signed(self._factor, self._sign * factor)
        return self.parts, factor

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum part by part."""
        if not isinstance(other, Separate):
            return super().plus(other)
        return self.joined(1.0, other, 1.0, self.shape)


def _new(data: Tensor) -> Dense:
    """Directions that an operation has just made, and that nobody else holds."""
    if type(data) is not Tensor or data.numel() < LARGE:
        return Dense(data)
    from dualnn.engine.scaled import owned  # needs this module

    return owned(data)


def _postponed(tan: Dense, factor: Tensor | float, shape: torch.Size, singular: bool) -> Tangent | None:
    from dualnn.engine.scaled import postponed  # needs this module

    return postponed(tan, factor, shape, singular)


def _signed(factor: Tensor | float, sign: float) -> Tensor | float:
    if sign == 1.0:
        return factor
    return times(factor, -1.0) if isinstance(factor, Tensor) else -factor


class LowRank(Tangent):
    r"""Directions :math:`\dot W_k = \sum_r a_{kr} b_{kr}^T` of a weight whose first axis is the output.

    The factors are drawn at use, like `Drawn`.

    Shape:
        ``factors() -> a: (K, R, out), b: (K, R, fan_in)``; the dense form is ``(K, *shape)`` with
        ``shape = (out, ...)`` and ``prod(shape[1:]) == fan_in``.
    """

    __slots__ = ("factors", "shape")

    def __init__(self, num: int, factors: Callable[[], tuple[Tensor, Tensor]], shape: torch.Size) -> None:
        super().__init__(num)
        self.factors, self.shape = factors, shape

    def dense(self) -> Tensor:
        """Form the matrices."""
        a, b = self.factors()
        return (a.transpose(1, 2) @ b).reshape(self.num, *self.shape)


class Drawn(Tangent):
    """Directions drawn again from their key at every use, so that they are never stored."""

    __slots__ = ("draw",)

    def __init__(self, num: int, draw: Callable[[], Tensor]) -> None:
        super().__init__(num)
        self.draw = draw

    def dense(self) -> Tensor:
        """Draw them (the same numbers every time)."""
        return self.draw()
