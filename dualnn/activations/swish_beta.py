"""Swish with a learnable slope."""

from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample
from dualnn.activations.registry import register


def swish(x: Tensor, beta: Tensor) -> Tensor:
    """X times sigmoid(beta x)."""
    return x * torch.sigmoid(beta * x)


def _reference(x: Any, beta: Any) -> Any:
    import mpmath as mp

    return x / (1 + mp.exp(-beta * x))


@register("swish_beta")
class SwishBeta(Activation):
    r"""Swish with a learnable slope beta per channel.

    .. math:: y = \frac{x}{1 + e^{-\beta x}}, \qquad y' = \sigma + \beta x \sigma (1 - \sigma), \quad
       \sigma = \frac{1}{1 + e^{-\beta x}}

    beta = 0 is x / 2, beta = 1 is `torch.nn.SiLU`, beta = 1.702 is close to GELU, beta -> inf tends to ReLU.

    Why it exists: torch has Swish at beta = 1 only; every channel finds its own place between linear and ReLU.

    Args:
        beta: Initial slope, any real number.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input.

    Reference:
        Ramachandran, Zoph, Le, "Searching for activation functions", 2017, arXiv 1710.05941.

    Example:
        >>> SwishBeta(beta=2.0)(torch.tensor([0.0, 1.0])).tolist()
        [0.0, 0.8807970285415649]
    """

    def __init__(self, beta: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same slope."""
        super().__init__(num_channels)
        self.beta = nn.Parameter(self.per_channel(beta))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(swish)

    def natural(self) -> tuple[Tensor]:
        """The slope, of shape (num_channels,)."""
        return (self.beta,)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-30.0, -4.0, -1.2, -0.1, 0.0, 0.7, 3.0, 50.0)
        return [Sample({}, points, _reference), Sample({"beta": -0.6}, points, _reference)]
