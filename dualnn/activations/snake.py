"""Snake: x + sin^2(a x) / a with a learnable frequency."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: The frequency stays above this: at 0 the formula divides 0 by 0.
MINIMUM = 1e-3


def snake(x: Tensor, a: Tensor) -> Tensor:
    """X + sin^2(a x) / a."""
    return x + torch.sin(a * x) ** 2 / a


def _reference(x: Any, a: Any) -> Any:
    import mpmath as mp

    return x + (1 - mp.cos(2 * a * x)) / (2 * a)


@register("snake")
class Snake(Activation):
    r"""The identity plus a periodic part of learnable frequency a > 0 per channel.

    .. math:: y = x + \frac{\sin^2(a x)}{a}, \qquad y' = 1 + \sin(2 a x)

    Never decreasing; the period is pi / a.

    Why it exists: networks of ReLU or tanh cannot continue a periodic signal outside their training range; this one
    can, and finds the period, a per channel, by itself. torch has no periodic activation.

    Args:
        a: Initial frequency, > 0.001; larger for faster signals.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do infinite inputs (sin of infinity).
        bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; a not above 0.001.

    Reference:
        Ziyin, Hartwig, Ueda, "Neural networks fail to learn periodic functions and how to fix it", 2020,
        arXiv 2006.08195.

    Example:
        >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> Snake()(x).sum().backward()
        >>> x.grad
        tensor([1.0000, 1.9093])
    """

    def __init__(self, a: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same frequency."""
        super().__init__(num_channels)
        if not a > MINIMUM:
            raise DualInputError(f"snake: the frequency a must exceed {MINIMUM}, got {a}")
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(a - MINIMUM)))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(snake)

    def natural(self) -> tuple[Tensor]:
        """The frequency, of shape (num_channels,)."""
        return (MINIMUM + F.softplus(self.raw),)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-12.0, -2.5, -0.4, 0.0, 0.3, 1.1, 6.0)
        return [Sample({}, points, _reference), Sample({"a": 0.2}, points, _reference)]
