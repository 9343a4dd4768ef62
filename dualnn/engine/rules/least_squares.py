r"""Least squares and the pseudoinverse, where the rank does not change.

*pinv*, constant rank (Golub and Pereyra, 1973), with :math:`P = A^+`:

.. math:: \mathrm dP = -P\,\mathrm dA\,P + P P^H\,\mathrm dA^H (I - A P) + (I - P A)\,\mathrm dA^H P^H P .

*lstsq*, full rank, :math:`X = A^+ B`, with :math:`G = (A^H A)^{-1}` for a tall A and :math:`G = (A A^H)^{-1}` for a
wide one:

.. math:: \mathrm dX = A^+(\mathrm dB - \mathrm dA\,X) + G\,\mathrm dA^H (B - A X) \quad\text{or}\quad
          \mathrm dX = A^+(\mathrm dB - \mathrm dA\,X) + (I - A^+ A)\,\mathrm dA^H G B .

:math:`A^+` and G are applied by one plain QR factorisation of A (of :math:`A^H` if it is wide), whatever the level.

Reference:
    Golub, Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
    separate", SIAM J. Numer. Anal. 10, 1973.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition, rebased
from dualnn.engine.dual_tensor import DualTensor, count, make, primal_of, split, top_level
from dualnn.engine.generic import pushforward
from dualnn.engine.registry import Sample
from dualnn.engine.rules.factorisations import hermitian, refuse_deficient
from dualnn.engine.sides import after, before, beside, leading, turned
from dualnn.engine.tangents import Tangent, Zero

L = torch.linalg


class Orthogonal:
    """One QR factorisation of a plain matrix of full rank, for least squares at every level."""

    def __init__(self, A: Tensor) -> None:
        self.wide = A.shape[-2] < A.shape[-1]
        A = primal_of(A)
        self.q, self.r = L.qr(A.mH if self.wide else A)
        refuse_deficient(self.r.diagonal(0, -2, -1), max(A.shape[-2:]), "the least squares solution")

    def pinv(self, A: Tensor, B: Tensor, value: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """``A^+ B`` for ``B: (*batch, m, k)``, at their level; ``value`` yields it at the bottom."""

        def plain(a: Tensor, b: Tensor) -> Tensor:
            if value is not None:
                return value(a, b)
            if self.wide:
                return self.q @ L.solve_triangular(self.r.mH, b, upper=False)
            return L.solve_triangular(self.r, self.q.mH @ b, upper=True)

        def moved(a: Tensor, da: Tangent | None, b: Tensor, db: Tangent | None, x: Tensor) -> Tangent:
            part: Tangent | None = None
            inner = db
            if da is not None:
                pushed = da.map(lambda d: -leading(after(beside(d), x)))
                inner = pushed if db is None else pushed.plus(db)
                if self.wide:
                    dual_part = self.gram(a, b)
                    part = da.map(lambda d: self._projected(a, leading(after(turned(beside(d)), dual_part))))
                else:
                    rest = b - a @ x
                    part = da.map(lambda d: _each(self.gram, a, leading(after(turned(beside(d)), rest))))
            assert inner is not None
            tan = inner.map(lambda d: _each(self.pinv, a, d))
            return tan.plus(part)

        return _descend(A, B, plain, moved, lambda a, b: self.pinv(a, b, value))

    def _projected(self, a: Tensor, d: Tensor) -> Tensor:
        """``(I - A^+ A) d_k``."""
        t = beside(d)
        return d - _each(self.pinv, a, leading(before(a, t)))

    def gram(self, A: Tensor, B: Tensor) -> Tensor:
        """``(A^H A)^-1 B``, or ``(A A^H)^-1 B`` for a wide A."""

        def plain(a: Tensor, b: Tensor) -> Tensor:
            return L.solve_triangular(self.r, L.solve_triangular(self.r.mH, b, upper=False), upper=True)

        def moved(a: Tensor, da: Tangent | None, b: Tensor, db: Tangent | None, x: Tensor) -> Tangent:
            inner = db
            if da is not None:

                def product(d: Tensor) -> Tensor:
                    t = beside(d)
                    if self.wide:
                        return -leading(after(t, a.mH @ x) + before(a, after(turned(t), x)))
                    return -leading(after(turned(t), a @ x) + before(a.mH, after(t, x)))

                inner = da.map(product) if db is None else da.map(product).plus(db)
            assert inner is not None
            return inner.map(lambda d: _each(self.gram, a, d))

        return _descend(A, B, plain, moved, self.gram)


def _each(apply: Callable[[Tensor, Tensor], Tensor], a: Tensor, d: Tensor) -> Tensor:
    t = beside(d)
    return leading(apply(a, t.flatten(-2)).unflatten(-1, t.shape[-2:]))


def _descend(A: Tensor, B: Tensor, plain: Callable, moved: Callable, below: Callable) -> Tensor:
    level = top_level((A, B))
    if level == 0:
        return plain(A, B)
    (a, da), (b, db) = split(A, level), split(B, level)
    x = below(a, b)
    if da is None and db is None:
        return make(x, Zero(count(level, (A, B))), level)
    return make(x, moved(a, da, b, db, x), level)


def _samples(r: Any) -> list[Sample]:
    return [
        Sample((r(4, 3), r(4, 2))),
        Sample((r(2, 3, 4), r(2, 3, 2))),
        Sample((r(2, 3, 3), r(2, 3, 1))),
    ]


@decomposition("linalg.lstsq", L.lstsq, samples=_samples, own_value=False)
def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    vector = B.dim() == 1 or (A.dim() - 1 == B.dim() and B.shape == A.shape[:-1])
    factors = Orthogonal(A)
    kept: list[Any] = []

    def value(a: Tensor, b: Tensor) -> Tensor:
        kept.append(L.lstsq(a, b.squeeze(-1) if vector else b, rcond, driver=driver))
        x = kept[0].solution
        return x.unsqueeze(-1) if vector else x

    rhs = B.unsqueeze(-1) if vector else B
    x = factors.pinv(A, rhs, value)
    found = kept[0]
    residuals, values = _still(x, found.residuals), _still(x, found.singular_values)
    if found.residuals.numel():
        rest = rhs - A @ x
        size = (torch.real(rest) ** 2 + torch.imag(rest) ** 2 if rest.is_complex() else rest * rest).sum(-2)
        residuals = rebased(size.squeeze(-1) if vector else size, found.residuals)
    if found.singular_values.numel() and isinstance(A, DualTensor):
        values = rebased(L.svdvals(A), found.singular_values)
    x = x.squeeze(-1) if vector else x
    return torch.return_types.linalg_lstsq((x, residuals, found.rank, values))


def _still(x: Any, value: Tensor) -> Any:
    """A dual like x whose value does not move."""
    return make(_still(x._primal, value), Zero(x._tan.num), x._level) if isinstance(x, DualTensor) else value


def _constant_rank(t: Tensor, x: Tensor, y: Tensor, symmetric: bool) -> Tensor:
    """Directions of the pseudoinverse y of x."""
    t = beside(t)
    if symmetric:  # torch reads the lower triangle
        t, x = hermitian(t, True), hermitian(x.unsqueeze(-2), True).squeeze(-2)
    m, n = x.shape[-2:]
    outside = torch.eye(m, dtype=x.dtype, device=x.device) - x @ y
    null = torch.eye(n, dtype=x.dtype, device=x.device) - y @ x
    th = turned(t)
    moved = before(y @ y.mH, after(th, outside)) + after(before(null, th), y.mH @ y)
    return leading(moved - after(before(y, t), y))


def _pinv_samples(r: Any) -> list[Sample]:
    return [Sample((r(4, 3),)), Sample((r(2, 3, 4),)), Sample((r(2, 3, 3),))]


@pushforward("linalg.pinv", _pinv_samples, functions=[L.pinv])
def _pinv(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    rcond: Any = None,
    hermitian: bool = False,
    *,
    atol: Any = None,
    rtol: Any = None,
) -> Tensor:
    return _constant_rank(t, x, y, hermitian)


pushforward("pinverse", None)(lambda t, x, y, rcond=1e-15: _constant_rank(t, x, y, False))
