"""Multi-class margin losses: hinge sums over the classes that are not the target's."""

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample

_nn = torch._C._nn


def _reduce(loss: Tensor, reduction: int) -> Tensor:
    if reduction == 1:
        return loss.mean()
    return loss.sum() if reduction == 2 else loss


@decomposition(
    "multi_margin_loss",
    _nn.multi_margin_loss,
    samples=lambda r: [
        Sample((r(3, 4), torch.tensor([1, 0, 3]), 1, 1.0, None, 1)),
        Sample((r(3, 4), torch.tensor([1, 0, 3]), 2, 0.5, torch.arange(1.0, 5.0).double(), 0), constant=(4,)),
    ],
    smooth=False,
)
def _multi_margin(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    r"""sum_{j != y} w_y max(0, margin - x_y + x_j)^p / C."""
    x = input if input.dim() > 1 else input.reshape(1, -1)
    y = target.reshape(-1, 1)
    hinge = torch.clamp(margin - x.gather(1, y) + x, min=0.0)
    hinge = torch.where(margin - x.gather(1, y) + x > 0, hinge, torch.zeros_like(hinge))
    terms = hinge if p == 1 else hinge * hinge
    if weight is not None:
        terms = terms * weight[y]
    others = torch.arange(x.shape[1], device=x.device) != y
    loss = torch.where(others, terms, torch.zeros_like(terms)).sum(1) / x.shape[1]
    return _reduce(loss, reduction) if reduction else loss.reshape(target.shape)


@decomposition(
    "multilabel_margin_loss",
    _nn.multilabel_margin_loss,
    samples=lambda r: [Sample((r(2, 4), torch.tensor([[1, 3, -1, 0], [2, -1, 0, 0]]), 1))],
    smooth=False,
)
def _multilabel_margin(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    r"""sum over targets y and other classes j of max(0, 1 - x_y + x_j) / C; targets end at the first -1."""
    x = input if input.dim() > 1 else input.reshape(1, -1)
    labels = target if target.dim() > 1 else target.reshape(1, -1)
    valid = (labels >= 0).long().cumprod(1).bool()
    chosen = torch.where(valid, labels, 0)
    is_label = torch.zeros(x.shape, dtype=torch.long, device=x.device).scatter_add(1, chosen, valid.long()) > 0
    margins = 1 - x.gather(1, chosen).unsqueeze(2) + x.unsqueeze(1)  # (N, targets, classes)
    counted = valid.unsqueeze(2) & ~is_label.unsqueeze(1) & (margins > 0)
    loss = torch.where(counted, margins, torch.zeros_like(margins)).sum((1, 2)) / x.shape[1]
    return _reduce(loss, reduction) if reduction else loss.reshape(input.shape[:-1])
