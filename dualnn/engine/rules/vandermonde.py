r"""Vandermonde matrices, :math:`V_{ij} = x_i^j`: their columns are products, of which nested duals follow each."""

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample


def _columns(x: Tensor, count: int) -> list[Tensor]:
    columns = [torch.ones_like(x)]
    for _ in range(count - 1):
        columns.append(columns[-1] * x)
    return columns[:count]


@decomposition(  # torch's own second derivative by reverse mode fails: it writes in place
    "vander", torch.vander, samples=lambda r: [Sample((r(3),)), Sample((r(3), 4, True))], reverse=False
)
def _vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    columns = _columns(x, len(x) if N is None else N)
    if not columns:
        return x.unsqueeze(-1)[..., :0]
    return torch.stack(columns if increasing else columns[::-1], -1)


@decomposition(
    "linalg.vander",
    torch.linalg.vander,
    samples=lambda r: [Sample((r(2, 3),)), Sample((r(3),), {"N": 5}), Sample((r(),), {"N": 2})],
)
def _linalg_vander(x: Tensor, *, N: int | None = None) -> Tensor:
    x = x if x.dim() else x.unsqueeze(0)
    return torch.stack(_columns(x, x.shape[-1] if N is None else N), -1)
