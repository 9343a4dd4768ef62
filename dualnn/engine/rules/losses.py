r"""Losses: an elementwise (or row-wise) part, then torch's reduction.

Each rule computes torch's own loss for the value, and its tangents as the derivative of the unreduced loss followed
by the dual `sum`, so that derivatives per sample come from one place (`reductions`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.generic import KEYWORDS
from dualnn.engine.registry import OpSpec, Sample, register, unsupported
from dualnn.engine.tangents import Tangent, Zero

Rand = Callable[..., Tensor]
_nn = torch._C._nn


def _reduced(value: Tensor, loss: Tensor, tan: Tangent | None, num: int, level: int, reduction: Any, denom: Any) -> Any:
    """Reduce the tangent of the unreduced ``loss`` as torch reduces the value."""
    if tan is None:
        return make(value, Zero(num), level)
    if reduction in (0, "none"):
        return make(value, tan, level)
    tan = torch.sum(make(loss, tan, level))._tan  # type: ignore[attr-defined]
    if reduction in (1, "mean"):
        tan = tan.scale(1 / denom, value.shape)
    return make(value, tan, level)


def pointwise(name: str, op: Callable, unreduced: Callable, samples: Callable, signature: tuple[str, ...]) -> None:
    """A loss that is a mean or a sum of an elementwise function of input and target.

    Args:
        name: The op's name.
        op: Torch's kernel, called for the value.
        unreduced: ``unreduced(input, target, **named)``, plain code for the loss of each entry: run on duals.
        samples: Samples, in the kernel's own argument order.
        signature: The kernel's argument names.
    """

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        named = dict(zip(signature, args, strict=False)) | {KEYWORDS.get(k, k): v for k, v in kwargs.items()}
        unknown = set(named) - set(signature)
        if unknown:
            raise unsupported(func, f"has no dual rule for the argument {sorted(unknown)[0]}=")
        level = top_level(named.values())
        num = count(level, named.values())
        if "reduction" not in named:  # the kernels' own default differs between torch versions
            raise unsupported(func, "needs its reduction= given")
        reduction = named.pop("reduction")
        loss = unreduced(**named)
        value = func(*[split(x, level)[0] for x in args], **{k: split(x, level)[0] for k, x in kwargs.items()})
        primal, tan = split(loss, level)
        return _reduced(value, primal, tan, num, level, reduction, max(loss.numel(), 1))

    register(op, rule=rule, spec=OpSpec(name, op, samples))


def _pair(rand: Rand) -> list[Sample]:
    return [Sample((rand(3, 2), rand(3, 2), r)) for r in (0, 1, 2)] + [
        Sample((rand(3, 2), rand(3, 2), 1), constant=(1,))
    ]


def _huber(input: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    d = input - target
    return torch.where(d.abs() <= delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta))


def _smooth_l1(input: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    d = input - target
    if beta == 0:
        return d.abs()
    return torch.where(d.abs() < beta, 0.5 * d * d / beta, d.abs() - 0.5 * beta)


def _bce(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    # torch clamps its logs at -100; its gradient divides by max(x (1 - x), 1e-12). The derivative here is exact.
    loss = -(target * torch.log(input) + (1 - target) * torch.log1p(-input))
    return loss if weight is None else loss * weight


def _bce_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Tensor:
    factor = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * input - factor * F.logsigmoid(input)
    return loss if weight is None else loss * weight


def _kl(input: Tensor, target: Tensor, *, log_target: bool = False) -> Tensor:
    return torch.exp(target) * (target - input) if log_target else torch.xlogy(target, target) - target * input


pointwise(
    "mse_loss", _nn.mse_loss, lambda input, target: (input - target) ** 2, _pair, ("input", "target", "reduction")
)
pointwise("l1_loss", _nn.l1_loss, lambda input, target: (input - target).abs(), _pair, ("input", "target", "reduction"))
pointwise(
    "huber_loss",
    _nn.huber_loss,
    _huber,
    lambda r: [Sample((r(3, 2), r(3, 2), 1, 0.7))],
    ("input", "target", "reduction", "delta"),
)
pointwise(
    "smooth_l1_loss",
    _nn.smooth_l1_loss,
    _smooth_l1,
    lambda r: [Sample((r(3, 2), r(3, 2), 1, 0.7))],
    ("input", "target", "reduction", "beta"),
)
pointwise(
    "soft_margin_loss",
    _nn.soft_margin_loss,
    lambda input, target: F.softplus(-target * input),
    lambda r: _pair(r)[3:],
    ("input", "target", "reduction"),
)
pointwise(
    "binary_cross_entropy",
    _nn.binary_cross_entropy,
    _bce,
    lambda r: [Sample((r(3, 2, low=0.1, high=0.9), r(3, 2, low=0.1, high=0.9), None, 1))],
    ("input", "target", "weight", "reduction"),
)
pointwise(
    "binary_cross_entropy_with_logits",
    torch.binary_cross_entropy_with_logits,
    _bce_logits,
    lambda r: [
        Sample((r(3, 2), r(3, 2, low=0.1, high=0.9), None, None, 1)),
        Sample((r(3, 2), r(3, 2, low=0.1, high=0.9), r(3, 2, low=0.5), r(2, low=0.5), 1), constant=(2, 3)),
    ],
    ("input", "target", "weight", "pos_weight", "reduction"),
)
pointwise(
    "kl_div",
    torch.kl_div,
    _kl,
    lambda r: [Sample((r(3, 2), r(3, 2, low=0.1, high=0.9), 1)), Sample((r(3, 2), r(3, 2), 2), {"log_target": True})],
    ("input", "target", "reduction", "log_target"),
)


def _class_weights(target: Tensor, weight: Tensor | None, ignore_index: int, like: Tensor) -> Tensor:
    kept = target != ignore_index
    if weight is None:
        return kept.to(like.dtype)
    return torch.where(kept, weight[torch.where(kept, target, 0)], torch.zeros((), dtype=like.dtype))


def _picked(logp: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """-log p of the target class, ``(N, C, ...) -> (N, ...)``."""
    dim = 0 if logp.dim() == 1 else 1
    index = torch.where(target == ignore_index, 0, target).unsqueeze(dim)
    return -torch.gather(logp, dim, index).squeeze(dim)


def _classified(name: str, op: Callable, logp: Callable, samples: Callable) -> None:
    """``nll_loss`` and ``cross_entropy``: weights and ignored targets enter the mean's denominator."""
    signature = ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing")

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        named = dict(zip(signature, args, strict=False)) | kwargs
        level = top_level(named.values())
        num = count(level, named.values())
        x, target, weight = named["input"], named["target"], named.get("weight")
        reduction, ignore = named.get("reduction", 1), named.get("ignore_index", -100)
        eps = named.get("label_smoothing", 0.0)
        if top_level((target, weight)) > 0 and not target.dtype.is_floating_point:
            raise unsupported(func, "has no dual rule for dual class weights")
        lp = logp(x)
        dim = 0 if x.dim() == 1 else 1
        shape = tuple(-1 if d == dim else 1 for d in range(x.dim()))
        if target.dtype.is_floating_point:  # class probabilities
            probs = target if not eps else target * (1 - eps) + eps / x.shape[dim]
            loss = -(lp * probs * (1 if weight is None else weight.reshape(shape))).sum(dim)
            denom: Any = loss.numel() if loss.dim() else 1
        else:
            w = _class_weights(target, weight, ignore, x)
            loss = w * _picked(lp, target, ignore)
            if eps:
                spread = -(lp if weight is None else lp * weight.reshape(shape)).sum(dim)
                spread = torch.where(target == ignore, torch.zeros_like(spread), spread)
                loss = (1 - eps) * loss + eps / x.shape[dim] * spread
            denom = w.sum()
        value = func(*[split(a, level)[0] for a in args], **{k: split(a, level)[0] for k, a in kwargs.items()})
        primal, tan = split(loss, level)
        return _reduced(value, primal, tan, num, level, reduction, denom)

    register(op, rule=rule, spec=OpSpec(name, op, samples))


def _class_samples(r: Rand) -> list[Sample]:
    target = torch.tensor([1, 0, 2])
    out = [Sample((r(3, 4), target, None, reduction, -100)) for reduction in (0, 1, 2)]
    out.append(Sample((r(3, 4), target, r(4, low=0.5), 1, 0), constant=(2,)))
    out.append(Sample((r(3, 4, 2), torch.tensor([[1, 0], [2, 3], [0, 0]]), None, 1, -100)))
    return out


_classified("nll_loss", _nn.nll_loss_nd, lambda x: x, _class_samples)
_classified(
    "cross_entropy_loss",
    _nn.cross_entropy_loss,
    lambda x: F.log_softmax(x, 0 if x.dim() == 1 else 1),
    lambda r: [
        *_class_samples(r),
        Sample((r(4), torch.tensor(2), None, 1, -100)),
        Sample((r(3, 4), torch.tensor([1, 0, 2]), r(4, low=0.5), 1, -100, 0.1), constant=(2,)),
        Sample((r(3, 4), torch.softmax(r(3, 4), 1), None, 1, -100, 0.1)),
    ],
)
