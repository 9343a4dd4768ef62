"""Ops that place entries at given positions: linear, so each is itself applied to the directions.

Where two entries claim one position torch keeps one of them; its backward then gives a gradient to both.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import every, operands, pushforward
from dualnn.engine.registry import Sample
from dualnn.engine.tangents import Tangent

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


@operands("as_strided_scatter", lambda r: [Sample((r(3, 3), r(2, 2), (2, 2), (3, 1), 1))])
def _as_strided_scatter(
    y: Tensor, t: dict, input: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> Tangent | None:
    some = t["input"] or t["src"]

    def each(name: str, like: Tensor) -> Tensor:
        return torch.zeros((some.num, *like.shape), dtype=y.dtype) if t[name] is None else t[name].dense()

    base, source = each("input", input), each("src", src)
    if input.dim() and not input.is_contiguous():
        base = base.contiguous()
    moved = [
        torch.as_strided_scatter(_laid_out(b, input), s, size, stride, storage_offset)
        for b, s in zip(base, source, strict=True)
    ]
    return some.map(lambda _: torch.stack(moved) if moved else base.new_zeros((0, *y.shape)))


def _laid_out(d: Tensor, x: Tensor) -> Tensor:
    """A direction in the memory layout of the value, which ``as_strided`` counts in."""
    if d.stride() == x.stride():
        return d.clone()
    out = torch.empty_strided(x.shape, x.stride(), dtype=d.dtype, device=d.device)
    out.copy_(d)
    return out
