r"""L-BFGS: BFGS from the last ten changes of x and gradient, without a matrix.

:math:`d = -B g` by the two loops over the pairs :math:`(s_i, y_i)`, with
:math:`B_0 = (s^T y / y^T y)\, I` of the newest pair. Memory is 20 vectors a sample, for any n. A pair without positive
curvature is not used (its weight is zero), as in BFGS.

Reference:
    Nocedal, Wright, "Numerical Optimization", 2006, algorithm 7.4; Liu, Nocedal, Math. Program. 45, 1989.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.bfgs import curved
from dualnn.solvers.descent import Taken
from dualnn.solvers.objective import Objective, dot, first_scale
from dualnn.solvers.wolfe import Point, plain, search

MEMORY = 10


class LBFGS:
    """Steps with the last pairs."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # (s, y, 1 / y's; 0 for a pair not used)
        self.scale: Tensor | None = None

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """One step with a line search, and the new pair."""
        g = at.gradient
        if self.scale is None:
            self.scale = first_scale(g)
        direction = -self._times(g, self.scale)
        fall = -(plain(g) * plain(direction)).sum(-1)
        new_x, new, found = search(self.objective, x, at, direction, active)
        s, y = new_x - x, new.gradient - g
        keep = (found & curved(s, y)).unsqueeze(-1)
        ys = torch.where(keep, dot(y, s), 1.0)
        self.scale = torch.where(keep, ys / torch.where(keep, dot(y, y), 1.0), self.scale)
        self.pairs = [*self.pairs[1 - MEMORY :], (s, y, torch.where(keep, 1 / ys, 0.0))]
        return Taken(new_x, new, ~found, fall)

    def _times(self, g: Tensor, scale: Tensor) -> Tensor:
        weights = []
        for s, y, rho in reversed(self.pairs):
            weights.append(rho * dot(s, g))
            g = g - weights[-1] * y
        g = g * scale
        for (s, y, rho), weight in zip(self.pairs, reversed(weights), strict=True):
            g = g + s * (weight - rho * dot(y, g))
        return g
