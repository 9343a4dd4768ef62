"""The spike of an integrate-and-fire neuron, with a learnable threshold."""

from typing import Any

from torch import Tensor, nn

from dualnn.activations.base import Sample
from dualnn.activations.hard import Hard, hard_sample
from dualnn.activations.registry import register


def _reference(x: Any, threshold: Any) -> Any:
    return 1 if x >= threshold else 0


@register("spike")
class Spike(Hard):
    r"""The spike of an integrate-and-fire neuron at a learnable threshold theta per channel (a surrogate).

    .. math:: y = [v \ge \theta], \qquad \dot y = \beta P'(\beta (v - \theta)) \, (\dot v - \dot \theta)

    A gradient obtained through it is **biased**: it is that of P(beta (v - theta)), which the repr names, of every
    order, and the same in forward and in reverse mode.

    Why it exists: forward traces of a spiking network (its gradient on endless sequences) need a surrogate that is
    right in forward mode, and the threshold is a parameter like any other.

    Args:
        threshold: Initial theta.
        primitive: "atan", "sigmoid", "erf" or "triangle"; see `dualnn.layers.Surrogate` for all.
        sharpness: beta > 0.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        v: (*) or (N, num_channels, *) -> y: the same, 0 or 1. NaN gives NaN. bfloat16 and float16 are computed in
        float32.

    Raises:
        DualInputError: integer input; sharpness not positive.
        UnknownNameError: another `primitive`.

    Reference:
        Neftci, Mostafa, Zenke, "Surrogate gradient learning in spiking neural networks", 2019, arXiv 1901.09948. Fang
        et al., "Incorporating learnable membrane time constant to enhance learning of spiking neural networks", 2021,
        arXiv 2007.05785 (atan).

    Example:
        >>> import torch
        >>> act = Spike(threshold=0.5)
        >>> act(torch.tensor([0.2, 0.7])).sum().backward()
        >>> act.threshold.grad.item() < 0  # a higher threshold, fewer spikes
        True
    """

    def __init__(
        self, threshold: float = 0.0, primitive: str = "atan", sharpness: float = 2.0, num_channels: int = 1
    ) -> None:
        """Start every channel at the same threshold."""
        super().__init__(primitive, sharpness, num_channels)
        self.threshold = nn.Parameter(self.per_channel(threshold))

    @staticmethod
    def decide(u: Tensor) -> Tensor:
        """1 for u >= 0, else 0."""
        return (u >= 0).to(u.dtype)

    def natural(self) -> tuple[Tensor]:
        """The threshold, of shape (num_channels,)."""
        return (self.threshold,)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = (-9.0, -2.0, -0.6, -0.01, 0.03, 0.31, 1.4, 7.0)
        return [
            hard_sample({"sharpness": 2.0}, "atan", points, _reference),
            hard_sample({"threshold": 0.5, "primitive": "sigmoid", "sharpness": 4.0}, "sigmoid", points, _reference),
        ]
