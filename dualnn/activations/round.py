"""Rounding to integers, trained by the derivative of a named primitive."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualnn.activations.base import Sample
from dualnn.activations.hard import Hard, hard_sample
from dualnn.activations.registry import register
from dualnn.activations.surrogates import PRIMITIVES, Primitive

SINE = Primitive(
    "u - sin(2 pi u) / (2 pi)",
    lambda u: u - torch.sin(2 * math.pi * u) / (2 * math.pi),
    lambda u: 1 - torch.cos(2 * math.pi * u),
)


def _reference(x: Any) -> Any:
    import mpmath as mp

    return mp.nint(x)  # half-way points to the even one, as torch.round


@register("round")
class Round(Hard):
    r"""The nearest integer, trained by the derivative of a named primitive (a surrogate).

    .. math:: y = \mathrm{round}(x), \qquad \dot y = P'(x) \, \dot x

    - "sine": P(x) = x - sin(2 pi x) / (2 pi), the smooth staircase through all integers and half-integers: P' = 0 at an
      integer, where y is at rest, 2 half-way, where y jumps, 1 on average.
    - "identity": P(x) = x, the straight-through estimator.

    A gradient obtained through it is **biased**: it is that of P, which the repr names, of every order, and the same in
    forward and in reverse mode. For b bits between bounds see `quantize`.

    Why it exists: counts, bins and integer latents stop backprop: `torch.round` answers with a gradient of zero.

    Args:
        primitive: "sine" or "identity".

    Shape:
        x: (*) -> y: the same, half-way points to the even integer. NaN gives NaN. bfloat16 and float16 are computed in
        float32.

    Raises:
        DualInputError: integer input.
        UnknownNameError: another `primitive`.

    Reference:
        Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons", 2013,
        arXiv 1308.3432 (straight-through).

    Example:
        >>> x = torch.tensor([0.25, 1.5], requires_grad=True)
        >>> Round()(x).sum().backward()
        >>> Round()(x).detach(), x.grad
        (tensor([0., 2.]), tensor([1., 2.]))
    """

    primitives: ClassVar[dict[str, Primitive]] = {"sine": SINE, "identity": PRIMITIVES["identity"]}

    def __init__(self, primitive: str = "sine") -> None:
        """Fix the primitive."""
        super().__init__(primitive)

    @staticmethod
    def decide(u: Tensor) -> Tensor:
        """The nearest integer."""
        return torch.round(u)

    def describe(self) -> str:
        """Arguments for the repr: they say whose derivative is used."""
        return f"primitive={self.primitive!r}, biased gradient: the primitive's"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = (-7.3, -1.45, -0.8, 0.0, 0.3, 0.55, 2.2)
        return [
            hard_sample({}, "sine", points, _reference),
            hard_sample({"primitive": "identity"}, "identity", points, _reference),
        ]
