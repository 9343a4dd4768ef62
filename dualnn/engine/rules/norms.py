r"""Normalisation: :math:`\hat x = (x - \mu)\,\rho` with :math:`\rho = (\sigma^2 + \epsilon)^{-1/2}`.

The value is torch's own op, called once (running statistics are updated once). The directions follow

.. math:: d\hat x = \rho\,(dx - \overline{dx} - \hat x\,\overline{\hat x\,dx}),

with bars for means over the normalised entries. torch's forward mode is wrong at second order for these ops; here
the formula is plain code on :math:`x`, so a further level differentiates it again and is right.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import operands
from dualnn.engine.registry import Sample
from dualnn.engine.tangents import Tangent

Rand = Callable[..., Tensor]


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(dims, keepdim=True)
    rho = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * rho, rho


def _push(t: Tensor, hat: Tensor, rho: Tensor, dims: tuple[int, ...]) -> Tensor:
    return rho * (t - t.mean(dims, keepdim=True) - hat * (hat * t).mean(dims, keepdim=True))


def _affine(tan: Tangent | None, t: dict, hat: Tensor, weight: Tensor | None, shape: tuple[int, ...], y: Tensor) -> Any:
    """Directions of ``hat * weight + bias`` with weight and bias viewed as ``shape``."""
    if tan is not None and weight is not None:
        tan = tan.scale(weight.reshape(shape), y.shape)
    if t["weight"] is not None:
        part = t["weight"].map(lambda d: d.reshape(d.shape[0], *shape)).scale(hat, y.shape)
        tan = part if tan is None else tan.plus(part)
    if t["bias"] is not None:
        part = t["bias"].map(lambda d: d.reshape(d.shape[0], *shape)).scale(1.0, y.shape)
        tan = part if tan is None else tan.plus(part)
    return tan


@operands(
    "layer_norm",
    lambda r: [Sample((r(2, 3, 4), (4,), r(4), r(4))), Sample((r(2, 3, 4), (3, 4)))],
    functions=[torch.layer_norm],
)
def _layer_norm(
    y: Tensor,
    t: dict,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    dims = tuple(range(-len(normalized_shape), 0))
    hat, rho = _standardised(input, dims, eps)
    tan = t["input"] and t["input"].map(lambda d: _push(d, hat, rho, dims))
    return _affine(tan, t, hat, weight, tuple(normalized_shape), y)


@operands(
    "rms_norm", lambda r: [Sample((r(2, 3), (3,), r(3), 1e-6)), Sample((r(2, 3), (3,)))], functions=[torch.rms_norm]
)
def _rms_norm(
    y: Tensor, t: dict, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    dims = tuple(range(-len(normalized_shape), 0))
    rho = torch.rsqrt((input * input).mean(dims, keepdim=True) + (torch.finfo(input.dtype).eps if eps is None else eps))
    hat = input * rho
    tan = t["input"] and t["input"].map(lambda d: rho * (d - hat * (hat * d).mean(dims, keepdim=True)))
    return _affine(tan, t | {"bias": None}, hat, weight, tuple(normalized_shape), y)


@operands(
    "group_norm",
    lambda r: [Sample((r(2, 4, 3), 2, r(4), r(4))), Sample((r(2, 4, 2, 2), 4))],
    functions=[torch.group_norm],
)
def _group_norm(
    y: Tensor,
    t: dict,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    def grouped(a: Tensor, lead: int) -> Tensor:
        size = a.shape[lead + 1 :].numel() // num_groups
        return a.reshape(*a.shape[: lead + 1], num_groups, size)

    hat, rho = _standardised(grouped(input, 0), (-1,), eps)
    tan = t["input"] and t["input"].map(lambda d: _push(grouped(d, 1), hat, rho, (-1,)).reshape(d.shape))
    return _affine(tan, t, hat.reshape(input.shape), weight, (-1, *(1,) * (input.dim() - 2)), y)


def _batch_samples(r: Rand) -> list[Sample]:
    def call(shape: tuple[int, ...], training: bool) -> Sample:
        stats = (torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64))
        return Sample((r(*shape), r(shape[1]), r(shape[1]), *stats, training, 0.1, 1e-5, False), constant=(3, 4))

    return [call((4, 3), True), call((4, 3), False), call((3, 2, 2, 2), True)]


def _channels(input: Tensor, stats: bool, running_mean: Any, running_var: Any, eps: float, dims: tuple) -> Any:
    shape = (-1, *(1,) * (input.dim() - 2))
    if stats:
        return _standardised(input, dims, eps)
    rho = torch.rsqrt(running_var.reshape(shape) + eps)
    return (input - running_mean.reshape(shape)) * rho, rho


@operands("batch_norm", _batch_samples, functions=[torch.batch_norm])
def _batch_norm(
    y: Tensor,
    t: dict,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    # Batch statistics are differentiated through: samples mix here, which signals per sample must probe for.
    dims = tuple(d for d in range(-input.dim(), 0) if d != 1 - input.dim())
    hat, rho = _channels(input, training, running_mean, running_var, eps, dims)
    tan = t["input"]
    if tan is not None:
        tan = tan.map(lambda d: _push(d, hat, rho, dims)) if training else tan.scale(rho, y.shape)
    return _affine(tan, t, hat, weight, (-1, *(1,) * (input.dim() - 2)), y)


@operands(
    "instance_norm",
    lambda r: [Sample((r(2, 3, 5), r(3), r(3), None, None, True, 0.1, 1e-5, False))],
    functions=[torch.instance_norm],
)
def _instance_norm(
    y: Tensor,
    t: dict,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    dims = tuple(range(2 - input.dim(), 0))
    hat, rho = _channels(input, use_input_stats, running_mean, running_var, eps, dims)
    tan = t["input"]
    if tan is not None:
        tan = tan.map(lambda d: _push(d, hat, rho, dims)) if use_input_stats else tan.scale(rho, y.shape)
    return _affine(tan, t, hat, weight, (-1, *(1,) * (input.dim() - 2)), y)


@operands(
    "weight_norm",
    lambda r: [Sample((r(4, 3, 2), r(4, 1, 1))), Sample((r(4, 3), r(1, 3), 1)), Sample((r(4, 3), r(1, 1), -1))],
    functions=[torch._weight_norm],
)
def _weight_norm(y: Tensor, t: dict, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """y = g v / ||v||, the norm over all dimensions but ``dim`` (over all of them for -1)."""
    dims = tuple(d for d in range(-v.dim(), 0) if dim == -1 or d != dim - v.dim())
    rho = 1 / torch.linalg.vector_norm(v, 2, dims, keepdim=True)
    unit = v * rho
    tan = t["v"] and t["v"].map(lambda d: g * rho * (d - unit * (unit * d).sum(dims, keepdim=True)))
    if t["g"] is not None:
        part = t["g"].scale(unit, y.shape)
        tan = part if tan is None else tan.plus(part)
    return tan
