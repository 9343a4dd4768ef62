"""A learnable rational function with a denominator that cannot vanish (a safe Padé activation unit)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: Leaky ReLU (slope 0.01) by least squares on [-3, 3]: off by 0.034 at most. The odd terms below the line are 0, as
#: x / 2 and |x| / 2 ask for.
NUMERATOR = (0.0336, 0.505, 1.6513, 2.0045, 0.9279, 0.1515)
DENOMINATOR = (0.0, 3.9693, 0.0, 0.3001)


def rational(x: Tensor, *coefficients: Tensor, split: int) -> Tensor:
    """sum_i a_i x^i / (1 + abs(sum_j b_j x^j)), j >= 1; the first `split` coefficients are a."""
    above, below = coefficients[:split], coefficients[split:]
    # Horner's scheme; the first product is with a tensor of x's shape, so that every coefficient broadcasts.
    p = above[-1] + torch.zeros_like(x)
    for a in reversed(above[:-1]):
        p = p * x + a
    q = below[-1] * x
    for b in reversed(below[:-1]):
        q = (q + b) * x
    return p / (1 + q.abs())


def _reference(split: int, x: Any, *coefficients: Any) -> Any:
    import mpmath as mp

    above, below = coefficients[:split], coefficients[split:]
    return mp.polyval(above[::-1], x) / (1 + abs(mp.polyval([*below[::-1], 0], x)))


@register("rational")
class Rational(Activation):
    r"""A rational function with learnable coefficients per channel: a Padé activation unit with a safe denominator.

    .. math:: y = \frac{\sum_{i=0}^{m} a_i x^i}{1 + \left| \sum_{j=1}^{n} b_j x^j \right|}

    The denominator is at least 1, so that there are no poles (the safe form of the paper). The price: where the inner
    polynomial Q changes its sign, at x = 0 among other places unless b_1 = 0, the derivative jumps; there the
    derivative of abs counts as 0, as in torch. It starts close to a leaky ReLU, with Q >= 0 everywhere: smooth.

    Why it exists: with ten numbers a channel it comes close to every common activation function, and to the one that
    the data ask for. It is one formula of plain tensor operations; the published implementation is a CUDA extension.

    Args:
        numerator: a_0 ... a_m.
        denominator: b_1 ... b_n. m = n + 1 makes it grow as a line does.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN, as do inputs whose power m overflows. bfloat16 and
        float16 are computed in float32.

    Raises:
        DualInputError: integer input; no numerator or denominator.

    Reference:
        Molina, Schramowski, Kersting, "Padé activation units: end-to-end learning of flexible activation functions in
        deep networks", 2019, arXiv 1907.06732.

    Example:
        >>> Rational(numerator=(0.0, 1.0), denominator=(2.0,))(torch.tensor([-1.0, 3.0])).detach()  # x / (1 + |2 x|)
        tensor([-0.3333,  0.4286])
    """

    def __init__(
        self,
        numerator: Sequence[float] = NUMERATOR,
        denominator: Sequence[float] = DENOMINATOR,
        num_channels: int = 1,
    ) -> None:
        """Start every channel at the same function."""
        super().__init__(num_channels)
        if not len(numerator) or not len(denominator):
            raise DualInputError("rational: numerator and denominator need at least one coefficient each")
        self.numerator = nn.Parameter(self.per_channel_row(numerator))
        self.denominator = nn.Parameter(self.per_channel_row(denominator))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(partial(rational, split=self.numerator.shape[1]))

    def natural(self) -> tuple[Tensor, ...]:
        """a_0 ... a_m, b_1 ... b_n, each of shape (num_channels,)."""
        return (*self.numerator.unbind(-1), *self.denominator.unbind(-1))

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"degrees=({self.numerator.shape[1] - 1}, {self.denominator.shape[1]})"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (away from the zeros of Q, where the derivative jumps)."""
        small = {"numerator": (0.2, -1.0, 0.7), "denominator": (1.5, -0.8)}
        return [
            Sample({}, (-3.0, -0.4, 0.9, 2.2), partial(_reference, len(NUMERATOR))),
            Sample(small, (-5.0, -1.1, 0.4, 1.2, 3.0), partial(_reference, 3)),
        ]
