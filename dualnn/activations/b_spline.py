"""The activation of Kolmogorov-Arnold networks: a B-spline with learnable coefficients beside a learnable SiLU."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample
from dualnn.activations.registry import register
from dualnn.engine.errors import DualInputError


def basis(s: Tensor, count: int, degree: int) -> list[Tensor]:
    """The B-splines B_0 ... B_{count-1} on the knots -degree, ..., count: by Cox and de Boor's recursion.

    Shape:
        s: (*) -> count tensors (*), which sum to 1 for 0 <= s < count - degree.
    """
    knots = range(-degree, count)
    found = [((s >= t) & (s < t + 1)).to(s.dtype) for t in knots]
    for d in range(1, degree + 1):
        # s - t and t + d + 1 - s are the distances to the ends of the support; all knots are 1 apart.
        found = [
            ((s - t) * left + (t + d + 1 - s) * right) / d
            for t, left, right in zip(knots, found[:-1], found[1:], strict=False)
        ]
    return found


def spline(x: Tensor, *parameters: Tensor, low: float, width: float, degree: int) -> Tensor:
    """W silu(x) + sum_i c_i B_i(x), `parameters` being w, c_0, c_1, ..."""
    weight, *coefficients = parameters
    total = weight * (x * torch.sigmoid(x))
    for c, b in zip(coefficients, basis((x - low) / width, len(coefficients), degree), strict=True):
        total = total + c * b
    return total


def _reference(low: float, width: float, degree: int, x: Any, weight: Any, *coefficients: Any) -> Any:
    import mpmath as mp

    # By truncated powers: B(u) = sum_j (-1)^j C(degree + 1, j) (u - j)_+^degree / degree!
    total = weight * x / (1 + mp.exp(-x))
    for i, c in enumerate(coefficients):
        u = (x - low) / mp.mpf(width) - (i - degree)
        if 0 <= u <= degree + 1:
            powers = [(-1) ** j * math.comb(degree + 1, j) * max(u - j, 0) ** degree for j in range(degree + 2)]
            total += c * mp.fsum(powers) / math.factorial(degree)
    return total


@register("b_spline")
class BSpline(Activation):
    r"""A learnable curve: a B-spline on a uniform grid plus a weighted SiLU, per channel, as the edges of a KAN.

    .. math:: y = w \, \mathrm{silu}(x) + \sum_{i=0}^{g + d - 1} c_i B_i(x)

    g intervals of equal width on [low, high], degree d: d - 1 derivatives are continuous. The splines start at zero
    (c = `coefficients`), so that the unit starts as w silu(x). Outside (low - d h, high + d h), h the grid's width,
    they vanish and the SiLU is all there is; between that and the grid they fade out.

    Why it exists: every coefficient moves the curve near one place only, so a network learns its activation functions
    themselves, and they can be read off afterwards. Derivatives of order <= d are exact piecewise polynomials.

    Args:
        grid: g, the number of intervals, >= 1.
        degree: d, >= 1.
        low: Left end of the grid.
        high: Right end of the grid, > low.
        weight: Initial w.
        coefficients: The g + d initial coefficients; None: zeros.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; grid, degree, low, high or the number of coefficients out of range.

    Reference:
        Liu et al., "KAN: Kolmogorov-Arnold Networks", 2024, arXiv 2404.19756. de Boor, "On calculating with
        B-splines", 1972.

    Example:
        >>> act = BSpline(grid=4, low=-1.0, high=1.0)
        >>> act(torch.tensor([-2.0, 0.0, 2.0])).detach()  # silu, until the coefficients move
        tensor([-0.2384,  0.0000,  1.7616])
    """

    def __init__(
        self,
        grid: int = 5,
        degree: int = 3,
        low: float = -3.0,
        high: float = 3.0,
        weight: float = 1.0,
        coefficients: Sequence[float] | None = None,
        num_channels: int = 1,
    ) -> None:
        """Start every channel at the same curve."""
        super().__init__(num_channels)
        for what, value in (("grid", grid), ("degree", degree)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DualInputError(f"b_spline: {what} must be an integer >= 1, got {value!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DualInputError(f"b_spline: need finite low < high, got {low=}, {high=}")
        start = [0.0] * (grid + degree) if coefficients is None else list(coefficients)
        if len(start) != grid + degree:
            raise DualInputError(f"b_spline: need grid + degree = {grid + degree} coefficients, got {len(start)}")
        self.grid, self.degree, self.low, self.high = grid, degree, low, high
        self.weight = nn.Parameter(self.per_channel(weight))
        self.coefficients = nn.Parameter(self.per_channel_row(start))

    @property
    def local(self) -> Formula:
        """The formula."""
        return Formula(partial(spline, low=self.low, width=(self.high - self.low) / self.grid, degree=self.degree))

    def natural(self) -> tuple[Tensor, ...]:
        """The weight of the SiLU and the coefficients, each of shape (num_channels,)."""
        return (self.weight, *self.coefficients.unbind(-1))

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"grid={self.grid}, degree={self.degree}, low={self.low}, high={self.high}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""

        def sample(points: tuple[float, ...], **options: Any) -> Sample:
            act = cls(**options)
            reference = partial(_reference, act.low, (act.high - act.low) / act.grid, act.degree)
            return Sample(options, points, reference)

        return [
            sample((-40.0, -2.9, -0.7, 0.2, 1.4, 2.5, 9.0), coefficients=(0.3, -1.0, 0.5, 0.1, 2.0, -0.4, 0.9, 0.0)),
            sample((-1.7, -0.4, 0.3, 1.1), grid=2, degree=4, low=-1.0, high=1.0, coefficients=(1, -2, 0.5, 3, 1, 1)),
        ]
