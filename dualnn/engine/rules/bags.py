"""Sums, means and maxima over ragged groups of rows: embedding bags and segments."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample, unsupported

SUM, MEAN, MAX = 0, 1, 2


def _bag_samples(r: Any) -> list[Sample]:
    index, offsets = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([0, 2, 2])
    return [
        Sample((r(5, 3), index, offsets, False, SUM, False, r(5), False, None)),
        Sample((r(5, 3), index, offsets, False, MEAN, False, None, False, 3)),
        Sample((r(5, 3), index, offsets, False, MAX, False, None, False, None)),
        Sample((r(5, 3), index, torch.tensor([0, 2, 5]), False, SUM, False, None, True, None)),
    ]


@decomposition(
    "embedding_bag", *dict.fromkeys([torch.embedding_bag, torch._VF.embedding_bag]), samples=_bag_samples, smooth=False
)
def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, None, None, None]:
    bags = offsets.numel() - (1 if include_last_offset else 0)
    starts = offsets[:bags]
    position = torch.arange(indices.numel(), device=indices.device)
    bag = torch.searchsorted(starts.contiguous(), position, right=True) - 1
    if padding_idx is not None:
        kept = indices != padding_idx % weight.shape[0]
        indices, bag = indices[kept], bag[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = weight[indices]
    if mode == MAX:
        empty = weight.new_zeros(weight.shape[1:])
        # The largest row entry of each bag; among equals the first, as in torch.
        groups = [rows[bag == b] for b in range(bags)]
        return torch.stack([g.max(0).values if g.shape[0] else empty for g in groups]), None, None, None
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    total = torch.index_add(rows.new_zeros((bags, *weight.shape[1:])), 0, bag, rows)
    if mode == MEAN:
        total = total / torch.bincount(bag, minlength=bags).clamp(min=1).unsqueeze(-1).to(total.dtype)
    return total, None, None, None


REDUCTIONS = {
    "sum": lambda g: g.sum(0),
    "mean": lambda g: g.mean(0),
    "max": lambda g: g.amax(0),
    "min": lambda g: g.amin(0),
    "prod": lambda g: g.prod(0),
}
NEUTRAL = {"sum": 0.0, "mean": float("nan"), "max": -float("inf"), "min": float("inf"), "prod": 1.0}
WITH_INITIAL = {
    "sum": lambda y, v: y + v,
    "prod": lambda y, v: y * v,
    "max": lambda y, v: torch.maximum(y, torch.full_like(y, v)),
    "min": lambda y, v: torch.minimum(y, torch.full_like(y, v)),
}


@decomposition(
    "segment_reduce",
    torch.segment_reduce,
    samples=lambda r: [
        Sample((r(5, 2), name), {"lengths": torch.tensor([2, 0, 3]), "initial": 1.0}) for name in ("sum", "prod", "max")
    ],
    smooth=False,
)
def _segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> Tensor:
    if indices is not None:
        raise unsupported(torch.segment_reduce, "has no dual rule with indices=")
    sizes = offsets.diff(dim=-1) if lengths is None else lengths
    if sizes.dim() > 1:  # leading axes have segments of their own
        rows = [
            _segment_reduce(d, reduce, lengths=n, axis=axis - 1, initial=initial)
            for d, n in zip(data.unbind(0), sizes.unbind(0), strict=True)
        ]
        return torch.stack(rows)
    found = []
    for group in data.split(sizes.tolist()) if int(sizes.sum()) == data.shape[0] else _slices(data, sizes, offsets):
        if group.shape[0] == 0:
            value = NEUTRAL[reduce] if initial is None else initial
            found.append(data.new_full(data.shape[1:], float(value)))
            continue
        y = REDUCTIONS[reduce](group)
        if initial is not None:
            # The mean counts the initial value's sum, not as an entry of its own.
            y = y + initial / group.shape[0] if reduce == "mean" else WITH_INITIAL[reduce](y, initial)
        found.append(y)
    return torch.stack(found)


def _slices(data: Tensor, sizes: Tensor, offsets: Tensor | None) -> list[Tensor]:
    start = 0 if offsets is None else int(offsets[0])
    found = []
    for size in sizes.tolist():
        found.append(data[start : start + size])
        start += size
    return found
