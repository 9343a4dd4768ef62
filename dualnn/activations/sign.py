"""The sign, trained by the derivative of a named primitive."""

from typing import Any

import torch
from torch import Tensor

from dualnn.activations.base import Sample
from dualnn.activations.hard import Hard, hard_sample
from dualnn.activations.registry import register


def _reference(x: Any) -> Any:
    return (x > 0) - (x < 0)


@register("sign")
class Sign(Hard):
    r"""The sign (a binary activation, -1 or 1), trained by the derivative of a named primitive (a surrogate).

    .. math:: y = \mathrm{sign}(x), \qquad \dot y = \beta P'(\beta x) \, \dot x

    A gradient obtained through it is **biased**: it is that of P(beta x), which the repr names, of every order, and the
    same in forward and in reverse mode.

    Why it exists: binarised networks need it, and `torch.sign` answers with a gradient of zero, without a word.

    Args:
        primitive: "tanh" and "fast_sigmoid" rise from -1 to 1; "identity-clip" and "identity" are the straight-through
            estimators of binarised networks. See `dualnn.layers.Surrogate` for all.
        sharpness: beta > 0.

    Shape:
        x: (*) -> y: the same, -1, 0 (at x = 0 only) or 1. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; sharpness not positive.
        UnknownNameError: another `primitive`.

    Reference:
        Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, "Binarized neural networks", 2016, arXiv 1602.02830.

    Example:
        >>> x = torch.tensor([-1.0, 0.5], requires_grad=True)
        >>> Sign()(x).sum().backward()
        >>> Sign()(x).detach(), x.grad
        (tensor([-1.,  1.]), tensor([0.4200, 0.7864]))
    """

    def __init__(self, primitive: str = "tanh", sharpness: float = 1.0) -> None:
        """Fix the primitive."""
        super().__init__(primitive, sharpness)

    @staticmethod
    def decide(u: Tensor) -> Tensor:
        """-1, 0 or 1."""
        return torch.sign(u)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = (-9.0, -2.0, -0.6, -0.01, 0.02, 0.3, 1.4, 7.0)
        return [
            hard_sample({}, "tanh", points, _reference),
            hard_sample({"primitive": "fast_sigmoid", "sharpness": 3.0}, "fast_sigmoid", points, _reference),
        ]
