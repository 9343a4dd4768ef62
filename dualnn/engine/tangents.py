r"""Representations of a tangent: one small protocol, several ways to store K directions.

A dual number is :math:`x + \sum_k \varepsilon_k \dot x_k`, with :math:`\varepsilon_j \varepsilon_k = 0`. Its tangent
is the tensor of all :math:`\dot x_k`, of shape ``(K, *primal.shape)``. Often it need not exist as such: it is
structurally zero, of low rank, or can be drawn again when it is needed. A rule asks the protocol
(`scale`, `map`, `plus`, `dense`) and never the class, except where an op can use a factorisation (linear, conv).

=============  =================================================================================
`Zero`         no dependence at all: 0 times infinity stays 0, and nothing is computed
`Dense`        the tensor itself
`PerSample`    dense, after the batch axis was reduced: direction ``k * batch + b`` perturbs sample b only
`Separate`     one direction per argument of an elementwise function, kept apart and unbroadcast
`LowRank`      :math:`\dot W_k = \sum_r a_{kr} b_{kr}^T`, for weights (never forms the matrix in linear)
`Drawn`        regenerated from its key at every use, not stored
=============  =================================================================================

The place for a *scaled* tangent (a primal-shaped factor times a shared base) is here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.errors import StructureError


class Tangent:
    """K directions of one tensor: base of all representations."""

    __slots__ = ("num",)
    is_zero = False

    def __init__(self, num: int) -> None:
        self.num = num

    def dense(self) -> Tensor:
        """The directions as one tensor ``(K, *shape)``."""
        raise NotImplementedError

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Multiply every direction by ``factor``, broadcast to the result's ``shape``.

        Args:
            factor: A derivative, of any shape that broadcasts to ``shape``, or a number.
            shape: Shape of the op's result.
            singular: The factor may be infinite; a direction that is exactly zero there stays zero.
        """
        return Dense(scaled(self.dense(), factor, shape, singular))

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

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tangent:
        """Zero, without calling ``fn``."""
        return self

    def plus(self, other: Tangent | None) -> Tangent:
        """The other tangent."""
        return self if other is None else other


class Dense(Tangent):
    """All directions in one tensor ``(K, *shape)``."""

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        self.num = data.shape[0]
        self.data = data

    def dense(self) -> Tensor:
        """The stored tensor itself."""
        return self.data


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
    a full tensor.
    """

    __slots__ = ("parts", "shape")

    def __init__(self, num: int, parts: dict[int, Tensor], shape: torch.Size) -> None:
        super().__init__(num)
        self.parts, self.shape = parts, shape

    def dense(self) -> Tensor:
        """All directions, with zeros for those that are absent."""
        some = next(iter(self.parts.values()))
        none = torch.zeros((), dtype=some.dtype, device=some.device)
        return torch.stack([self.parts.get(k, none).expand(self.shape) for k in range(self.num)])

    def scale(self, factor: Tensor | float, shape: torch.Size, singular: bool = False) -> Tangent:
        """Scale each part that is present."""
        parts = {
            k: scaled(p[None], factor, shape, singular)[0] if singular else p * factor for k, p in self.parts.items()
        }
        return Separate(self.num, parts, shape)

    def plus(self, other: Tangent | None) -> Tangent:
        """Sum part by part."""
        if not isinstance(other, Separate):
            return super().plus(other)
        parts = dict(self.parts)
        for k, p in other.parts.items():
            parts[k] = parts[k] + p if k in parts else p
        return Separate(self.num, parts, self.shape)


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


def aligned(data: Tensor, ndim: int) -> Tensor:
    """Insert axes after K so that ``data`` broadcasts against results of ``ndim`` dimensions."""
    missing = ndim + 1 - data.dim()
    if missing <= 0:
        return data
    return data.reshape(data.shape[:1] + (1,) * missing + data.shape[1:])


def scaled(data: Tensor, factor: Tensor | float, shape: torch.Size, singular: bool) -> Tensor:
    """``factor * data`` for directions ``(K, *s)``, of shape ``(K, *shape)``."""
    data = aligned(data, len(shape))
    if singular and not _surely_finite(factor):
        # log at 0 with directions (0, 1) has derivatives (0, inf): an exact zero does not meet the infinity.
        factor = torch.where(data == 0, torch.zeros((), dtype=data.dtype, device=data.device), factor)
    out = data if isinstance(factor, float) and factor == 1.0 else data * factor
    full = (data.shape[0], *shape)
    return out if out.shape == full else out.expand(full)


def _surely_finite(factor: Tensor | float) -> bool:
    """Whether a look at the numbers shows that they are finite; on devices where a look waits, no."""
    if not isinstance(factor, Tensor):
        return math.isfinite(factor)
    if type(factor) not in (Tensor, torch.nn.Parameter) or factor.device.type != "cpu":
        return False
    return not is_functorch_wrapped_tensor(factor) and bool(torch.isfinite(factor).all())
