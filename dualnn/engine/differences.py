r"""Finite differences that say where they cannot be trusted: the oracle of `gradcheck`.

Five-point differences of values along a line, the step halved until two in a row agree. Where they never do, or where
the derivatives from the left and from the right stay apart however small the step, the point lies on a kink or jump:
there is no derivative to compare with, and the difference says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 10
EPS = torch.finfo(torch.float64).eps


@dataclasses.dataclass(frozen=True)
class Difference:
    """A derivative along a line, entry by entry of the function's outputs.

    Attributes:
        value: The estimate.
        error: Its own uncertainty: disagreement of two step sizes, and rounding.
        kink: Entries where no derivative was found (a kink, a jump, or noise in the function).
    """

    value: Tensor
    error: Tensor
    kink: Tensor


def line_derivative(phi: Callable[[float], Tensor], order: int, step: float, rtol: float, atol: float) -> Difference:
    r"""First or second derivative of :math:`\phi(h)` at 0.

    .. math::
       \phi'(0) &\approx [\phi(-2h) - 8\phi(-h) + 8\phi(h) - \phi(2h)] / 12h \\
       \phi''(0) &\approx [-\phi(2h) + 16\phi(h) - 30\phi(0) + 16\phi(-h) - \phi(-2h)] / 12h^2

    Args:
        phi: Function of a number; returns a vector of float64.
        order: 1 or 2.
        step: First h; halved up to `HALVINGS` times.
        rtol: Two estimates agree within ``atol + rtol * |value|``.
        atol: See ``rtol``.

    Example:
        >>> d = line_derivative(lambda h: torch.tensor([h**3 + h, abs(h)], dtype=torch.float64), 1, 1e-3, 1e-6, 1e-8)
        >>> d.value.round(decimals=6).tolist(), d.kink.tolist()
        ([1.0, 0.0], [False, True])
    """
    seen: dict[float, Tensor] = {}

    def at(h: float) -> Tensor:
        if h not in seen:
            seen[h] = phi(h)
        return seen[h]

    def difference(h: float) -> tuple[Tensor, Tensor]:
        """The derivative, and its jump: (derivative from the right) - (from the left), which vanishes with h."""
        a, b, zero, c, d = at(-2 * h), at(-h), at(0.0), at(h), at(2 * h)
        if order == 1:
            return (a - 8 * b + 8 * c - d) / (12 * h), (c - 2 * zero + b) / h
        return (-d + 16 * c - 30 * zero + 16 * b - a) / (12 * h * h), (d - 2 * c + 2 * b - a) / (2 * h * h)

    size = at(0.0).abs()
    value, jump = difference(step)
    error, kink = torch.full_like(value, torch.inf), torch.ones_like(value, dtype=torch.bool)
    for _ in range(HALVINGS):
        step /= 2
        finer, finer_jump = difference(step)
        # Rounding of the values, and where they take part in large cancelling sums.
        rounding = 30 * EPS * torch.maximum(size, torch.ones_like(size)) / step**order
        apart = (finer - value).abs()
        tolerance = atol + rtol * finer.abs() + rounding
        # A jump of the derivative that does not shrink with the step (it halves where the function is smooth).
        steady = (finer_jump.abs() > 0.75 * jump.abs()) & (finer_jump.abs() > 10 * tolerance)
        good = torch.isfinite(finer) & (apart <= tolerance) & ~steady & kink
        value = torch.where(kink, finer, value)  # settled entries keep the estimate that settled
        error = torch.where(good, apart + rounding, error)
        kink = kink & ~good
        jump = finer_jump
        if not kink.any():
            break
    return Difference(value, error, kink)
