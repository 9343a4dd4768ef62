r"""Newton's method for minima, with curvature made positive.

.. math:: x \leftarrow x + t\,d, \qquad \tilde H d = -\nabla f.

:math:`\tilde H` is the Hessian where that is positive definite. Elsewhere, with :math:`H = Q \Lambda Q^T`, it is
:math:`Q \max(|\Lambda|, \delta) Q^T`, so that d descends, and leaves saddles along their negative curvature.

Reference:
    Nocedal, Wright, "Numerical Optimization", 2006, section 3.4 (eigenvalue modification).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.definite import Definite
from dualnn.solvers.descent import Taken
from dualnn.solvers.factors import LU
from dualnn.solvers.objective import Objective
from dualnn.solvers.wolfe import Point, plain, search


class Newton:
    """Steps with exact Hessians.

    Attributes:
        hessian: That of the last step.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.hessian: Tensor | None = None

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """One step with a line search."""
        matrix = self.objective.hessian(x)
        self.hessian = plain(matrix)
        usable = torch.isfinite(self.hessian).all(-1).all(-1)
        convex = Definite(self.hessian).regular
        if bool((active & usable & ~convex).any()):
            shift = _positive(torch.where((usable & ~convex)[..., None, None], self.hessian, 0.0)) - self.hessian
            matrix = matrix + torch.where(convex[..., None, None], 0.0, shift)  # frozen under differentiation
        direction = -LU(matrix).solve(at.gradient)
        fall = -(plain(at.gradient) * plain(direction)).sum(-1)
        usable = usable & torch.isfinite(plain(direction)).all(-1)
        x, at, found = search(self.objective, x, at, direction, active & usable)
        return Taken(x, at, ~found, fall, singular=~usable)


def _positive(matrix: Tensor) -> Tensor:
    """Eigenvalues replaced by their size, no smaller than sqrt(eps) of the largest; the identity for a zero matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    size = values.abs()
    largest = size.amax(-1, keepdim=True)
    size = torch.maximum(size, torch.finfo(size.dtype).eps ** 0.5 * largest)
    size = torch.where(largest > 0, size, 1.0)
    return (vectors * size.unsqueeze(-2)) @ vectors.mT
