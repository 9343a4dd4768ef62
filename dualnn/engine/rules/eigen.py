r"""Eigenvectors of a general matrix, normalised as torch does.

With :math:`A V = V \Lambda` and :math:`P = V^{-1} \mathrm dA\, V`: :math:`\mathrm d\lambda = \mathrm{diag}\,P`,
:math:`\mathrm dV = V G`, :math:`G_{ij} = P_{ij} / (\lambda_j - \lambda_i)` off the diagonal, and zero on it but for
what keeps every column at length one. The phase of a column is free; this is the derivative that does not turn it.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import pushforward


@pushforward("linalg.eig", None, functions=[torch.linalg.eig])
def _eig(t: Tensor, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    values, vectors = y
    moved = torch.linalg.solve(vectors, t.to(vectors.dtype) @ vectors)
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    diagonal = torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    mixing = torch.where(diagonal, torch.zeros_like(moved), moved / torch.where(diagonal, torch.ones_like(gaps), gaps))
    turned = vectors @ mixing
    length = torch.real((vectors.conj() * turned).sum(-2, keepdim=True))
    return moved.diagonal(0, -2, -1), turned - vectors * length
