"""A bump: the Gaussian with learnable centre and width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: The width stays above this.
MINIMUM = 1e-3


def gaussian(x: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """exp(-(x - mu)^2 / (2 sigma^2))."""
    return torch.exp(-0.5 * ((x - mu) / sigma) ** 2)


def _reference(x: Any, mu: Any, sigma: Any) -> Any:
    import mpmath as mp

    return mp.npdf(x, mu, sigma) / mp.npdf(mu, mu, sigma)


@register("gaussian")
class Gaussian(Activation):
    r"""A bump of height 1 with a learnable centre mu and width sigma > 0 per channel.

    .. math:: y = \exp\left(-\frac{(x - \mu)^2}{2 \sigma^2}\right)

    Why it exists: it answers where its input *is*, not how large it is: a radial basis unit, and in coordinate networks
    a learnable bandwidth without the Fourier features that ReLU needs. torch has none.

    Args:
        mu: Initial centre.
        sigma: Initial width, > 0.001.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same, in [0, 1]. NaN gives NaN. Far out value and derivatives
        underflow to 0. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; sigma not above 0.001.

    Reference:
        Broomhead, Lowe, "Multivariable functional interpolation and adaptive networks", 1988. Ramasinghe, Lucey,
        "Beyond periodicity: towards a unifying framework for activations in coordinate-MLPs", 2021, arXiv 2111.15135.

    Example:
        >>> Gaussian(mu=1.0)(torch.tensor([0.0, 1.0]))
        tensor([0.6065, 1.0000], grad_fn=...)
    """

    def __init__(self, mu: float = 0.0, sigma: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same bump."""
        super().__init__(num_channels)
        if not sigma > MINIMUM:
            raise DualInputError(f"gaussian: sigma must exceed {MINIMUM}, got {sigma}")
        self.mu = nn.Parameter(self.per_channel(mu))
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(sigma - MINIMUM)))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(gaussian)

    def natural(self) -> tuple[Tensor, Tensor]:
        """Centre and width, each of shape (num_channels,)."""
        return self.mu, MINIMUM + F.softplus(self.raw)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-6.0, -2.0, -0.7, 0.0, 0.4, 1.3, 3.0)
        return [Sample({}, points, _reference), Sample({"mu": 0.5, "sigma": 2.0}, points, _reference)]
