r"""Levenberg-Marquardt for :math:`\tfrac12 \lVert r(x) \rVert^2`: Gauss-Newton, damped until the step is good.

.. math:: (J^T J + \lambda D^2)\, d = -J^T r

by QR of :math:`[J;\ \sqrt\lambda D]`; D holds the largest lengths that J's columns have had, so that the units of the
unknowns do not matter (Moré). A step is taken if it gains a share :math:`\varrho` of the fall that the linear model
predicts; :math:`\lambda` is then multiplied by :math:`\max(\tfrac13, 1 - (2 \varrho - 1)^3)`, and after a refusal by
2, 4, 8, … (Nielsen). It works for singular J.

Reference:
    Moré, "The Levenberg-Marquardt algorithm: implementation and theory", Lecture Notes in Mathematics 630, 1978;
    Nielsen, "Damping parameter in Marquardt's method", report IMM-REP-1999-05, Technical University of Denmark, 1999.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.descent import Taken
from dualnn.solvers.gauss_newton import column_lengths, least_squares
from dualnn.solvers.line_search import ARMIJO, over
from dualnn.solvers.objective import LeastSquares
from dualnn.solvers.wolfe import Point, choose, finite, noise, plain, small

FIRST, LARGEST, SMALLEST = 1e-3, 1e20, 1e-20


class LevenbergMarquardt:
    """One trial a step, refused or taken. The damping is frozen under differentiation."""

    def __init__(self, objective: LeastSquares) -> None:
        self.objective = objective
        self.damping: Tensor | None = None

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """One trial."""
        r, transposed = at.rest
        length = column_lengths(transposed)
        if self.damping is None:
            self.damping = torch.full_like(plain(at.value), FIRST)
            self.growth = torch.full_like(self.damping, 2.0)
            self.lengths = length
        self.lengths = torch.where(active.unsqueeze(-1), torch.maximum(self.lengths, length), self.lengths)
        below = torch.diag_embed(self.damping.sqrt().unsqueeze(-1) * self.lengths)
        stacked = torch.cat([transposed.mT, below], -2)
        usable = active & torch.isfinite(plain(stacked)).all(-1).all(-1)
        scaled = torch.where(over(usable, stacked), stacked / self.lengths.unsqueeze(-2), _eye(stacked))
        d = least_squares(scaled, torch.cat([-r, torch.zeros_like(x)], -1))[0] / self.lengths
        d = torch.where(over(usable, d), d, 0.0)
        step, slope = plain(d), plain(at.gradient)
        predicted = ((self.damping.unsqueeze(-1) * (self.lengths * step) ** 2 - slope * step) / 2).sum(-1)
        new = self.objective(x + d)
        gain = (plain(at.value) - plain(new.value)) / predicted
        flatter = plain(new.gradient).abs().amax(-1) < slope.abs().amax(-1)
        near = ((plain(new.value) <= plain(at.value) + noise(at.value)) | small(d, x)) & flatter
        good = usable & finite(new) & ((gain > ARMIJO) | near)
        factor = torch.where(near, 1 / 3, (1 - (2 * gain.clamp(0, 1) - 1) ** 3).clamp_min(1 / 3))
        self.damping = torch.where(usable, self.damping * torch.where(good, factor, self.growth), self.damping)
        self.damping = self.damping.clamp_min(SMALLEST)
        self.growth = torch.where(good, 2.0, 2 * self.growth)
        stuck = ~good & ((self.damping > LARGEST) | ~usable)
        return Taken(torch.where(over(good, x), x + d, x), choose(good, new, at), stuck, predicted)


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
