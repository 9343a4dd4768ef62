r"""Singular values and vectors, :math:`A = U \Sigma V^H`.

With :math:`P = U^H \mathrm dA\, V` and :math:`E_{jk} = \sigma_k^2 - \sigma_j^2`:

.. math:: \mathrm d\sigma = \mathrm{Re}\,\mathrm{diag}\,P, \quad
          \mathrm dU = U\,\frac{P\Sigma + \Sigma P^H}{E} + (I - U U^H)\,\mathrm dA\,V\Sigma^{-1}, \quad
          \mathrm dV = V\,\frac{\Sigma P + P^H\Sigma}{E} + (I - V V^H)\,\mathrm dA^H U\Sigma^{-1},

off the diagonal. In the complex case every pair of vectors has a free phase, which is kept from turning in the mean of
the two: the diagonal holds :math:`\pm i\,\mathrm{Im}\,P_{jj} / 2\sigma_j`.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.generic import pushforward

L = torch.linalg


def _vectors(t: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = vh.mH
    p = u.mH @ t @ v
    diagonal = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    gaps = (s * s).unsqueeze(-2) - (s * s).unsqueeze(-1)
    gaps = torch.where(diagonal, torch.ones_like(gaps), gaps)
    row, column = s.unsqueeze(-2), s.unsqueeze(-1)
    left = torch.where(diagonal, torch.zeros_like(p), (p * row + column * p.mH) / gaps)
    right = torch.where(diagonal, torch.zeros_like(p), (column * p + p.mH * row) / gaps)
    entries = p.diagonal(0, -2, -1)
    if p.is_complex():
        phase = torch.complex(torch.zeros_like(entries.real), entries.imag / (2 * s))
        left, right = left + torch.diag_embed(phase), right - torch.diag_embed(phase)
    du, dv = u @ left, v @ right
    if u.shape[-2] > u.shape[-1]:
        away = t @ v / row
        du = du + away - u @ (u.mH @ away)
    if v.shape[-2] > v.shape[-1]:
        away = t.mH @ u / row
        dv = dv + away - v @ (v.mH @ away)
    return du, torch.real(entries), dv.mH


@pushforward("linalg.svd", None, functions=[L.svd])
def _svd(
    t: Tensor, x: Tensor, y: Any, full_matrices: bool = True, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = y
    k = s.shape[-1]
    du, ds, dvh = _vectors(t, u[..., :, :k], s, vh[..., :k, :])
    return _completed(du, u), ds, _completed(dvh.mH, vh.mH).mH


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
    return torch.real((u.conj() * (t @ vh.mH)).sum(-2))
