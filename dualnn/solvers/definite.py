r"""The Hessian at a minimum, factored; and the test that it is one.

A point where the gradient vanishes is an isolated minimum where the Hessian H is positive definite. That is tried by
the Cholesky factorisation of H scaled to a unit diagonal, :math:`D^{-1/2} H D^{-1/2}` with :math:`D = \mathrm{diag} H`,
so that the units of the unknowns do not matter: a pivot within rounding of zero is a flat direction, along which
:math:`H^{-1}` does not exist, and a negative one a saddle. Such samples get nan, never numbers.

Reference:
    Higham, "Accuracy and Stability of Numerical Algorithms", 2002, sections 7.3 and 10.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.factors import merged


class Definite:
    """A symmetric positive definite block ``(*batch, n, n)``, by Cholesky. Half precision is solved in float32.

    Attributes:
        regular: Which samples are positive definite beyond rounding; solutions of the others are nan.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.dtype = matrix.dtype
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        n = wide.shape[-1]
        diagonal = wide.diagonal(dim1=-2, dim2=-1)
        possible = torch.isfinite(wide).all(-1).all(-1) & (diagonal > 0).all(-1)
        self.scale = torch.where(possible.unsqueeze(-1), diagonal, 1.0).rsqrt()
        scaled = (wide + wide.mT) / 2 * self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        identity = torch.eye(n, dtype=wide.dtype, device=wide.device)
        safe = torch.where(possible[..., None, None], scaled, identity)
        self.factor, info = torch.linalg.cholesky_ex(safe)
        pivots = self.factor.diagonal(dim1=-2, dim2=-1) ** 2
        self.regular = possible & (info == 0) & (pivots.amin(-1) > 10 * n * torch.finfo(matrix.dtype).eps)

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`H^{-1} b` for ``(*lead, *batch, n)``."""
        lead = rhs.dim() - self.scale.dim()
        wide = rhs.to(self.scale.dtype) * self.scale
        columns = merged(wide, lead).movedim(0, -1)  # (*batch, n, prod(lead))
        found = torch.cholesky_solve(columns, self.factor).movedim(-1, 0).reshape(rhs.shape) * self.scale
        return torch.where(self.regular.unsqueeze(-1), found, torch.nan).to(self.dtype)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """The same: H is symmetric."""
        return self.solve(rhs)

    def restrict(self, good: Tensor) -> Definite:
        """Give nan for further samples (which have not converged: there is no minimum to differentiate)."""
        self.regular = self.regular & good
        return self
