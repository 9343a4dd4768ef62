r"""Systems with the Hessian of a large problem, from its products with vectors alone.

:math:`H v = b` by conjugate gradients, a system for each right-hand side and sample, run to a relative residual of
:math:`\epsilon^{3/4}` (float64: 1.8e-12) and then refined once, since the residual that the recurrence carries drifts
from the true one. Memory is a few vectors. A direction of negative or no curvature, :math:`p^T H p \le 0`, says that
the point is no isolated minimum.

Reference:
    Hestenes, Stiefel, 1952; Nocedal, Wright, "Numerical Optimization", 2006, algorithm 5.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from dualnn.engine.errors import ConvergenceError, SingularMatrixError, UnsupportedOpError
from dualnn.solvers.factors import merged


class ConjugateGradients:
    """Factors of a symmetric positive definite matrix that is only known by its products.

    Args:
        product: ``product(v)`` for ``v: (K, *batch, n)``.
        batch: Shape of the batch.
        strict: Raise for samples that fail; otherwise their solutions are nan.
        good: Which samples are to be solved; the others get nan (None: all).

    Raises:
        SingularMatrixError: The matrix is not positive definite (from `solve`).
        ConvergenceError: The residual did not fall to 1,000 times the tolerance (from `solve`).
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], batch: torch.Size, strict: bool = True, good: Tensor | None = None
    ) -> None:
        self.product, self.batch, self.strict, self.good = product, batch, strict, good

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`H^{-1} b` for ``(*lead, *batch, n)``."""
        if any(i.key() == TransformType.Vmap for i in get_interpreter_stack() or []):
            raise UnsupportedOpError(
                "conjugate gradients stop by their residuals, which torch.vmap (in torch.func.jacfwd) hides from "
                "them. Use dualnn.jvp, torch.func.jacrev, or a method with a dense Hessian ('newton', 'bfgs')."
            )
        b = merged(rhs, rhs.dim() - 1 - len(self.batch))
        scale = _norm(b)
        tol = torch.finfo(b.dtype).eps ** 0.75
        wanted = torch.isfinite(scale)
        if self.good is not None:
            wanted = wanted & self.good
        b = torch.where(wanted.unsqueeze(-1), b, 0.0)
        x, curved = self._run(torch.zeros_like(b), b, tol * scale, wanted)
        rest = b - self.product(x)
        again, more = self._run(torch.zeros_like(b), rest, tol * scale, wanted & curved)
        x = x + again
        rest = torch.where(wanted, _norm(b - self.product(x)), 0.0)
        curved = curved & more
        close = rest <= 1e3 * tol * scale
        self._judge(wanted & ~curved, wanted & curved & ~close, rest / scale)
        return torch.where((wanted & curved & close).unsqueeze(-1), x, torch.nan).reshape(rhs.shape)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """The same: H is symmetric."""
        return self.solve(rhs)

    def _run(self, x: Tensor, r: Tensor, tol: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence from x with residual r; also which systems met positive curvature only."""
        curved = torch.ones_like(active)
        p, rr = r, _dot(r, r)
        pending = active & (rr.sqrt() > tol)
        for _ in range(min(2 * r.shape[-1] + 50, 5000)):
            if not bool(pending.any()):
                break
            hp = self.product(p)
            curvature = _dot(p, hp)
            # In units of the gradient p: rounding of a flat direction counts as flat.
            flat = ~(curvature > 10 * torch.finfo(r.dtype).eps * _norm(p) * _norm(hp))
            curved = curved & ~(pending & flat)
            pending = pending & ~flat
            alpha = torch.where(pending, rr / curvature, 0.0).unsqueeze(-1)
            x, r = x + alpha * p, r - alpha * torch.where(pending.unsqueeze(-1), hp, 0.0)
            new = _dot(r, r)
            p = torch.where(pending.unsqueeze(-1), r + (new / rr).unsqueeze(-1) * p, p)
            rr = torch.where(pending, new, rr)
            pending = pending & (rr.sqrt() > tol)
        return x, curved

    def _judge(self, indefinite: Tensor, open_: Tensor, residual: Tensor) -> None:
        if not self.strict:
            return
        if bool(indefinite.any()):
            raise SingularMatrixError(
                f"the Hessian is not positive definite{self._who(indefinite)}: the point is a saddle, or flat in some "
                "direction, and the derivative of the minimum does not exist. Add a regulariser, or start elsewhere."
            )
        if bool(open_.any()):
            worst = float(residual[open_].max())
            raise ConvergenceError(
                f"conjugate gradients with the Hessian did not converge{self._who(open_)} (relative residual "
                f"{worst:.3g}): it is too ill-conditioned. Rescale the unknowns, or use method='newton'."
            )

    def _who(self, failed: Tensor) -> str:
        if not self.batch:
            return ""
        where = torch.nonzero(failed.any(0).reshape(-1)).flatten().tolist()
        return f" in {len(where)} of {self.batch.numel()} samples (first: {where[:8]})"


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()
