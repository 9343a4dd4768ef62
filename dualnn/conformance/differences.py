"""Differences in float64: the oracle that knows no rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 6
RTOL, ATOL = 1e-5, 1e-6
ENOUGH = 1e-9


def five_point(
    fn: Callable[[float], list[Tensor]], step: float, centre: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """d/dh of a list of tensors at h = 0, to O(step^4), and by how much the slopes on either side of 0 differ."""
    values = [fn(k * step) for k in (-2, -1, 1, 2)]
    slopes = [(a - 8 * b + 8 * c - d) / (12 * step) for a, b, c, d in zip(*values, strict=True)]
    bends = [(b - 2 * o + c).abs().double() / step for b, c, o in zip(values[1], values[2], centre, strict=True)]
    return slopes, bends


def difference(fn: Callable[[float], list[Tensor]], step: float = 1e-3) -> tuple[list[Tensor], list[Tensor]]:
    """Derivatives at h = 0, and where they can be trusted.

    Steps are halved; every entry keeps the step at which two successive differences agreed best. It is trusted where
    they agreed well and where the slopes to the left and to the right approach each other (at the tip of ``|h|`` they
    do not, though its central differences agree). What is never trusted lies on a kink, or is not differentiable.

    Returns:
        ``(derivatives, trusted)``, a boolean tensor for each derivative.
    """
    centre = fn(0.0)
    coarse, bent = five_point(fn, step, centre)
    best = [c.clone() for c in coarse]
    error = [torch.full_like(c, float("inf"), dtype=torch.float64) for c in coarse]
    smooth = [torch.zeros_like(c, dtype=torch.bool) for c in coarse]
    for _ in range(HALVINGS):
        step /= 2
        fine, bend = five_point(fn, step, centre)
        for i, (c, f) in enumerate(zip(coarse, fine, strict=True)):
            # A point beyond the edge of the domain makes the difference nan: that says nothing, unless f itself is.
            gap = torch.where(f.isnan() & centre[i].isnan(), 0.0, ((c - f).abs() / (1 + f.abs())).double())
            better = gap < error[i]
            best[i][better] = f[better]
            error[i][better] = gap[better]
            smooth[i] |= (bend[i] <= 0.75 * bent[i]) | (bend[i] <= 1e-4 * (1 + f.abs())) | f.isnan()
        if all(bool((e < ENOUGH).all()) for e in error):
            break
        coarse, bent = fine, bend
    return best, [(e < RTOL / 10) & s for e, s in zip(error, smooth, strict=True)]


def agrees(got: Tensor, wanted: Tensor) -> Tensor:
    """Entrywise agreement, to the accuracy of a difference; relative also to the largest entry."""
    if got.numel() == 0:
        return torch.ones_like(got, dtype=torch.bool)
    scale = wanted[torch.isfinite(wanted)].abs().max() if bool(torch.isfinite(wanted).any()) else wanted.new_zeros(())
    return ((got - wanted).abs() <= ATOL + RTOL * wanted.abs() + 1e-7 * scale) | (got.isnan() & wanted.isnan())
