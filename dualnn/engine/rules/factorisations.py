r"""LU, QR and Cholesky factors: the directions from the factors that the value already has.

==========  ===========================================================================================================
LU          :math:`M = L^{-1} P^T \mathrm dA\, U^{-1}`, :math:`\mathrm dL = L\,\mathrm{tril}(M, -1)`,
            :math:`\mathrm dU = \mathrm{triu}(M)\,U`, with P frozen
QR          :math:`C = Q^H \mathrm dA\, R^{-1}`, :math:`W = \mathrm{tril}(C, -1) - \mathrm{tril}(C, -1)^H
            + i\,\mathrm{Im}\,\mathrm{diag}\,C`, :math:`\mathrm dQ = Q W + (I - Q Q^H)\, \mathrm dA\, R^{-1}`,
            :math:`\mathrm dR = (C - W) R`: R keeps its real diagonal and its signs
Cholesky    :math:`\mathrm dL = L\,\Phi(L^{-1} \mathrm dA\, L^{-H})`, Φ: the lower triangle with half the diagonal
==========  ===========================================================================================================

LAPACK reads one triangle of a Hermitian argument; so do the directions here.

*Complete QR.* :math:`Q = [Q_1, Q_2]` is a product of reflectors, :math:`Q = I - V T V^H`, hence
:math:`I_{:,1} - Q_1 = V (T V_1^H)` with a unit triangular :math:`V_1`; eliminating V and T leaves

.. math:: Q_2 = \begin{pmatrix} 0 \\ I \end{pmatrix} + (I_{:,1} - Q_1)\,(I - Q_{11})^{-H} Q_{21}^H,

so the columns that complete the basis are a smooth function of those that span A, and this is their derivative.
(Ballard et al., "Reconstructing Householder vectors from tall-skinny QR", IPDPS 2014.)
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DegenerateWarning
from dualnn.engine.factored import Factored, singular
from dualnn.engine.generic import pushforward
from dualnn.engine.registry import OpSpec, Sample, add_spec
from dualnn.engine.rules.solves import square
from dualnn.engine.scaling import idle
from dualnn.engine.sides import after, after_solve, before, before_solve, below, beside, leading, only, turned

L = torch.linalg


def tall_and_wide(r: Any) -> list[Sample]:
    """Square, tall and wide matrices."""
    return [*square(r), Sample((r(4, 3),)), Sample((r(2, 3, 4),))]


def hermitian(t: Tensor, lower: bool) -> Tensor:
    """What LAPACK reads of directions ``(*batch, n, K, n)`` of a Hermitian matrix."""
    n = t.shape[-1]
    on = below(n, n, t, 0)
    full = torch.where(on if lower else on.transpose(0, 2), t, turned(t))
    if t.is_complex():
        imag = only(~(on & on.transpose(0, 2)), full.imag)  # the diagonal's imaginary part is not read
        full = torch.complex(full.real, imag)
    return full


def _lu_parts(t: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of L and U of a matrix whose rows are already in pivoted order, with directions ``t``."""
    m, n = t.shape[-3], t.shape[-1]
    k = min(m, n)
    l1, u1 = lower[..., :k, :], upper[..., :, :k]
    core = before_solve(l1, t[..., :k, :, :k], upper=False, unit=True)
    core = after_solve(core, u1, upper=True)
    strict = below(k, k, t)
    dl, du = before(l1, only(strict, core)), after(only(~strict, core), u1)
    if m > n:
        rest = after_solve(t[..., k:, :, :] - before(lower[..., k:, :], du), u1, upper=True)
        dl = torch.cat([dl, rest], -3)
    elif m < n:
        rest = before_solve(l1, t[..., k:] - after(dl, upper[..., :, k:]), upper=False, unit=True)
        du = torch.cat([du, rest], -1)
    return dl, du


@pushforward("linalg.lu", tall_and_wide, functions=[L.lu])
def _lu(t: Tensor, x: Tensor, y: Any, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    p, lower, upper = y
    t = beside(t)
    dl, du = _lu_parts(before(primal_of(p).mT, t) if pivot else t, lower, upper)
    none = torch.zeros((t.shape[-2], *p.shape), dtype=t.dtype, device=t.device)
    return none, leading(dl), leading(du)


def _packed(t: Tensor, x: Tensor, y: Any, *_: Any, pivot: bool = True, **__: Any) -> tuple[Tensor | None, ...]:
    packed, pivots, *rest = y
    p, lower, upper = torch.lu_unpack(packed, pivots)
    t = beside(t)
    dl, du = _lu_parts(before(primal_of(p).mT, t) if pivot else t, lower, upper)
    m, n = t.shape[-3], t.shape[-1]
    wide = torch.nn.functional.pad(dl, (0, max(n - m, 0)))
    high = torch.nn.functional.pad(du, (0, 0, 0, 0, 0, max(m - n, 0)))
    return leading(torch.where(below(m, n, t), wide, high)), *[None] * (1 + len(rest))


pushforward("linalg.lu_factor", tall_and_wide, functions=[L.lu_factor])(_packed)
pushforward("linalg.lu_factor_ex", tall_and_wide, functions=[L.lu_factor_ex])(_packed)


def _cholesky(t: Tensor, factor: Tensor, upper: bool) -> Tensor:
    low = factor.mH if upper else factor
    inner = before_solve(low, hermitian(beside(t), not upper), upper=False)
    inner = after_solve(inner, low.mH, upper=True)
    # Half the diagonal and nothing above it. (What is above is the conjugate of what is below: no nan is spread.)
    n, real = low.shape[-1], torch.finfo(low.dtype).dtype
    phi = torch.ones(n, n, dtype=getattr(torch, real), device=low.device).tril()
    phi = (phi - torch.eye(n, dtype=phi.dtype, device=low.device) / 2).unsqueeze(-2)
    moved = before(low, inner * phi)
    return leading(turned(moved) if upper else moved)


# Torch's gradients of these are made symmetric, which the standard samples are not: tests of their own.
pushforward("linalg.cholesky", None, functions=[L.cholesky])(lambda t, x, y, *, upper=False: _cholesky(t, y, upper))
pushforward("linalg.cholesky_ex", None, functions=[L.cholesky_ex])(
    lambda t, x, y, *, upper=False, check_errors=False: (_cholesky(t, y[0], upper), None)
)
pushforward("cholesky", None)(lambda t, x, y, upper=False: _cholesky(t, y, upper))


def refuse_deficient(diagonal: Tensor, size: int, what: str) -> None:
    """Raise where a triangular factor shows that its matrix lacks full rank."""
    if not idle() or type(diagonal) is not Tensor or not diagonal.numel():
        return
    sizes = diagonal.detach().abs()
    small = sizes.amin(-1) <= size * torch.finfo(diagonal.dtype).eps * sizes.amax(-1)
    if bool(small.any()):
        raise singular(small, f"the matrix lacks full rank, so that {what} is not differentiable")


def _qr(t: Tensor, x: Tensor, q: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of reduced factors, in the layout of `sides`."""
    k = q.shape[-1]
    r1 = r[..., :, :k]
    refuse_deficient(r1.diagonal(0, -2, -1), max(x.shape[-2:]), "its QR factorisation")
    t1 = after_solve(t[..., :k], r1, upper=True)
    core = before(q.mH, t1)
    strict = below(k, k, core)
    low = only(strict, core)
    turn = low - turned(low)
    if core.is_complex():
        on = below(k, k, core, 0) & ~strict
        phase = only(on, core).imag
        turn = turn + torch.complex(torch.zeros_like(phase), phase)
    rising = only(~strict, core - turn)  # upper triangular with a real diagonal
    # (I - q q^H) t1 vanishes for a square q, and then q turn keeps the columns orthogonal best.
    dq = t1 - before(q, core - turn) if q.shape[-2] > k else before(q, turn)
    dr = after(rising, r1)
    if t.shape[-1] > k:
        # q^H dq = turn: the further columns of R follow from those of Q.
        dr = torch.cat([dr, before(q.mH, t[..., k:]) - after(turn, r[..., :, k:])], -1)
    return dq, dr


def _qr_push(t: Tensor, x: Tensor, y: Any, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    q, r = y
    k = min(x.shape[-2:])
    if mode == "r":  # torch returns no Q
        q = L.qr(x)[0]
        return t.new_zeros((t.shape[0], 0)), leading(_qr(beside(t), x, q, r)[1])
    dq, dr = _qr(beside(t), x, q[..., :k], r[..., :k, :])
    dq, dr = leading(dq), leading(dr)
    if q.shape[-1] > k:
        dq = torch.cat([dq, _completing_push(q[..., :k], dq)], -1)
        dr = torch.nn.functional.pad(dr, (0, 0, 0, q.shape[-1] - k))
    return dq, dr


def _completing_push(q: Tensor, dq: Tensor) -> Tensor:
    """Directions of the columns that torch adds to a basis, for directions of the basis (see above)."""
    k = q.shape[-1]
    top, rest = q[..., :k, :], q[..., k:, :]
    eye = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    factored = Factored(eye[:k, :k] - top)
    mixed = factored.solve_adjoint(rest.mH)
    # B = (I - Q11)^-H Q21^H: dB = (I - Q11)^-H (dQ21^H + dQ11^H B), dQ2 = (I - Q1) dB - dQ1 B.
    dmixed = factored.columns(eye[:k, :k] - top, dq[..., k:, :].mH + dq[..., :k, :].mH @ mixed, True)
    moved = (eye[:, :k] - q) @ dmixed - dq @ mixed
    if idle() and type(q) is Tensor and factored.info is not None and bool((factored.info != 0).any()):
        warnings.warn(
            "a column of the matrix is zero below its diagonal already: Householder's reflector jumps there, and so do "
            "the columns that complete Q, whose tangents are nan. Use mode='reduced', or only functions of R.",
            DegenerateWarning,
            stacklevel=2,
        )
        nan = torch.full((), torch.nan, dtype=q.dtype, device=q.device)
        moved = torch.where((factored.info != 0)[..., None, None], nan, moved)
    return moved


pushforward("linalg.qr", tall_and_wide, functions=[L.qr])(_qr_push)
pushforward("qr", None)(lambda t, x, y, some=True: _qr_push(t, x, y, "reduced" if some else "complete"))
add_spec(  # of which torch has no derivative
    OpSpec("linalg.qr.complete", lambda A: L.qr(A, "complete"), lambda r: [Sample((r(2, 5, 3),))], reverse=False)
)
add_spec(OpSpec("linalg.qr.r", lambda A: L.qr(A, "r")[1], tall_and_wide, reverse=False))
