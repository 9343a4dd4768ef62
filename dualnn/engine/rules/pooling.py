"""Pooling and resampling: averages are linear (K folded into the batch); maxima gather at the value's own indices."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.dual_tensor import make
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.generic import every, first, folded, pushforward
from dualnn.engine.registry import OpSpec, Sample, register

Rand = Callable[..., Tensor]


def _batched(name: str, op: Callable, spatial: int, samples: Callable, functions: list | None = None) -> None:
    """A linear op on ``(B, C, *spatial)`` or ``(C, *spatial)``."""

    def push(t: Tensor, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() == spatial + 2:
            return folded(t, lambda d: op(d, *args, **kwargs))
        return every(t, lambda d: op(d, *args, **kwargs), y.shape)

    pushforward(name, samples, functions=functions)(push)


_nn = torch._C._nn
_batched("avg_pool1d", torch.avg_pool1d, 1, lambda r: [Sample((r(2, 3, 8), 2)), Sample((r(3, 8), 3, 2, 1))])
_batched("avg_pool2d", _nn.avg_pool2d, 2, lambda r: [Sample((r(2, 3, 6, 6), 2))])
_batched("avg_pool3d", _nn.avg_pool3d, 3, lambda r: [Sample((r(1, 2, 4, 4, 4), 2))])
_batched("adaptive_avg_pool1d", torch.adaptive_avg_pool1d, 1, lambda r: [Sample((r(2, 3, 7), 3))])
_batched("adaptive_avg_pool2d", _nn.adaptive_avg_pool2d, 2, lambda r: [Sample((r(2, 3, 6, 5), (2, 3)))])
_batched("adaptive_avg_pool3d", _nn.adaptive_avg_pool3d, 3, lambda r: [Sample((r(1, 2, 4, 4, 4), 2))])
for _name, _dims in (
    ("upsample_nearest1d", 1),
    ("upsample_linear1d", 1),
    ("upsample_nearest2d", 2),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
):
    _batched(_name, getattr(_nn, _name), _dims, None, functions=[getattr(_nn, _name)])  # type: ignore[arg-type]
_batched(
    "interpolate",
    F.interpolate,
    2,
    lambda r: [
        Sample((r(1, 2, 4, 4),), {"scale_factor": 2.0}),
        Sample((r(1, 2, 4, 4),), {"size": (6, 7), "mode": "bilinear"}),
    ],
    functions=[F.interpolate],
)
for _name in ("pixel_shuffle", "pixel_unshuffle"):
    _batched(_name, getattr(torch, _name), 2, lambda r: [Sample((r(1, 4, 4, 4), 2))])


def _max_pool(name: str, spatial: int, samples: Callable, *, adaptive: bool = False) -> None:
    """The value's indices pick the tangents; a fresh index comes from torch's own ``*_with_indices``."""
    indexed = getattr(F, f"{name}_with_indices")
    public = getattr(F, name)

    def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
        x, call, kwargs = first(func, call, kwargs)
        kwargs = dict(kwargs)
        wanted = kwargs.pop("return_indices", False) or func is indexed
        if not isinstance(x._primal, Tensor):
            raise UnsupportedOpError(f"{name} needs a tensor")
        value, index = indexed(x._primal, *call, **kwargs)
        flat = index.flatten(-spatial)

        def push(t: Tensor) -> Tensor:
            chosen = t.flatten(-spatial).gather(-1, flat.expand(t.shape[0], *flat.shape))
            return chosen.reshape(t.shape[0], *index.shape)

        out = make(value, x._tan.map(push), x._level)
        return (out, index) if wanted else out

    functions = [public, indexed] + ([] if adaptive else [getattr(torch, name)])
    register(*functions, rule=rule, spec=OpSpec(name, public, samples))


_max_pool("max_pool1d", 1, lambda r: [Sample((r(2, 3, 8), 2)), Sample((r(3, 8), 3, 1))])
_max_pool(
    "max_pool2d", 2, lambda r: [Sample((r(2, 3, 6, 6), 2)), Sample((r(1, 2, 6, 6), 3), {"stride": 2, "padding": 1})]
)
_max_pool("max_pool3d", 3, lambda r: [Sample((r(1, 2, 4, 4, 4), 2))])
_max_pool("adaptive_max_pool1d", 1, lambda r: [Sample((r(2, 3, 7), 3))], adaptive=True)
_max_pool("adaptive_max_pool3d", 3, lambda r: [Sample((r(1, 2, 4, 4, 4), (2, 3, 2)))], adaptive=True)
_max_pool("adaptive_max_pool2d", 2, lambda r: [Sample((r(2, 3, 6, 5), (2, 3)))], adaptive=True)
