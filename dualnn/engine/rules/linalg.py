r"""Matrix factorisations, inverses and solves: K directions in one batched product or solve, the factors reused.

==========  ===========================================================================================================
solve       :math:`\mathrm dX = A^{-1}(\mathrm dB - \mathrm dA\,X)`
LU          :math:`M = L^{-1} P^T \mathrm dA\, U^{-1}`, :math:`\mathrm dL = L\,\mathrm{tril}(M, -1)`,
            :math:`\mathrm dU = \mathrm{triu}(M)\,U`, with P frozen
QR          :math:`C = Q^H \mathrm dA\, R^{-1}`, :math:`W = \mathrm{tril}(C, -1) - \mathrm{tril}(C, -1)^H`,
            :math:`\mathrm dQ = Q W + (I - Q Q^H)\, \mathrm dA\, R^{-1}`, :math:`\mathrm dR = (C - W) R`
Cholesky    :math:`\mathrm dL = L\,\Phi(L^{-1} \mathrm dA\, L^{-H})`, Φ: the lower triangle with half the diagonal
eigh        :math:`P = V^H \mathrm dA\, V`, :math:`\mathrm d\lambda = \mathrm{diag}\,P`,
            :math:`\mathrm dV = V\,(P_{ij} / (\lambda_j - \lambda_i))_{i \ne j}`
==========  ===========================================================================================================

LAPACK reads one triangle of a Hermitian argument; so do the directions here.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import operands, pushforward
from dualnn.engine.registry import Sample
from dualnn.engine.tangents import Tangent, aligned

L = torch.linalg
triangular = L.solve_triangular


def _regular(r: Any, *shape: int) -> Tensor:
    """Matrices far from singular, with singular values apart."""
    return r(*shape) + torch.diag_embed(torch.arange(3.0, 3.0 + shape[-1], dtype=torch.float64))


def _square(r: Any) -> list[Sample]:
    return [Sample((_regular(r, 3, 3),)), Sample((_regular(r, 2, 3, 3),))]


def _hermitian(d: Tensor, lower: bool) -> Tensor:
    """What LAPACK reads of a direction of a Hermitian matrix."""
    half = d.tril(-1) if lower else d.triu(1)
    diagonal = d.diagonal(0, -2, -1)
    if d.is_complex():
        diagonal = torch.complex(diagonal.real, torch.zeros_like(diagonal.real))
    return half + half.mH + torch.diag_embed(diagonal)


# Inverses and solves.


def _inverse(t: Tensor, x: Tensor, y: Any, *_: Any, **__: Any) -> Any:
    inv = y if isinstance(y, Tensor) else y[0]
    moved = -(inv @ t @ inv)
    return moved if isinstance(y, Tensor) else (moved, None)


pushforward("linalg.inv", _square, functions=[L.inv, torch.inverse, Tensor.inverse])(_inverse)
pushforward("linalg.inv_ex", _square, functions=[L.inv_ex])(_inverse)


def _is_vector(a: Tensor, b: Tensor) -> bool:
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def _solve_samples(r: Any) -> list[Sample]:
    return [
        Sample((_regular(r, 3, 3), r(3, 2))),
        Sample((_regular(r, 3, 3), r(3))),
        Sample((_regular(r, 2, 3, 3), r(2, 3))),
        Sample((_regular(r, 2, 3, 3), r(3, 2))),
        Sample((_regular(r, 3, 3), r(2, 3)), {"left": False}),
    ]


@operands("linalg.solve", _solve_samples, functions=[L.solve])
def _solve(y: Tensor, t: dict, A: Tensor, B: Tensor, *, left: bool = True) -> Tangent | None:
    vector = left and _is_vector(A, B)
    x = y.unsqueeze(-1) if vector else y

    def solve(d: Tensor) -> Tensor:  # (K, *batch, n, k) against (*batch, n, n)
        found = L.solve(A, d, left=left)
        return found.squeeze(-1) if vector else found

    def right(d: Tensor) -> Tensor:
        d = d.unsqueeze(-1) if vector else d
        return solve(aligned(d, x.dim()).expand(d.shape[0], *x.shape))

    tan = t["A"] and t["A"].map(lambda d: solve(-(aligned(d, x.dim()) @ x) if left else -(x @ aligned(d, x.dim()))))
    part = t["B"] and t["B"].map(right)
    return part if tan is None else tan.plus(part)


@operands(
    "linalg.solve_triangular",
    lambda r: [
        Sample((_regular(r, 3, 3), r(3, 2)), {"upper": True}),
        Sample((_regular(r, 2, 3, 3), r(1, 3, 2)), {"upper": False, "unitriangular": True}),
        Sample((_regular(r, 3, 3), r(2, 3)), {"upper": False, "left": False}),
    ],
    functions=[L.solve_triangular],
)
def _solve_triangular(
    y: Tensor, t: dict, A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tangent | None:
    def read(d: Tensor) -> Tensor:
        d = d.triu(int(unitriangular)) if upper else d.tril(-int(unitriangular))
        return aligned(d, y.dim())

    def solve(d: Tensor) -> Tensor:
        return triangular(A, d.expand(d.shape[0], *y.shape), upper=upper, left=left, unitriangular=unitriangular)

    tan = t["A"] and t["A"].map(lambda d: solve(-(read(d) @ y) if left else -(y @ read(d))))
    part = t["B"] and t["B"].map(lambda d: solve(aligned(d, y.dim())))
    return part if tan is None else tan.plus(part)


# Factorisations.


def _lu_parts(t: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of L and U of a matrix whose rows are already in pivoted order, with directions ``t``."""
    m, n = t.shape[-2:]
    k = min(m, n)
    l1, u1 = lower[..., :k, :], upper[..., :, :k]
    core = triangular(l1, t[..., :k, :k], upper=False, unitriangular=True)
    core = triangular(u1, core, upper=True, left=False)
    dl, du = l1 @ core.tril(-1), core.triu() @ u1
    if m > n:
        rest = triangular(u1, t[..., k:, :] - lower[..., k:, :] @ du, upper=True, left=False)
        dl = torch.cat([dl, rest], -2)
    elif m < n:
        rest = triangular(l1, t[..., :, k:] - dl @ upper[..., :, k:], upper=False, unitriangular=True)
        du = torch.cat([du, rest], -1)
    return dl, du


def _tall_and_wide(r: Any) -> list[Sample]:
    return [*_square(r), Sample((r(4, 3),)), Sample((r(2, 3, 4),))]


@pushforward("linalg.lu", _tall_and_wide, functions=[L.lu])
def _lu(t: Tensor, x: Tensor, y: Any, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    p, lower, upper = y
    dl, du = _lu_parts(p.mT @ t if pivot else t, lower, upper)
    return torch.zeros((t.shape[0], *p.shape), dtype=t.dtype, device=t.device), dl, du


def _packed(t: Tensor, x: Tensor, y: Any, *_: Any, pivot: bool = True, **__: Any) -> tuple[Tensor | None, ...]:
    packed, pivots, *rest = y
    p, lower, upper = torch.lu_unpack(packed, pivots)
    dl, du = _lu_parts(p.mT @ t if pivot else t, lower, upper)
    m, n = t.shape[-2:]
    k = min(m, n)
    out = torch.zeros_like(t)
    out = out + torch.nn.functional.pad(dl.tril(-1), (0, n - k)) + torch.nn.functional.pad(du, (0, 0, 0, m - k))
    return out, *[None] * (1 + len(rest))


pushforward("linalg.lu_factor", _tall_and_wide, functions=[L.lu_factor])(_packed)
pushforward("linalg.lu_factor_ex", _tall_and_wide, functions=[L.lu_factor_ex])(_packed)


def _cholesky_push(t: Tensor, factor: Tensor, upper: bool) -> Tensor:
    low = factor.mH if upper else factor
    inner = triangular(low, _hermitian(t, not upper), upper=False)
    inner = triangular(low.mH, inner, upper=True, left=False)
    phi = inner.tril(-1) + torch.diag_embed(inner.diagonal(0, -2, -1) / 2)
    moved = low @ phi
    return moved.mH if upper else moved


# Torch's gradients of these are made symmetric, which the standard samples are not: the conformance suite tests them.
pushforward("linalg.cholesky", None, functions=[L.cholesky])(
    lambda t, x, y, *, upper=False: _cholesky_push(t, y, upper)
)
pushforward("linalg.cholesky_ex", None, functions=[L.cholesky_ex])(
    lambda t, x, y, *, upper=False, check_errors=False: (_cholesky_push(t, y[0], upper), None)
)


@pushforward("linalg.eigh", None, functions=[L.eigh])
def _eigh(t: Tensor, x: Tensor, y: Any, UPLO: str = "L") -> tuple[Tensor, Tensor]:
    values, vectors = y
    moved = vectors.mH @ _hermitian(t, UPLO.upper() == "L") @ vectors
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    diagonal = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    mixing = torch.where(diagonal, torch.zeros_like(moved), moved / torch.where(diagonal, torch.ones_like(gaps), gaps))
    return torch.real(moved.diagonal(0, -2, -1)), vectors @ mixing


@pushforward("linalg.eigvalsh", None, functions=[L.eigvalsh])
def _eigvalsh(t: Tensor, x: Tensor, y: Tensor, UPLO: str = "L") -> Tensor:
    _, vectors = L.eigh(x, UPLO)
    return torch.real((vectors.conj() * (_hermitian(t, UPLO.upper() == "L") @ vectors)).sum(-2))


@pushforward("linalg.slogdet", _square, functions=[L.slogdet, torch.slogdet, Tensor.slogdet])
def _slogdet(t: Tensor, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    trace = L.solve(x, t).diagonal(0, -2, -1).sum(-1)
    sign = y[0]
    if x.is_complex():
        return sign * torch.complex(torch.zeros_like(trace.real), trace.imag), trace.real
    return torch.zeros_like(trace), trace
