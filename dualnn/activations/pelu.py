"""PELU: the member of the PReLU family whose derivative is continuous."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError

#: Both parameters stay above this, so that neither the slope nor its inverse vanishes.
MINIMUM = 1e-2


def pelu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(a / b) x for x > 0, a (exp(x / b) - 1) for x <= 0."""
    # The clamp keeps exp from overflowing in the branch that is not taken: inf * 0 in its derivative would be NaN.
    return torch.where(x > 0, a / b * x, a * torch.expm1(x.clamp(max=0) / b))


def _reference(x: Any, a: Any, b: Any) -> Any:
    import mpmath as mp

    return a / b * x if x > 0 else a * (mp.exp(x / b) - 1)


@register("pelu")
class PELU(Activation):
    r"""The parametric ELU: a linear half and a saturating half with learnable a, b > 0 per channel.

    .. math:: y = \frac{a}{b} x \; (x > 0), \qquad y = a (e^{x/b} - 1) \; (x \le 0)

    It learns slope (a / b), the bound on the left (-a) and the width of the bend (b) at once; a = b = 1 is ELU.

    Why it exists: of the PReLU family (`torch.nn.PReLU`, `RReLU`, `CELU`, `ELU`) torch learns the slope of one half
    only. This is the member with every part learnable *and* a continuous derivative, so that Newton-type methods and
    physics losses can use it. The second derivative jumps at 0 (a / b^2 on the left, which is also taken at 0; 0 on the
    right).

    Args:
        a: Initial bound, > 0.01.
        b: Initial width, > 0.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same, > -a. NaN gives NaN. bfloat16 and float16 are computed in
        float32.

    Raises:
        DualInputError: integer input; a or b not above 0.01.

    Reference:
        Trottier, Giguère, Chaib-draa, "Parametric exponential linear unit for deep convolutional neural networks",
        2016, arXiv 1605.09332.

    Example:
        >>> PELU(a=2.0)(torch.tensor([-1.0, 0.0, 1.0])).detach()
        tensor([-1.2642,  0.0000,  2.0000])
    """

    def __init__(self, a: float = 1.0, b: float = 1.0, num_channels: int = 1) -> None:
        """Start every channel at the same a, b."""
        super().__init__(num_channels)
        if not min(a, b) > MINIMUM:
            raise DualInputError(f"pelu: a and b must exceed {MINIMUM}, got {a=}, {b=}")
        self.raw_a = nn.Parameter(self.per_channel(inverse_softplus(a - MINIMUM)))
        self.raw_b = nn.Parameter(self.per_channel(inverse_softplus(b - MINIMUM)))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(pelu)

    def natural(self) -> tuple[Tensor, Tensor]:
        """The current (a, b), each of shape (num_channels,)."""
        return MINIMUM + F.softplus(self.raw_a), MINIMUM + F.softplus(self.raw_b)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-20.0, -3.0, -0.5, -0.04, 0.2, 1.0, 9.0)
        return [Sample({}, points, _reference), Sample({"a": 0.4, "b": 2.0}, points, _reference)]
