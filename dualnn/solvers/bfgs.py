r"""BFGS: Newton's method with an inverse Hessian B learnt from the gradients.

.. math::
    d = -B\,g, \qquad
    B \leftarrow (I - \rho\, s y^T)\, B\, (I - \rho\, y s^T) + \rho\, s s^T, \qquad \rho = 1 / y^T s,

with :math:`s = x_+ - x` and :math:`y = g_+ - g`. The line search's second Wolfe condition gives :math:`y^T s > 0`; an
update for which rounding left :math:`y^T s \le \epsilon \lVert s \rVert \lVert y \rVert` is skipped. Before the first
update :math:`B = (y^T s / y^T y)\, I`.

Reference:
    Nocedal, Wright, "Numerical Optimization", 2006, algorithm 6.1 and equation 6.20.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.descent import Taken
from dualnn.solvers.objective import Objective, dot, first_scale, matvec
from dualnn.solvers.wolfe import Point, plain, search


class BFGS:
    """Steps with a dense inverse Hessian a sample."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.inverse: Tensor | None = None
        self.learnt: Tensor | None = None

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """One step with a line search, and the update."""
        g = at.gradient
        if self.inverse is None or self.learnt is None:
            identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape, x.shape[-1])
            self.inverse, self.learnt = identity * first_scale(g).unsqueeze(-1), torch.zeros_like(active)
        direction = -matvec(self.inverse, g)
        fall = -(plain(g) * plain(direction)).sum(-1)
        new_x, new, found = search(self.objective, x, at, direction, active)
        s, y = new_x - x, new.gradient - g
        keep = found & curved(s, y)
        ys = torch.where(keep.unsqueeze(-1), dot(y, s), 1.0)
        yy = torch.where(keep.unsqueeze(-1), dot(y, y), 1.0)
        fresh = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) * (ys / yy).unsqueeze(-1)
        b = torch.where(self.learnt[..., None, None], self.inverse, fresh)
        by = matvec(b, y)
        cross = by.unsqueeze(-1) * s.unsqueeze(-2)
        rank_one = ((1 + dot(y, by) / ys) / ys).unsqueeze(-1) * s.unsqueeze(-1) * s.unsqueeze(-2)
        updated = b + rank_one - (cross + cross.mT) / ys.unsqueeze(-1)
        self.inverse = torch.where(keep[..., None, None], updated, self.inverse)
        self.learnt = self.learnt | keep
        return Taken(new_x, new, ~found, fall)


def curved(s: Tensor, y: Tensor) -> Tensor:
    """Which samples saw positive curvature, beyond rounding."""
    s, y = plain(s), plain(y)
    least = torch.finfo(s.dtype).eps * torch.linalg.vector_norm(s, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    return (s * y).sum(-1) > least
