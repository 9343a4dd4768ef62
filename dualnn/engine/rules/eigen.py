r"""Eigenvectors of a general matrix, normalised as torch does.

With :math:`A V = V \Lambda` and :math:`P = V^{-1} \mathrm dA\, V`: :math:`\mathrm d\lambda = \mathrm{diag}\,P`,
:math:`\mathrm dV = V G`, :math:`G_{ij} = P_{ij} / (\lambda_j - \lambda_i)` off the diagonal, and zero on it but for
what keeps every column at length one. The phase of a column is free; this is the derivative that does not turn it.

*Repeated values.* As for Hermitian matrices (`spectra`) the vectors' tangents are nan, with a warning. Here rounding
moves an eigenvalue by :math:`n \epsilon \lVert A \rVert \kappa_i`, where :math:`\kappa_i` is the length of row i of
:math:`V^{-1}` (Bauer, Fike, 1960): values closer than that cannot be told apart. Where a repeated value has too few
eigenvectors (a Jordan block) it moves as a root of dA, :math:`\kappa` is :math:`1 / \sqrt\epsilon` or more, and the
value's own tangent is nan too.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.generic import pushforward
from dualnn.engine.rules.degenerate import seen, warn_pairs

L = torch.linalg


@pushforward("linalg.eig", None, functions=[L.eig])
def _eig(t: Tensor, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    values, vectors = y
    moved = L.solve(vectors, t.to(vectors.dtype) @ vectors)
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    equal, defective = _together(x, values, vectors)
    left_out = equal | torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    mixing = torch.where(left_out, torch.zeros_like(moved), moved / torch.where(left_out, torch.ones_like(gaps), gaps))
    slopes = moved.diagonal(0, -2, -1)
    if seen(values, equal):
        warn_pairs(values, equal, "eigenvalues")
        moving = _moving(t)
        mixing = _lost(mixing, equal & moving.unsqueeze(-1))
        slopes = _lost(slopes, defective & moving)
    turned = vectors @ mixing
    length = torch.real((vectors.conj() * turned).sum(-2, keepdim=True))
    return slopes, turned - vectors * length


def _moving(t: Tensor) -> Tensor:
    """Directions that are not zero altogether: along the others nothing moves."""
    return (primal_of(t).detach() != 0).flatten(-2).any(-1, keepdim=True)


def _lost(t: Tensor, mask: Tensor) -> Tensor:
    """Nan where ``mask`` says so, at every level: a product, since the derivative of a constant nan would be zero."""
    one = torch.ones((), dtype=t.dtype.to_real(), device=t.device)
    return t * torch.where(mask, one * torch.nan, one)


def _together(x: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of values that cannot be told apart, and the values that lack an eigenvector."""
    x, values, vectors = (primal_of(part).detach() for part in (x, values, vectors))
    n, eps = x.shape[-1], torch.finfo(x.dtype).eps
    inverse, info = L.inv_ex(vectors)
    lengths = L.vector_norm(inverse, dim=-1)
    sound = (info == 0).unsqueeze(-1) & lengths.isfinite()
    lengths = torch.where(sound, lengths, torch.full_like(lengths, torch.inf))
    error = n * eps * L.vector_norm(x, dim=(-2, -1)).unsqueeze(-1).unsqueeze(-1)
    least = torch.minimum(lengths.unsqueeze(-2), lengths.unsqueeze(-1))
    off = ~torch.eye(n, dtype=torch.bool, device=x.device)
    equal = off & ((values.unsqueeze(-2) - values.unsqueeze(-1)).abs() <= error * least)
    return equal, equal.any(-1) & (n * lengths >= eps**-0.5)


@pushforward("linalg.eigvals", None, functions=[L.eigvals])
def _eigvals(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    _, vectors = L.eig(x)  # in the order of eigvals: LAPACK's iteration is the same one, with the vectors or without
    slopes = L.solve(vectors, t.to(vectors.dtype) @ vectors).diagonal(0, -2, -1)
    equal, defective = _together(x, y, vectors)
    if seen(y, defective):
        warn_pairs(y, equal & defective.unsqueeze(-1), "eigenvalues")
        slopes = _lost(slopes, defective & _moving(t))
    return slopes
