"""Ops that place entries at given positions: linear, so each is itself applied to the directions.

Where two entries claim one position torch keeps one of them; its backward then gives a gradient to both.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.decompose import decomposition
from dualnn.engine.dual_tensor import DualTensor, count, make, primal_of, top_level
from dualnn.engine.generic import every, pushforward
from dualnn.engine.registry import Sample, unsupported
from dualnn.engine.tangents import Zero

for _name, _sample in (
    ("max_unpool2d", lambda r: [Sample((r(1, 1, 2, 2), torch.tensor([[[[0, 3], [8, 10]]]]), (4, 4)))]),
    (
        "max_unpool3d",
        lambda r: [Sample((r(1, 1, 1, 2, 2), torch.tensor([[[[[0, 3], [8, 10]]]]]), (2, 4, 4), (2, 2, 2), (0, 0, 0)))],
    ),
):
    _op = getattr(torch._C._nn, _name)
    pushforward(_name, _sample, functions=[_op])(
        lambda t, x, y, *args, op=_op, **kwargs: every(t, lambda d: op(d, *args, **kwargs), y.shape)
    )


@decomposition(
    "as_strided_scatter",
    torch.as_strided_scatter,
    samples=lambda r: [
        Sample((r(3, 3), r(2, 2), (2, 2), (3, 1), 1)),
        Sample((r(3, 3).T, r(2), (2,), (4,))),
    ],
    # Torch's own gradient in the first argument is wrong (it goes to the entries that are overwritten): the value is
    # written here, so that it is not what autograd records over a dual.
    own_value=False,
    reverse=False,
)
def _as_strided_scatter(
    input: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> Tensor:
    plain = primal_of(input)
    extent = 1 + sum((n - 1) * step for n, step in zip(plain.shape, plain.stride(), strict=True))
    if plain.numel() and extent != plain.numel():
        raise unsupported(torch.as_strided_scatter, "has no dual rule for a tensor with gaps: .clone() it first")
    # The offset counts in the memory that the input is part of; the clone is a memory of its own.
    start = 0 if storage_offset is None else storage_offset - int(plain.storage_offset())
    out = input.clone()
    level = top_level((input, src))
    if not isinstance(out, DualTensor) or out._level < level:
        out = make(out, Zero(count(level, (input, src))), level)
    out.as_strided(size, stride, start).copy_(src)
    return out
