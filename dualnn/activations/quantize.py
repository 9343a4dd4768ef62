"""A b-bit quantiser whose tangent is the exact derivative of a smooth primitive that it names."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualnn.activations.base import Activation, Sample
from dualnn.activations.registry import register
from dualnn.engine.bridge import ClosedForm
from dualnn.engine.errors import DualInputError, unknown_name


@dataclass(frozen=True)
class Grid:
    """The 2^bits equally spaced levels from low to high, and the width of a soft step relative to their distance."""

    bits: int
    low: float
    high: float
    temperature: float

    @property
    def steps(self) -> int:
        """Number of steps between levels."""
        return 2**self.bits - 1

    @property
    def width(self) -> float:
        """Distance of two levels."""
        return (self.high - self.low) / self.steps


def quantise(grid: Grid, x: Tensor) -> Tensor:
    """The nearest level (half-way points go to the even one, as torch.round); NaN stays NaN."""
    return grid.low + grid.width * torch.round((x.clamp(grid.low, grid.high) - grid.low) / grid.width)


def _soft_staircase_slope(grid: Grid, x: Tensor) -> Tensor:
    """S'(x) of S(x) = low + width * sum_{i=1}^{steps} sigmoid((s - i + 1/2) / temperature), s = (x - low) / width.

    Only steps near x are summed: one further away than `reach` adds less than an eps of the dtype.
    """
    s = (x - grid.low) / grid.width
    reach = math.ceil(-grid.temperature * math.log(torch.finfo(x.dtype).eps)) + 1
    slope = torch.zeros_like(x)
    if grid.steps <= 2 * reach + 1:
        for i in range(1, grid.steps + 1):
            soft = torch.sigmoid((s - (i - 0.5)) / grid.temperature)
            slope = slope + soft * (1 - soft)
        return slope / grid.temperature
    nearest = torch.round(s.detach() + 0.5).clamp(1 - reach, grid.steps + reach)  # an index: carries no tangent
    for offset in range(-reach, reach + 1):
        step = nearest + offset
        soft = torch.sigmoid((s - (step - 0.5)) / grid.temperature)
        slope = slope + torch.where((step >= 1) & (step <= grid.steps), soft * (1 - soft), 0.0)
    return slope / grid.temperature


def _clipped_identity_slope(grid: Grid, x: Tensor) -> Tensor:
    """Derivative of clamp(x, low, high): 1 inside (ends included) and 0 outside, as torch.clamp."""
    return ((x >= grid.low) & (x <= grid.high)).to(x.dtype)


def _identity_slope(grid: Grid, x: Tensor) -> Tensor:
    return torch.ones_like(x)


def _staircase_reference(grid: Grid, x: Any) -> Any:
    import mpmath as mp

    s = (x - grid.low) / mp.mpf(grid.width)
    soft = [1 / (1 + mp.exp(-(s - (i - mp.mpf(1) / 2)) / grid.temperature)) for i in range(1, grid.steps + 1)]
    return grid.low + mp.mpf(grid.width) * mp.fsum(soft)


def _clip_reference(grid: Grid, x: Any) -> Any:
    return min(max(x, grid.low), grid.high)


#: name -> (derivative on tensors, the primitive itself on mpmath numbers)
PRIMITIVES: dict[str, tuple[Any, Any]] = {
    "soft_staircase": (_soft_staircase_slope, _staircase_reference),
    "clipped_identity": (_clipped_identity_slope, _clip_reference),
    "identity": (_identity_slope, lambda grid, x: x),
}


@register("quantize")
class Quantize(Activation):
    r"""Uniform quantiser to b bits over [low, high], trained by the derivative of a named primitive (a surrogate).

    .. math:: y = low + w \cdot round\left(\frac{clip(x, low, high) - low}{w}\right), \qquad
       w = \frac{high - low}{2^b - 1}

    The derivative of y itself is 0 almost everywhere: there is nothing to recover. In its place stands, in forward
    and in reverse mode alike, the exact derivative of one of these primitives, whose name the repr prints:

    - "soft_staircase": S(x) = low + w sum_i sigmoid((s - i + 1/2) / temperature), s = (x - low) / w,
      i = 1..2^b - 1; tends to y as temperature -> 0. Derivatives of all orders are those of S.
    - "clipped_identity": clip(x, low, high); 1 inside (ends included), 0 outside (the clipped straight-through
      estimator).
    - "identity": x (the straight-through estimator).

    A gradient obtained through it is therefore biased: it is that of another function. The second derivative is the
    primitive's second derivative.

    Why it exists: hard decisions stop backprop with a gradient of zero, and a straight-through trick hides which
    function's gradient is used, and is wrong in forward mode.

    Args:
        bits: b, 1 to 16.
        low: Lowest level.
        high: Highest level, > low.
        primitive: "soft_staircase", "clipped_identity" or "identity".
        temperature: Width of a soft step in units of w ("soft_staircase" only). At 0.25 the slope stays within 0.85
            and 1.15 between the ends; at 0.05 it is close to a comb.

    Shape:
        x: (*) -> y: the same, one of the 2^b levels. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; bits, low, high or temperature out of range.
        UnknownNameError: another `primitive`.

    Reference:
        Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons", 2013,
        arXiv 1308.3432.

    Example:
        >>> act = Quantize(bits=2, low=0.0, high=3.0)
        >>> act(torch.tensor([-1.0, 0.4, 1.7, 9.0]))
        tensor([0., 0., 2., 3.])
    """

    def __init__(
        self,
        bits: int = 4,
        low: float = -1.0,
        high: float = 1.0,
        primitive: str = "soft_staircase",
        temperature: float = 0.25,
    ) -> None:
        """Fix the grid and the primitive."""
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise DualInputError(f"quantize: bits must be an integer from 1 to 16, got {bits!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DualInputError(f"quantize: need finite low < high, got {low=}, {high=}")
        if not 0 < temperature < math.inf:
            raise DualInputError(f"quantize: temperature must be positive, got {temperature}")
        if primitive not in PRIMITIVES:
            raise unknown_name("primitive of quantize", primitive, PRIMITIVES)
        self.grid, self.primitive = Grid(bits, low, high, temperature), primitive

    @property
    def local(self) -> ClosedForm:
        """The quantiser's value and the primitive's derivative."""
        slope = PRIMITIVES[self.primitive][0]
        return ClosedForm(partial(quantise, self.grid), lambda y, x: (slope(self.grid, x),))

    def describe(self) -> str:
        """Arguments for the repr: they say whose derivative is used."""
        grid = self.grid
        soft = f", temperature={grid.temperature}" if self.primitive == "soft_staircase" else ""
        surrogate = f"surrogate derivative of primitive={self.primitive!r}{soft}"
        return f"bits={grid.bits}, low={grid.low}, high={grid.high}, {surrogate}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = (-3.0, -1.2, -0.95, -0.31, 0.02, 0.41, 0.77, 1.3, 2.5)

        def sample(options: dict[str, Any], step: float = 1e-3) -> Sample:
            act = cls(**options)

            def reference(x: Any) -> Any:
                import mpmath as mp

                levels = [act.grid.low + mp.mpf(act.grid.width) * i for i in range(act.grid.steps + 1)]
                return min(levels, key=lambda level: abs(level - x))

            return Sample(options, points, reference, partial(PRIMITIVES[act.primitive][1], act.grid), step)

        return [
            sample({}),
            sample({"bits": 2, "temperature": 0.5}),
            sample({"bits": 8, "temperature": 0.1}, step=1e-5),
            sample({"primitive": "clipped_identity"}),
            sample({"primitive": "identity"}),
        ]
