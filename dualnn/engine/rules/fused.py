"""Fused kernels that are several ops in one: their value, with the directions of the separate ops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.decompose import decomposition


@decomposition("native_layer_norm", torch.native_layer_norm)  # torch's own gradients of mean and rstd are zero: wrong
def _native_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(dims, keepdim=True)
    rstd = torch.rsqrt(((input - mean) ** 2).mean(dims, keepdim=True) + eps)
    return torch.layer_norm(input, normalized_shape, weight, bias, eps), mean, rstd


def _batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The value (without an update of the running statistics: the op itself makes it), mean and 1 / deviation."""
    if not training:
        none = torch.zeros(0, dtype=input.dtype)
        return torch.batch_norm(input, weight, bias, mean, var, False, 0.0, eps, False), none, none
    dims = tuple(d for d in range(input.dim()) if d != 1)
    centre = input.mean(dims, keepdim=True)
    rstd = torch.rsqrt(((input - centre) ** 2).mean(dims) + eps)
    return torch.batch_norm(input, weight, bias, None, None, True, 0.0, eps, False), centre.reshape(-1), rstd


@decomposition("native_batch_norm", torch.native_batch_norm)  # torch's own does not support a third derivative
def _native_batch_norm(
    input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: Any, eps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, eps)


@decomposition("_native_batch_norm_legit", torch._native_batch_norm_legit)
def _native_batch_norm_legit(input: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (rest[0], rest[1]) if len(rest) == 5 else (None, None)
    return _batch_norm(input, weight, bias, mean, var, rest[-3], rest[-1])


_with_update = getattr(torch.ops.aten, "_batch_norm_with_update", None)
if _with_update is not None:

    @decomposition("_batch_norm_with_update", _with_update, _with_update.default)
    def _batch_norm_with_update(
        input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: Any, eps: Any
    ) -> tuple[Tensor, ...]:
        found = _batch_norm(input, weight, bias, running_mean, running_var, True, eps)
        return *found, torch.zeros(0, dtype=torch.uint8)


@decomposition("gaussian_nll_loss", F.gaussian_nll_loss)  # torch's own body clamps in place under no_grad
def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if var.shape != input.shape and input.shape[:-1] == var.shape:
        var = var.unsqueeze(-1)
    var = torch.clamp(var, min=eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later; its chunked kernels drop tangents in torch itself

    @decomposition("linear_cross_entropy", F.linear_cross_entropy)
    def _linear_cross_entropy(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> Tensor:
        classes, *rest = linear_weight.shape[:-1]
        logits = F.linear(
            input,
            linear_weight.reshape(-1, linear_weight.shape[-1]),
            None if linear_bias is None else linear_bias.reshape(-1),
        ).reshape(*input.shape[:-1], classes, *rest)
        return F.cross_entropy(
            logits,
            target,
            weight=weight,
            reduction=reduction,
            ignore_index=-100 if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
        )
