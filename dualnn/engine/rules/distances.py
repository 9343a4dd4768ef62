"""Distances between all pairs of points: norms of differences, with a zero derivative where two points coincide."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample


@decomposition(
    "cdist",
    *dict.fromkeys([torch.cdist, torch._VF.cdist]),
    samples=lambda r: [Sample((r(2, 3, 4), r(2, 5, 4), 2.0)), Sample((r(3, 4), r(5, 4), 1.5))],
)
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), float(p), -1)


@decomposition("pdist", torch.pdist, samples=lambda r: [Sample((r(4, 3), 2.0)), Sample((r(3, 2), 3.0))])
def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return torch.linalg.vector_norm(input[i] - input[j], float(p), -1)
