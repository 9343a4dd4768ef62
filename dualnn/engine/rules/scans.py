"""Scans along a dimension that need more than one line."""

import torch
from torch import Tensor

from dualnn.engine.generic import last, pushforward
from dualnn.engine.registry import Sample


@pushforward("logcumsumexp", lambda r: [Sample((r(2, 3), 1)), Sample((r(3, 2) * 3, 0)), Sample((r(), 0))])
def _logcumsumexp(t: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    r"""dy_i = sum_{j <= i} exp(x_j - y_i) dx_j: no term exceeds its dx, whatever the range of x."""
    d = last(dim, x)
    x, y, t = x.movedim(d, -1), y.reshape(x.shape).movedim(d, -1), t.movedim(d, -1)
    seen = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril()
    gap = x.unsqueeze(-2) - y.unsqueeze(-1)
    weight = torch.where(seen, torch.exp(torch.where(seen, gap, torch.zeros_like(gap))), torch.zeros_like(gap))
    return (weight @ t.unsqueeze(-1)).squeeze(-1).movedim(-1, d)
