r"""Eigenvalues and eigenvectors of Hermitian matrices, singular values and vectors.

*eigh.* With :math:`P = V^H \mathrm dA\, V`: :math:`\mathrm d\lambda = \mathrm{diag}\,P`,
:math:`\mathrm dV = V\,(P_{ij} / (\lambda_j - \lambda_i))_{i \ne j}`: no vector turns in its own phase.

*svd*, :math:`A = U \Sigma V^H`. With :math:`P = U^H \mathrm dA\, V` and
:math:`E_{jk} = \sigma_k^2 - \sigma_j^2 = (\sigma_k - \sigma_j)(\sigma_k + \sigma_j)`:

.. math:: \mathrm d\sigma = \mathrm{Re}\,\mathrm{diag}\,P, \quad
          \mathrm dU = U\,\frac{P\Sigma + \Sigma P^H}{E} + (I - U U^H)\,\mathrm dA\,V\Sigma^{-1}, \quad
          \mathrm dV = V\,\frac{\Sigma P + P^H\Sigma}{E} + (I - V V^H)\,\mathrm dA^H U\Sigma^{-1},

off the diagonal. In the complex case every pair of vectors has a free phase, which is kept from turning in the mean of
the two: the diagonal holds :math:`\pm i\,\mathrm{Im}\,P_{jj} / 2\sigma_j`. The further columns of ``full_matrices``
stay orthogonal to the others and do not turn among themselves.

*Repeated values.* The vectors' tangents are nan, with a warning (`degenerate`). The values of a repeated eigenvalue are
continuous but kinked in the matrix, as :math:`\max` is at a tie: :math:`\mathrm{diag}\,P` in torch's basis is linear in
dA and an element of their generalised (Clarke's) Jacobian, the derivative on the side where dA splits them along that
basis. Symmetric functions of the repeated values, such as their sum, are smooth, and their derivatives come out right.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.generic import pushforward
from dualnn.engine.rules.degenerate import equal_pairs, rounding, seen, warn_pairs, warn_small
from dualnn.engine.rules.factorisations import hermitian
from dualnn.engine.sides import after, before, beside, leading, only, turned

L = torch.linalg


def _on_diagonal(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=torch.bool, device=like.device).unsqueeze(-2)


def _entries(t: Tensor) -> Tensor:
    """Diagonals ``(*batch, K, n)`` of ``(*batch, n, K, n)``."""
    return t.diagonal(0, -3, -1)


def _unless_moved(t: Tensor, pairs: Tensor) -> Tensor:
    """Pairs and directions without a derivative; along a direction that is zero altogether nothing moves."""
    moving = (primal_of(t).detach() != 0).any(-3, keepdim=True).any(-1, keepdim=True)
    return pairs.unsqueeze(-2) & moving


@pushforward("linalg.eigh", None, functions=[L.eigh])
def _eigh(t: Tensor, x: Tensor, y: Any, UPLO: str = "L") -> tuple[Tensor, Tensor]:
    values, vectors = y
    t = hermitian(beside(t), UPLO.upper() == "L")
    moved = before(vectors.mH, after(t, vectors))
    n = x.shape[-1]
    equal = equal_pairs(values, n)
    mixing = moved * _inverse_gaps(values.unsqueeze(-2) - values.unsqueeze(-1), equal).unsqueeze(-2)
    if seen(values, equal):
        warn_pairs(values, equal, "eigenvalues")
        mixing = torch.where(_unless_moved(t, equal), _nan(mixing), mixing)
    return torch.real(_entries(moved)).movedim(-2, 0), leading(before(vectors, mixing))


def _inverse_gaps(gaps: Tensor, equal: Tensor) -> Tensor:
    """One over the gaps; zero on the diagonal (and for equal pairs, which are replaced later)."""
    left_out = equal | torch.eye(gaps.shape[-1], dtype=torch.bool, device=gaps.device)
    return only(~left_out, 1 / torch.where(left_out, torch.ones_like(gaps), gaps))


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device)


@pushforward("linalg.eigvalsh", None, functions=[L.eigvalsh])
def _eigvalsh(t: Tensor, x: Tensor, y: Tensor, UPLO: str = "L") -> Tensor:
    _, vectors = L.eigh(x, UPLO)
    moved = after(hermitian(beside(t), UPLO.upper() == "L"), vectors)
    return torch.real((vectors.conj().unsqueeze(-2) * moved).sum(-3)).movedim(-2, 0)


def _vectors(t: Tensor, u: Tensor, s: Tensor, vh: Tensor, tied: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of reduced U, of the values and of V^H, in the layout of `sides`.

    Args:
        t: Directions of the matrix.
        u: Left vectors.
        s: Values.
        vh: Right vectors.
        tied: Vanishing values leave their vectors free (the null spaces have further columns, or a phase).
    """
    v = vh.mH
    m, n, k = u.shape[-2], v.shape[-2], s.shape[-1]
    tv = after(t, v)
    p = before(u.mH, tv)
    on = _on_diagonal(k, s)
    row, column = s.unsqueeze(-2), s.unsqueeze(-1)
    equal = equal_pairs(s, max(m, n))
    inverse = _inverse_gaps((row - column) * (row + column), equal)
    by_row, by_column = (row * inverse).unsqueeze(-2), (column * inverse).unsqueeze(-2)
    p_h = turned(p)
    left, right = p * by_row + p_h * by_column, p * by_column + p_h * by_row
    if seen(s, equal):
        warn_pairs(s, equal, "singular values")
        lost = _unless_moved(t, equal)
        left, right = torch.where(lost, _nan(left), left), torch.where(lost, _nan(right), right)
    inverse = torch.ones_like(s)
    if tied:
        inverse = 1 / s
        plain = primal_of(s).detach()
        small = plain <= rounding(plain, max(m, n))
        if seen(s, small):
            warn_small(s, small)
            inverse = torch.where(small, _nan(s), inverse)
    if p.is_complex():
        phase = only(on, p).imag * inverse.unsqueeze(-2).unsqueeze(-2) / 2
        phase = torch.complex(torch.zeros_like(phase), phase)
        left, right = left + phase, right - phase
    du, dv = before(u, left), before(v, right)
    inverse = inverse.unsqueeze(-2).unsqueeze(-2)
    if m > k:
        du = du + (tv - before(u, p)) * inverse
    if n > k:
        dv = dv + (after(turned(t), u) - before(v, turned(p))) * inverse
    return du, torch.real(_entries(p)), turned(dv)


@pushforward("linalg.svd", None, functions=[L.svd])
def _svd(
    t: Tensor, x: Tensor, y: Any, full_matrices: bool = True, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = y
    k = s.shape[-1]
    tied = x.is_complex() or x.shape[-2] != x.shape[-1]
    du, ds, dvh = _vectors(beside(t), u[..., :, :k], s, vh[..., :k, :], tied)
    return _completed(leading(du), u), ds.movedim(-2, 0), _completed(leading(dvh).mH, vh.mH).mH


def _completed(d: Tensor, full: Tensor) -> Tensor:
    """Directions of the further columns of ``full_matrices``: they stay orthogonal, and do not turn in themselves."""
    k = d.shape[-1]
    if full.shape[-1] == k:
        return d
    return torch.cat([d, -(full[..., :k] @ (d.mH @ full[..., k:]))], -1)


@decomposition("svd", torch.svd, Tensor.svd)
def _old_svd(input: Tensor, some: bool = True, compute_uv: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = L.svd(input, full_matrices=not some)
    if not compute_uv:
        return torch.zeros_like(u.detach()), s, torch.zeros_like(vh.mH.detach())
    return u, s, vh.mH


@pushforward("linalg.svdvals", None, functions=[L.svdvals])
def _svdvals(t: Tensor, x: Tensor, y: Tensor, *, driver: str | None = None) -> Tensor:
    u, _, vh = L.svd(x, full_matrices=False)
    moved = after(beside(t), vh.mH)
    return torch.real((u.conj().unsqueeze(-2) * moved).sum(-3)).movedim(-2, 0)
