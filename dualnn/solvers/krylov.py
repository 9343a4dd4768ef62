r"""Linear systems with a Jacobian that is never formed: GMRES on directional derivatives.

:math:`A v` is one dual evaluation, :math:`A^T v` one backward pass through one evaluation. K right-hand sides are K
directions of the same evaluations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, TangentLostError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.gmres import gmres


class Krylov:
    """The Jacobian of ``fn`` at ``x``, matrix-free.

    Systems are solved to a relative residual of the precision to the power 3/4 (float64: 1.8e-12, float32: 6.4e-6), or
    to what rounding allows.

    Args:
        fn: ``(*batch, n) -> (*batch, n)``, sample by sample.
        x: Where.
        strict: Raise where GMRES stagnates; otherwise those samples' results are nan.

    Raises:
        ConvergenceError: GMRES stagnated: for which samples, and where.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor, strict: bool = True) -> None:
        self.fn, self.x, self.strict = fn, x, strict

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-1} b` for ``(*lead, *batch, n)``."""

        def apply(v: Tensor) -> Tensor:
            y, tan = push(self.fn, (self.x,), [Dense(v)])
            return dense_of(tan, y)  # type: ignore[return-value]

        return self._solved(apply, rhs)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-T} b`."""
        with torch.enable_grad():
            leaf = self.x.detach().requires_grad_()
            y = self.fn(leaf)
        if not y.requires_grad:
            raise TangentLostError(
                "the equations carry no graph to backpropagate through (they run under no_grad, or detach what they "
                "compute), which jacobian='krylov' needs in a backward pass. Use jacobian='dense', or differentiate "
                "forward (dualnn.jvp)."
            )

        def apply(v: Tensor) -> Tensor:
            return torch.stack([torch.autograd.grad(y, leaf, one, retain_graph=True)[0] for one in v])

        return self._solved(apply, rhs)

    def _solved(self, apply: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
        x, wide = self.x, torch.promote_types(self.x.dtype, torch.float32)
        flat = rhs.reshape(rhs.shape[: rhs.dim() - x.dim()].numel(), *x.shape).to(wide)
        rtol = torch.finfo(x.dtype).eps ** 0.75
        found, error, solved = gmres(lambda v: apply(v.to(x.dtype)).to(wide), flat, rtol)
        finite = torch.isfinite(error) & torch.isfinite(x).all(-1)
        if self.strict and not bool((solved | ~finite).all()):
            lost = (finite & ~solved).reshape(len(flat), -1).any(0)
            where = torch.nonzero(lost).flatten().tolist()
            who = "the system" if lost.numel() == 1 else f"{len(where)} of {lost.numel()} samples (first: {where[:8]})"
            worst = float(error[finite & ~solved].max())
            raise ConvergenceError(
                f"GMRES stagnated for {who}, at a relative residual of {worst:.3g} (tolerance {rtol:.3g}): the "
                "Jacobian is singular, or too ill-conditioned for a Krylov method without a preconditioner. Scale or "
                "precondition the equations (multiply them by an approximate inverse), or use jacobian='dense' or "
                "'banded'."
            )
        return torch.where(solved.unsqueeze(-1), found, torch.nan).to(rhs.dtype).reshape(rhs.shape)
