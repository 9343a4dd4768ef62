"""Clamping, with bounds that are numbers or tensors; on a bound the derivative is the input's, as in torch."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import operands
from dualnn.engine.registry import Sample
from dualnn.engine.tangents import Tangent


def _sum(parts: list[tuple[Tangent | None, Tensor]], y: Tensor) -> Tangent | None:
    out: Tangent | None = None
    for tan, mask in parts:
        if tan is not None:
            term = tan.scale(mask.to(y.dtype), y.shape)
            out = term if out is None else out.plus(term)
    return out


@operands(
    "clamp",
    lambda r: [
        Sample((r(3, 4, low=-0.9, high=0.9), -1.0, 1.0)),
        Sample((r(3, 4), r(4, low=-1, high=-0.5), r(3, 1, low=0.5, high=1))),
        Sample((r(3), r(3, low=0.5, high=1), r(3, low=-1, high=-0.5))),
        Sample((r(3),), {"max": 0.3}),
    ],
    also=[torch.clip, Tensor.clip],
)
def _clamp(y: Tensor, t: dict, input: Tensor, min: Any = None, max: Any = None) -> Tangent | None:
    no = torch.zeros((), dtype=torch.bool, device=y.device)
    below = no if min is None else input < min
    above = no if max is None else input > max
    if min is not None and max is not None:
        # Crossed bounds: the upper one wins.
        crossed = torch.as_tensor(min > max, device=y.device)
        below, above = below & ~crossed, above | crossed
    return _sum([(t["input"], ~(below | above)), (t["min"], below), (t["max"], above)], y)


@operands("clamp_min", lambda r: [Sample((r(3, 4), r(4, low=-1, high=1))), Sample((r(3), -3.0))])
def _clamp_min(y: Tensor, t: dict, input: Tensor, min: Any) -> Tangent | None:
    return _clamp(y, {**t, "max": None}, input, min)


@operands("clamp_max", lambda r: [Sample((r(3, 4), r(4, low=-1, high=1))), Sample((r(3), 3.0))])
def _clamp_max(y: Tensor, t: dict, input: Tensor, max: Any) -> Tangent | None:
    return _clamp(y, {**t, "min": None}, input, None, max)
