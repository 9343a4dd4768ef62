r"""The determinant, whose derivative is a polynomial and exists at singular matrices: the adjugate, not the inverse.

.. math:: \mathrm d \det A = \mathrm{tr}(\mathrm{adj}(A)\, \mathrm dA), \qquad
          \mathrm{adj}(A) = \det(A)\, A^{-1} \text{ where } A \text{ is regular}.

Elsewhere let :math:`A = U \Sigma V^H`. For *any* constant unitary U and V, :math:`B = U^H A V` has
:math:`\mathrm{adj}(A) = \det(U V^H)\, V\, \mathrm{adj}(B)\, U^H`, so that they may be frozen, however often the
singular values are repeated. Split B into the block L of large singular values and the q small ones, with the Schur
complement :math:`C = B_{22} - B_{21} L^{-1} B_{12}`. Then :math:`\det B = \det L \det C`, and

.. math:: \mathrm{adj}(B) = \det L \begin{pmatrix}
          L^{-1} \det C + P\, \mathrm{adj}(C)\, Q & -P\, \mathrm{adj}(C) \\ -\mathrm{adj}(C)\, Q & \mathrm{adj}(C)
          \end{pmatrix}, \quad P = L^{-1} B_{12},\; Q = B_{21} L^{-1},

where the q small rows go through polynomials without divisions by data (Faddeev and LeVerrier). All of this is plain
code on A, so derivatives of every order follow, to the n-th, also at the zero matrix, where they are exact.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.generic import pushforward
from dualnn.engine.registry import Sample

L = torch.linalg


def _samples(r: object) -> list[Sample]:
    rank_one = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    rank_two = torch.diag(torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64))
    several = torch.stack([rank_one, rank_two, torch.zeros_like(rank_one), torch.eye(3, dtype=torch.float64)])
    return [Sample((r(3, 3),)), Sample((r(2, 2, 2),)), Sample((several,)), Sample((r(1, 1),))]  # type: ignore[operator]


def _push(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    small = _small(primal_of(x))
    if small:
        return (adjugate(x, small).mT * t).sum((-2, -1))
    return y * L.solve(x, t).diagonal(0, -2, -1).sum(-1)


pushforward("linalg.det", _samples, functions=[L.det, torch.det, Tensor.det])(_push)


def _small(x: Tensor) -> int:
    """How many singular values (of any matrix of the batch) are too small to divide by."""
    if is_functorch_wrapped_tensor(x) or x.numel() == 0 or x.device.type == "meta":
        return 0  # cannot be asked: a singular matrix then gives nan, as the inverse does
    x = x.detach()
    eps = torch.finfo(x.dtype).eps ** 0.5
    pivots = L.lu_factor_ex(x)[0].diagonal(0, -2, -1).abs()
    if bool((pivots.amin(-1) > eps * pivots.amax(-1)).all()) or not bool(torch.isfinite(pivots).all()):
        return 0
    s = L.svdvals(x)
    return int((s <= eps * s[..., :1]).sum(-1).max())


def adjugate(a: Tensor, small: int) -> Tensor:
    """The adjugate, by plain code that is right to every order at matrices with ``small`` tiny singular values."""
    u, _, vh = L.svd(primal_of(a).detach())
    cut = a.shape[-1] - small
    b = u.mH @ a @ vh.mH
    corner = b[..., cut:, cut:]
    if cut == 0:
        inner, _ = _polynomials(corner)
    else:
        large, right, below = b[..., :cut, :cut], b[..., :cut, cut:], b[..., cut:, :cut]
        inverse = L.inv(large)
        p, q = inverse @ right, below @ inverse
        adj, det = _polynomials(corner - below @ p)
        top = torch.cat([inverse * det[..., None, None] + p @ adj @ q, -(p @ adj)], -1)
        inner = torch.cat([top, torch.cat([-(adj @ q), adj], -1)], -2) * L.det(large)[..., None, None]
    return L.det(u @ vh)[..., None, None] * (vh.mH @ inner @ u.mH)


def _polynomials(c: Tensor) -> tuple[Tensor, Tensor]:
    r"""Adjugate and determinant: from :math:`M_1 = I`, :math:`M_{k+1} = c M_k - \mathrm{tr}(c M_k) I / k`."""
    n = c.shape[-1]
    eye = torch.eye(n, dtype=c.dtype, device=c.device)
    m = eye.expand(c.shape)
    for k in range(1, n):
        moved = c @ m
        m = moved - eye * (moved.diagonal(0, -2, -1).sum(-1) / k)[..., None, None]
    det = (c @ m).diagonal(0, -2, -1).sum(-1) / n
    sign = (-1.0) ** (n - 1)
    return sign * m, sign * det
