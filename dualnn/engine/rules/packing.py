"""Packed sequences: rows of a padded batch in the order of time, and back."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.registry import Sample

_VF = torch._VF


@decomposition(
    "_pack_padded_sequence",
    *dict.fromkeys([_VF._pack_padded_sequence, torch._pack_padded_sequence]),
    samples=lambda r: [Sample((r(4, 3, 2), torch.tensor([4, 3, 1]), False))],
)
def _pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, None]:
    steps = input.unbind(1 if batch_first else 0)
    sizes = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
    return torch.cat([step[:size] for step, size in zip(steps, sizes, strict=False)]), None


@decomposition(
    "_pad_packed_sequence",
    *dict.fromkeys([_VF._pad_packed_sequence, torch._pad_packed_sequence]),
    samples=lambda r: [Sample((r(8, 2), torch.tensor([3, 2, 2, 1]), True, 0.5, 5))],
)
def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float = 0.0, total_length: Any = None
) -> tuple[Tensor, None]:
    sizes = batch_sizes.tolist()
    empty = torch.full((sizes[0], *data.shape[1:]), float(padding_value), dtype=data.dtype, device=data.device)
    rows = [torch.cat([step, empty[step.shape[0] :]]) for step in data.split(sizes)]
    rows += [empty] * (max(int(total_length or 0), len(sizes)) - len(sizes))
    return torch.stack(rows, 1 if batch_first else 0), None
