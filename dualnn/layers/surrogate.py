"""`Surrogate`: the value of a hard function with the exact derivative of a smooth one that is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.activations.surrogates import PRIMITIVES, Primitive, register_primitive
from dualnn.engine.bridge import ClosedForm, elementwise
from dualnn.engine.bridge_linear import untouched
from dualnn.engine.errors import DualInputError, StructureError, unknown_name
from dualnn.layers.held import HoldsFunctions


class Surrogate(HoldsFunctions):
    r"""Apply a hard elementwise function, and differentiate a named smooth primitive in its place.

    .. math:: y = f(x), \qquad \dot y = \frac{d}{dx} P(\beta x) \, \dot x = \beta P'(\beta x) \, \dot x

    The derivative of f itself is zero almost everywhere (a spike, a sign, a rounding): there is nothing to recover. The
    gradient obtained through a surrogate is therefore **biased**: it is that of another function, which the repr names.
    It is one derivative in forward and in reverse mode; higher derivatives are those of the primitive.

    Args:
        fn: Elementwise function of one tensor; booleans and integers are converted to the input's dtype.
        primitive: The name of P, or a `Primitive` of your own:

            ================= ================================ ==========================
            name              P(u)                             P'(u)
            ================= ================================ ==========================
            ``sigmoid``       1 / (1 + exp(-u))                P (1 - P)
            ``atan``          1/2 + atan(pi u / 2) / pi        1 / (2 (1 + (pi u / 2)^2))
            ``erf``           (1 + erf(u / sqrt(2))) / 2       the normal density
            ``triangle``      1/2 + u - u|u|/2 within [-1, 1]  max(0, 1 - \|u\|)
            ``tanh``          tanh(u)                          1 - P^2
            ``fast_sigmoid``  u / (1 + \|u\|)                  1 / (1 + \|u\|)^2
            ``identity``      u                                1 (straight-through)
            ``identity-clip`` clamp(u, -1, 1)                  1 within [-1, 1], else 0
            ================= ================================ ==========================

            The first four rise from 0 to 1, as a step does; ``tanh`` and ``fast_sigmoid`` from -1 to 1, as a sign does.
        sharpness: beta > 0.

    Shape:
        x: (*) -> y: the same. NaN gives NaN.

    Raises:
        UnknownNameError: An unknown primitive; the nearest one is named.
        DualInputError: Input that is not floating point; a function that changes its input.
        StructureError: The function returns another shape.

    Reference:
        Neftci, Mostafa, Zenke, "Surrogate gradient learning in spiking neural networks", 2019, arXiv 1901.09948.

    Example:
        >>> spike = Surrogate(lambda v: v > 0, "atan")
        >>> v = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> spike(v)
        tensor([0., 0., 1.], grad_fn=<...>)
        >>> spike(v).sum().backward()
        >>> v.grad
        tensor([0.1442, 0.5000, 0.0460])
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], primitive: str | Primitive, sharpness: float = 1.0) -> None:
        super().__init__(fn)
        if not isinstance(primitive, Primitive) and primitive not in PRIMITIVES:
            raise unknown_name("surrogate primitive", primitive, PRIMITIVES)
        if not 0 < sharpness < math.inf:
            raise DualInputError(f"Surrogate: sharpness must be positive, got {sharpness}")
        self.sharpness = sharpness
        # A name is kept as a name: it pickles, a table of lambdas does not.
        self.primitive = primitive

    def of(self) -> Primitive:
        """The primitive."""
        return self.primitive if isinstance(self.primitive, Primitive) else PRIMITIVES[self.primitive]

    def smooth(self, x: Tensor) -> Tensor:
        """The primitive itself, P(sharpness * x): what the derivative belongs to."""
        return self.of().value(self.sharpness * x)

    def extra_repr(self) -> str:
        """The function, and whose derivative stands in for its own."""
        name = self.primitive.equation if isinstance(self.primitive, Primitive) else self.primitive
        return f"{self.label}, primitive={name!r}, sharpness={self.sharpness}, biased gradient: the primitive's"

    # Wrapping torch's compiler around a user's hard function gains nothing: one clean graph break instead.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Apply the hard function."""
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DualInputError(f"{self.name} needs a floating point tensor, got {got}: convert it (x.float())")
        return elementwise(ClosedForm(self._value, self._slope), x)

    def _slope(self, y: Tensor, x: Tensor) -> tuple[Tensor]:
        return (self.sharpness * self.of().slope(self.sharpness * x),)

    def _value(self, x: Tensor) -> Tensor:
        def hard(x: Tensor) -> tuple[Any]:
            return (self.fn(x),)

        y = untouched(self.name, hard, (x,))[0]
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise StructureError(f"{self.name}: the function must return the input's shape {tuple(x.shape)}, got {got}")
        return torch.where(torch.isnan(x), x, y.to(x.dtype))  # a comparison would hide a NaN


__all__ = ["PRIMITIVES", "Primitive", "Surrogate", "register_primitive"]
