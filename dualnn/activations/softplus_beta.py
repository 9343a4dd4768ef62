"""Softplus with a learnable sharpness."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: The sharpness stays above this: at 0 the value is infinite.
MINIMUM = 1e-2


def softplus(x: Tensor, beta: Tensor) -> Tensor:
    """log(1 + exp(beta x)) / beta, without overflow and without a cut-off."""
    return -F.logsigmoid(-beta * x) / beta


def _reference(x: Any, beta: Any) -> Any:
    import mpmath as mp

    return mp.log1p(mp.exp(beta * x)) / beta


@register("softplus_beta")
class SoftplusBeta(Activation):
    r"""Softplus with a learnable sharpness beta > 0 per channel: from a gentle bend to a ReLU.

    .. math:: y = \frac{1}{\beta} \log(1 + e^{\beta x}), \qquad y' = \frac{1}{1 + e^{-\beta x}}

    0 <= y - max(x, 0) <= log(2) / beta.

    Why it exists: `torch.nn.Softplus` takes beta as a fixed number, and is cut off: above `threshold` = 20 it is x,
    with a jump of 2e-9 and a curvature of exactly 0. This one is smooth everywhere, to every order.

    Args:
        beta: Initial sharpness, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same, >= 0. NaN gives NaN. bfloat16 and float16 are computed in
        float32.

    Raises:
        DualInputError: integer input; beta not above 0.01.

    Reference:
        Dugas et al., "Incorporating second-order functional knowledge for better option pricing", 2000.

    Example:
        >>> import torch
        >>> SoftplusBeta(beta=10.0)(torch.tensor([-1.0, 0.0, 1.0])).detach()
        tensor([4.5399e-06, 6.9315e-02, 1.0000e+00])
    """

    def __init__(self, beta: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same sharpness."""
        super().__init__(num_channels)
        if not beta > MINIMUM:
            raise DualInputError(f"softplus_beta: beta must exceed {MINIMUM}, got {beta}")
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(beta - MINIMUM)))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(softplus)

    def natural(self) -> tuple[Tensor]:
        """The sharpness, of shape (num_channels,)."""
        return (MINIMUM + F.softplus(self.raw),)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-25.0, -3.0, -0.6, 0.0, 0.5, 2.0, 25.0)
        return [Sample({}, points, _reference), Sample({"beta": 4.0}, points, _reference)]
