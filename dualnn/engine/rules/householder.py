r"""``torch.geqrf``: Householder QR in its packed form, as LAPACK makes it, column by column.

For a column :math:`x` below the diagonal, :math:`\beta = -\mathrm{sign}(x_0) \lVert x \rVert`,
:math:`\tau = (\beta - x_0) / \beta`, :math:`v = (1, x_{1:} / (x_0 - \beta))`, and the rest of the matrix becomes
:math:`A - \tau v v^T A`. The packed result holds :math:`\beta` on the diagonal and :math:`v_{1:}` below it.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import unsupported


@decomposition("geqrf", torch.geqrf, Tensor.geqrf)  # torch has no derivative to compare with
def _geqrf(input: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    if input.is_complex():
        raise unsupported(torch.geqrf, "has a dual rule for real matrices only")
    rows, columns = input.shape[-2:]
    rest = input
    done: list[Tensor] = []
    above: list[Tensor] = []
    taus: list[Tensor] = []
    for _column in range(min(rows, columns)):
        x = rest[..., :, 0]
        tail = x[..., 1:]
        moving = (tail != 0).any(-1)
        length = torch.linalg.vector_norm(torch.where(moving.unsqueeze(-1), x, torch.ones_like(x)), dim=-1)
        beta = torch.where(moving, torch.where(x[..., 0] > 0, -length, length), x[..., 0])
        safe = torch.where(moving, beta, torch.ones_like(beta))
        tau = torch.where(moving, (safe - x[..., 0]) / safe, torch.zeros_like(safe))
        gap = torch.where(moving, x[..., 0] - beta, torch.ones_like(beta))
        v = torch.cat([torch.ones_like(beta).unsqueeze(-1), tail / gap.unsqueeze(-1)], -1)
        others = rest[..., :, 1:]
        others = others - (tau.unsqueeze(-1) * v).unsqueeze(-1) * (v.unsqueeze(-2) @ others)
        column = torch.cat([beta.unsqueeze(-1), v[..., 1:]], -1)
        done.append(torch.cat([*(a[..., 0].unsqueeze(-1) for a in above), column], -1) if above else column)
        above = [*(a[..., 1:] for a in above), others[..., 0, :]]
        rest = others[..., 1:, :]
        taus.append(tau)
    packed = torch.stack(done, -1)
    if columns > rows:
        packed = torch.cat([packed, torch.stack(above, -2)], -1)
    return packed, torch.stack(taus, -1)
