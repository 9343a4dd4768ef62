"""What the hard decisions share: the value of a step, the exact derivative of a smooth primitive that they name."""

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualnn.activations.base import Activation, Sample
from dualnn.activations.surrogates import PRIMITIVES, Primitive
from dualnn.engine.bridge import ClosedForm
from dualnn.engine.errors import DualInputError, unknown_name


class Hard(Activation):
    r"""Base of the hard decisions: the value of `decide`, the derivative of `primitives[primitive]`.

    .. math:: y = \mathrm{decide}(x - \theta), \qquad \dot y = \beta P'(\beta (x - \theta)) (\dot x - \dot \theta)

    One derivative in forward and in reverse mode; higher derivatives are those of the primitive P.

    A subclass sets `decide`, the table `primitives` it may take, and its samples; `natural` may give a threshold.

    Args:
        primitive: The name of P.
        sharpness: beta > 0.
        num_channels: 1, or the input's number of channels.

    Raises:
        UnknownNameError: another primitive.
        DualInputError: integer input; sharpness not positive.

    Example:
        >>> from dualnn.activations.sign import Sign
        >>> Sign()
        Sign(primitive='tanh', sharpness=1.0, biased gradient: the primitive's)
    """

    primitives: ClassVar[dict[str, Primitive]] = PRIMITIVES

    def __init__(self, primitive: str, sharpness: float = 1.0, num_channels: int = 1) -> None:
        """Fix the primitive."""
        super().__init__(num_channels)
        if primitive not in self.primitives:
            raise unknown_name(f"primitive of {self.name}", primitive, self.primitives)
        if not 0 < sharpness < math.inf:
            raise DualInputError(f"{self.name}: sharpness must be positive, got {sharpness}")
        self.primitive, self.sharpness = primitive, sharpness

    @staticmethod
    def decide(u: Tensor) -> Tensor:
        """The hard function; a NaN need not be kept."""
        raise NotImplementedError

    def _value(self, x: Tensor, *threshold: Tensor) -> Tensor:
        u = x - threshold[0] if threshold else x
        return torch.where(torch.isnan(u), u, self.decide(u))  # a comparison would hide a NaN

    def _slopes(self, y: Tensor, x: Tensor, *threshold: Tensor) -> tuple[Tensor, ...]:
        u = x - threshold[0] if threshold else x
        slope = self.sharpness * self.primitives[self.primitive].slope(self.sharpness * u)
        return (slope, -slope) if threshold else (slope,)

    @property
    def local(self) -> ClosedForm:
        """The decision's value and the primitive's derivative."""
        return ClosedForm(self._value, self._slopes)

    def describe(self) -> str:
        """Arguments for the repr: they say whose derivative is used."""
        return f"primitive={self.primitive!r}, sharpness={self.sharpness}, biased gradient: the primitive's"


def smooth(primitive: str, sharpness: float, x: Any, threshold: Any = 0) -> Any:
    """P(sharpness (x - threshold)) on mpmath numbers: the oracle of the derivatives."""
    import mpmath as mp

    oracles = {
        "sigmoid": lambda u: 1 / (1 + mp.exp(-u)),
        "tanh": mp.tanh,
        "atan": lambda u: mp.mpf(1) / 2 + mp.atan(mp.pi * u / 2) / mp.pi,
        "erf": mp.ncdf,
        "fast_sigmoid": lambda u: u / (1 + abs(u)),
        "sine": lambda u: u - mp.sin(2 * mp.pi * u) / (2 * mp.pi),
        "identity": lambda u: u,
    }
    return oracles[primitive](sharpness * (x - threshold))


def hard_sample(options: dict[str, Any], primitive: str, points: tuple[float, ...], reference: Any) -> Sample:
    """A sample with the named primitive as the oracle of its derivatives."""
    return Sample(options, points, reference, partial(smooth, primitive, options.get("sharpness", 1.0)))
