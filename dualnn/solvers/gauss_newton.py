r"""Gauss-Newton for :math:`\tfrac12 \lVert r(x) \rVert^2`, with a line search.

.. math:: x \leftarrow x + t\,d, \qquad d = \arg\min_d \lVert r + J d \rVert

by QR of J with its columns scaled to length 1, never by :math:`J^T J`, which would square its condition. The
second-order part :math:`\sum_i r_i \nabla^2 r_i` of the Hessian is left out of the step (not of the derivative of the
minimum): convergence is quadratic at zero residual, linear otherwise.

Reference:
    Nocedal, Wright, "Numerical Optimization", 2006, section 10.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.engine.errors import DualInputError
from dualnn.solvers.descent import Taken
from dualnn.solvers.objective import LeastSquares
from dualnn.solvers.wolfe import Point, plain, search


class GaussNewton:
    """Steps with the linearised residual."""

    def __init__(self, objective: LeastSquares) -> None:
        self.objective = objective

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """One step with a line search."""
        r, transposed = at.rest
        if r.shape[-1] < x.shape[-1]:
            raise DualInputError(
                f"gauss_newton needs at least as many residuals as unknowns, got {r.shape[-1]} for {x.shape[-1]}: add "
                "a regulariser's residuals, or use 'levenberg_marquardt'"
            )
        usable = torch.isfinite(plain(transposed)).all(-1).all(-1)
        length = column_lengths(transposed)
        unit = (transposed / length.unsqueeze(-1)).mT
        safe = torch.where(usable[..., None, None], unit, torch.eye(*unit.shape[-2:], dtype=x.dtype, device=x.device))
        direction, pivots = least_squares(safe, -r)
        usable = usable & (pivots.amin(-1) > 10 * x.shape[-1] * torch.finfo(x.dtype).eps)
        direction = torch.where(usable.unsqueeze(-1), direction / length, 0.0)
        fall = -(plain(at.gradient) * plain(direction)).sum(-1)
        x, at, found = search(self.objective, x, at, direction, active & usable)
        return Taken(x, at, ~found, fall, singular=~usable)


def column_lengths(transposed: Tensor) -> Tensor:
    """Euclidean lengths of J's columns, 1 for those that vanish; plain numbers, a matter of scale only."""
    found = torch.linalg.vector_norm(plain(transposed), dim=-1)
    return torch.where(found > 0, found, 1.0)


def least_squares(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest ``|A d - b|`` for ``A: (*batch, m, n)`` of full rank, and the sizes of R's pivots."""
    q, r = torch.linalg.qr(matrix)
    projected = (q * rhs.unsqueeze(-1)).mT.contiguous().sum(-1)
    pivots = plain(r).diagonal(dim1=-2, dim2=-1).abs()
    regular = (pivots > 0).all(-1)[..., None, None]
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(torch.where(regular, r, identity), projected.unsqueeze(-1), upper=True)
    return solved.squeeze(-1), pivots
