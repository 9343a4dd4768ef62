"""`LeakyFire`: leaky integrate-and-fire neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualnn.engine.errors import DualInputError
from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.node import Rows
from dualnn.layers.surrogate import Primitive, Surrogate


def _fires(v: Tensor) -> Tensor:
    return v > 0


class LeakyFire(OnlineCell):
    r"""Leaky integrate-and-fire neurons, with online gradients that are exact for a named surrogate.

    .. math:: v_t = a \odot v_{t-1} + W x_t + b - \vartheta z_{t-1}, \qquad z_t = H(v_t - \vartheta), \qquad
        a = \sigma(\lambda)

    The derivative of the step H is zero or infinite. In its place stands that of a smooth primitive
    (`dualnn.layers.Surrogate`): the gradient is **biased**, and it is the same one online, recorded and forward. The
    neurons do not see one another's spikes (feed them back through x if they should; that path is then cut at every
    window, which is what e-prop does). e-prop's eligibility trace is this cell's trace without the reset's term.

    See `OnlineCell` for its two modes and for what is exact.

    Args:
        input_size: I.
        hidden_size: N.
        primitive: The surrogate's name, or a `Primitive`.
        sharpness: Its steepness.
        leak: Where a starts, between 0 and 1; learned for each neuron.
        threshold: The voltage at which a neuron fires, which a spike takes away.

    Shape:
        x: (T, B, I) -> spikes: (T, B, N); ``step``: (B, I) -> (B, N). ``weight: (N, I), leak: (N,)``.

    Raises:
        DualInputError: A leak outside (0, 1), a threshold that is not positive; integer inputs, an empty window.
        DualShapeError: Inputs or a state of another shape or dtype.
        UnknownNameError: An unknown primitive.

    Reference:
        Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
        Communications 11, 3625, 2020. Surrogates: Neftci, Mostafa, Zenke, 2019, arXiv 1901.09948.

    Example:
        >>> cell = LeakyFire(3, 4, primitive="fast_sigmoid")
        >>> spikes, state = cell.window(torch.randn(20, 2, 3))
        >>> (spikes.mean() - 0.1).square().backward()
        >>> cell.leak.grad.shape
        torch.Size([4])
    """

    own_names: ClassVar[tuple[str, ...]] = ("leak",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        primitive: str | Primitive = "atan",
        sharpness: float = 1.0,
        leak: float = 0.9,
        threshold: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if not 0 < leak < 1:
            raise DualInputError(f"LeakyFire: leak must lie between 0 and 1, got {leak}")
        if not 0 < threshold < math.inf:
            raise DualInputError(f"LeakyFire: threshold must be positive, got {threshold}")
        self.threshold = threshold
        self.spike = Surrogate(_fires, primitive, sharpness)
        self.leak = nn.Parameter(torch.full((hidden_size,), math.log(leak / (1 - leak))))

    def advance(self, state: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """Leak, integrate, take away what the last spike spent."""
        (v,) = state
        spent = self.threshold * self.spike(v - self.threshold)
        return (torch.sigmoid(own[0]) * v + drives[0] - spent,)

    def values(self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """Without the surrogate, which matters to derivatives only."""
        a, v, seen = torch.sigmoid(own[0]), start[0], []
        for u in projected.unbind(0):
            v = torch.addcmul(u, a, v).sub_((v > self.threshold).to(v.dtype), alpha=self.threshold)
            seen.append(v)
        return [torch.stack(seen)]

    def linearise(
        self, before: Sequence[Tensor], after: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor | None]]:
        """In closed form."""
        return [[torch.sigmoid(own[0]) - self.threshold * self._slope(before[0])]], [before[0]]

    def pull(self, kept: Sequence[Any], vector: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """In closed form."""
        a = torch.sigmoid(own[0])
        return vector[0].unsqueeze(2), ((vector[0] * kept[0]).sum(0) * (a * (1 - a))).unsqueeze(1)

    def output(self, state: Sequence[Tensor]) -> Tensor:
        """The spikes."""
        return self.spike(state[0] - self.threshold)

    def output_adjoint(self, grad: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
        """By the surrogate's slope."""
        return (grad * self._slope(state[0]),)

    def _slope(self, v: Tensor) -> Tensor:
        beta = self.spike.sharpness
        return beta * self.spike.of().slope(beta * (v - self.threshold))

    def extra_repr(self) -> str:
        """The sizes and the threshold."""
        return f"{super().extra_repr()}, threshold={self.threshold}"
