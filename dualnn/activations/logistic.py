"""The flow of logistic growth over unit time, with learnable rate and capacity."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: Rate and capacity stay above this.
MINIMUM = 1e-2


def logistic(x: Tensor, rate: Tensor, capacity: Tensor) -> Tensor:
    """X / (exp(-r) + abs(x) (1 - exp(-r)) / K): no exponential that overflows."""
    return x / (torch.exp(-rate) - x.abs() * torch.expm1(-rate) / capacity)


def _reference(x: Any, rate: Any, capacity: Any) -> Any:
    import mpmath as mp

    # The flow multiplies the odds y / (K - y) by exp(rate).
    odds = abs(x) / (capacity - abs(x)) * mp.exp(rate)
    return mp.sign(x) * capacity * odds / (1 + odds)


@register("logistic")
class Logistic(Activation):
    r"""Where logistic growth carries x in unit time: a softsign whose gain and bound are learned per channel.

    .. math:: \frac{dy}{dt} = r y \left(1 - \frac{|y|}{K}\right), \; y(0) = x \quad \Rightarrow \quad
       y(1) = \frac{x}{e^{-r} + |x| (1 - e^{-r}) / K}

    Slope e^r at 0; 0 and +-K are fixed points; bounded by K / (1 - e^-r). (Odd in x: the flow of the plain logistic
    equation blows up for negative x.)

    Why it exists: an activation that is the flow of an ODE has an inverse (time reversed, r -> -r) and parameters that
    mean something. It nears its bound as 1 / x does, so that its gradient does not vanish exponentially as tanh's does.

    Args:
        rate: Initial r, > 0.01.
        capacity: Initial K, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do infinite inputs. The second derivative jumps
        at x = 0, where 0 is taken. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; rate or capacity not above 0.01.

    Reference:
        Verhulst, "Notice sur la loi que la population suit dans son accroissement", 1838. Chen, Rubanova, Bettencourt,
        Duvenaud, "Neural ordinary differential equations", 2018, arXiv 1806.07366.

    Example:
        >>> Logistic(capacity=2.0)(torch.tensor([0.0, 2.0, 1e6])).detach()
        tensor([0.0000, 2.0000, 3.1639])
    """

    def __init__(self, rate: float = 1.0, capacity: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same growth."""
        super().__init__(num_channels)
        if not min(rate, capacity) > MINIMUM:
            raise DualInputError(f"logistic: rate and capacity must exceed {MINIMUM}, got {rate=}, {capacity=}")
        self.raw_rate = nn.Parameter(self.per_channel(inverse_softplus(rate - MINIMUM)))
        self.raw_capacity = nn.Parameter(self.per_channel(inverse_softplus(capacity - MINIMUM)))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(logistic)

    def natural(self) -> tuple[Tensor, Tensor]:
        """Rate and capacity, each of shape (num_channels,)."""
        return MINIMUM + F.softplus(self.raw_rate), MINIMUM + F.softplus(self.raw_capacity)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (away from 0, where the second derivative jumps)."""
        points = (-30.0, -1.3, -0.2, 0.05, 0.6, 4.0)
        return [
            Sample({}, points, _reference, step=2e-4),
            Sample({"rate": 0.4, "capacity": 2.5}, points, _reference, step=2e-4),
        ]
