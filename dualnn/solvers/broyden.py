r"""Broyden's ("good") method: Newton's, with one true Jacobian that rank-1 updates keep current.

After a step :math:`s` that changed the residual by :math:`y`, the inverse :math:`H` becomes the nearest one (in the
Jacobian's Frobenius norm) that maps :math:`y` to :math:`s`, by the formula of Sherman and Morrison:

.. math:: H \leftarrow H + \frac{(s - H y)\, s^T H}{s^T H y}.

Each sample has its own inverse, and gets a fresh Jacobian on its own: where a step leads nowhere, where the residual
fell too little for an updated inverse to be trusted, or where the update would be singular.

Reference:
    Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19, 1965; Dennis, Schnabel,
    "Numerical Methods for Unconstrained Optimization and Nonlinear Equations", 1996, chapter 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.solvers.factors import Factors
from dualnn.solvers.newton import Linearise, descend
from dualnn.solvers.stats import Stats

SLOW = 0.8  # a step with an updated inverse that leaves more of the residual than this asks for a fresh Jacobian
SINGULAR = 1e-4  # least s^T H y, relative to s^T s: the updated Jacobian's determinant over the old one's, inverted


def broyden(
    fn: Callable[[Tensor], Tensor], linearise: Linearise, x: Tensor, tol: float | None, max_steps: int
) -> tuple[Tensor, Stats, Factors | None]:
    """Solve ``fn(x) = 0`` for ``x: (*batch, n)``; the arguments are those of `newton`.

    No factors are handed back: an updated inverse need not be near that of the Jacobian at the solution, so derivatives
    take a fresh one.
    """
    x, stats, _ = descend(fn, Updated(linearise), x, tol, max_steps)
    return x, stats, None


class Inverse:
    """An inverse as factors."""

    def __init__(self, inverse: Tensor) -> None:
        self.inverse = inverse

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`H b` for ``(*lead, *batch, n)``."""
        return torch.einsum("...ij,...j->...i", self.inverse, rhs)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """:math:`H^T b`."""
        return torch.einsum("...ji,...j->...i", self.inverse, rhs)


class Updated:
    """The model of Broyden's method, for `newton.descend`."""

    def __init__(self, linearise: Linearise) -> None:
        self.linearise, self.formed = linearise, 0
        self.last: tuple[Tensor, Tensor] | None = None

    def at(self, x: Tensor, f: Tensor, active: Tensor) -> tuple[Tensor, Factors, Tensor]:
        """Update with the step that led here, or form the Jacobian where that is better."""
        if self.last is None:
            stale = active
            f, self.inverse = self._fresh(x)
        else:
            self.inverse, stale = updated(self.inverse, x - self.last[0], f, self.last[1], active)
            if bool(stale.any()):
                _, fresh = self._fresh(x)
                self.inverse = torch.where(stale[..., None, None], fresh, self.inverse)
        self.last = x, f
        return f, Inverse(self.inverse), stale

    def _fresh(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, factors = self.linearise(x)
        self.formed += 1
        n, batch = x.shape[-1], x.shape[:-1]
        unit = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *(1,) * len(batch), n).expand(n, *x.shape)
        return value, factors.solve(unit).movedim(0, -1)


def updated(inverse: Tensor, s: Tensor, after: Tensor, before: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses after steps ``s`` between the residuals ``before`` and ``after``; which ones need a Jacobian."""
    model, y = Inverse(inverse), after - before
    hy, sh = model.solve(y), model.solve_transposed(s)
    denominator, length = (s * hy).sum(-1), (s * s).sum(-1)
    # A sample that did not move (length 0) found no step: stale as well. A comparison with nan is false.
    regular = denominator.abs() > SINGULAR * length
    stale = active & ~(regular & (_norm(after) <= SLOW * _norm(before)))
    used = active & ~stale
    step = (s - hy).unsqueeze(-1) * sh.unsqueeze(-2) / torch.where(used, denominator, 1.0)[..., None, None]
    return torch.where(used[..., None, None], inverse + step, inverse), stale


def _norm(f: Tensor) -> Tensor:
    return torch.linalg.vector_norm(f, dim=-1)
