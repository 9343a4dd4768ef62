"""Maxout: the largest of several learnable lines."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError


def maxout(x: Tensor, *lines: Tensor) -> Tensor:
    """max_j (slope_j x + offset_j), `lines` being all slopes, then all offsets."""
    half = len(lines) // 2
    y = lines[0] * x + lines[half]
    for slope, offset in zip(lines[1:half], lines[half + 1 :], strict=True):
        y = torch.maximum(y, slope * x + offset)
    return y


def _reference(x: Any, *lines: Any) -> Any:
    half = len(lines) // 2
    return max(a * x + b for a, b in zip(lines[:half], lines[half:], strict=True))


@register("maxout")
class Maxout(Activation):
    r"""A maxout unit on each entry: the upper envelope of learnable lines, per channel.

    .. math:: y = \max_{j=1}^{p} (a_j x + b_j)

    Any convex piecewise linear function of p pieces; ReLU, leaky ReLU, PReLU and abs are among them. It starts as the
    envelope of p tangents of softplus. (Pooling channels instead, the other half of a maxout layer, needs no
    parameters: ``x.unflatten(1, (p, -1)).amax(1)``.)

    Why it exists: it learns the *kinks*, places as well as slopes, where PReLU learns a slope at a kink fixed at 0.

    Args:
        pieces: p, the number of lines, >= 2.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN. At a kink both lines share the derivative (1/2
        each), as `torch.maximum`. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; fewer than 2 pieces.

    Reference:
        Goodfellow, Warde-Farley, Mirza, Courville, Bengio, "Maxout networks", 2013, arXiv 1302.4389.

    Example:
        >>> act = Maxout(pieces=2)
        >>> act(torch.tensor([-3.0, 3.0])) >= 0
        tensor([True, True])
    """

    def __init__(self, pieces: int = 3, num_channels: int = 1) -> None:
        """Start every channel at the tangents of softplus."""
        super().__init__(num_channels)
        if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 2:
            raise DualInputError(f"maxout: pieces must be an integer >= 2, got {pieces!r}")
        self.pieces = pieces
        at = [-2 + 4 * j / (pieces - 1) for j in range(pieces)]
        slopes = [1 / (1 + math.exp(-t)) for t in at]
        self.slopes = nn.Parameter(self.per_channel_row(slopes))
        offsets = [math.log1p(math.exp(t)) - t * a for t, a in zip(at, slopes, strict=True)]
        self.offsets = nn.Parameter(self.per_channel_row(offsets))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(maxout)

    def natural(self) -> tuple[Tensor, ...]:
        """All slopes, then all offsets, each of shape (num_channels,)."""
        return (*self.slopes.unbind(-1), *self.offsets.unbind(-1))

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"pieces={self.pieces}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-7.0, -1.6, -0.4, 0.3, 1.7, 5.0)
        return [Sample({"pieces": 2}, points, _reference), Sample({}, points, _reference)]
