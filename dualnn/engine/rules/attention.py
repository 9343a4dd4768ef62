r"""Scaled dot product attention, :math:`P V` with :math:`P = \mathrm{softmax}(s\,Q K^T + M)`.

Torch's fused kernel gives the value. The directions follow

.. math:: \mathrm dO = \mathrm dP\,V + P\,\mathrm dV, \qquad
          \mathrm dP = P \odot (\mathrm dS - \mathrm{rowsum}(P \odot \mathrm dS)),

one direction after the other, so that one matrix of attention weights and one of their derivatives exist at a time,
never K of them. Rows that attend to nothing are zero, as in torch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.registry import OpSpec, Sample, register
from dualnn.engine.tangents import Dense, Tangent, Zero

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    if causal:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def _weights(scores: Tensor) -> Tensor:
    """Softmax over keys; a row without any key is zero, not nan."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    safe = torch.where(nothing, torch.zeros_like(scores), scores)
    return torch.where(nothing, torch.zeros_like(scores), torch.softmax(safe, -1))


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Grouped queries: each key head serves several query heads."""
    return x.repeat_interleave(heads // x.shape[-3], -3) if x.shape[-3] != heads else x


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in plain code."""
    if enable_gqa:
        key, value = _repeat(key, query.shape[-3]), _repeat(value, query.shape[-3])
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = _weights(_scores(query, key, attn_mask, is_causal, factor))
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return weights @ value


def _rule(func: Any, args: tuple, kwargs: dict) -> Tensor:
    named = dict(zip(_NAMES, args, strict=False)) | kwargs
    if named.get("dropout_p", 0.0) > 0:  # one mask for the value and all directions: both from one run
        return attention(**named)
    level = top_level(named.values())
    num = count(level, named.values())
    parts = {name: split(x, level) for name, x in named.items()}
    plain = {name: p for name, (p, _) in parts.items()}
    value = func(*[split(x, level)[0] for x in args], **{k: split(x, level)[0] for k, x in kwargs.items()})
    tangents = {name: t for name, (_, t) in parts.items() if t is not None}
    if not tangents:
        return make(value, Zero(num), level)
    return make(value, _directions(value, plain, tangents, num), level)


def _directions(y: Tensor, plain: dict, tangents: dict[str, Tangent], num: int) -> Tangent:
    q, k, v, mask = plain["query"], plain["key"], plain["value"], plain.get("attn_mask")
    heads = q.shape[-3] if plain.get("enable_gqa") else 0
    scale = plain.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if heads:
        k, v = _repeat(k, heads), _repeat(v, heads)
    weights = _weights(_scores(q, k, mask, bool(plain.get("is_causal")), scale))
    dense = {name: t.dense() for name, t in tangents.items()}

    def direction(index: int) -> Tensor:
        d = {name: t[index] for name, t in dense.items()}
        if heads:
            d.update({name: _repeat(d[name], heads) for name in ("key", "value") if name in d})
        terms = [weights @ d["value"]] if "value" in d else []
        scores = [(d["query"] * scale) @ k.mT] if "query" in d else []
        scores += [(q * scale) @ d["key"].mT] if "key" in d else []
        scores += [d["attn_mask"]] if "attn_mask" in d else []
        if scores:
            moved = weights * sum(scores[1:], scores[0])
            terms.append((moved - weights * moved.sum(-1, keepdim=True)) @ v)
        return sum(terms[1:], terms[0]).expand(y.shape)

    if num == 0:
        return Dense(y.new_zeros((0, *y.shape)))
    return next(iter(tangents.values())).map(lambda _: torch.stack([direction(i) for i in range(num)]))


def _samples(r: Any) -> list[Sample]:
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [True, True, False]])
    return [
        Sample((r(2, 2, 4, 3), r(2, 2, 3, 3), r(2, 2, 3, 5))),
        Sample((r(2, 2, 4, 3), r(2, 2, 4, 3), r(2, 2, 4, 3)), {"is_causal": True, "scale": 0.7}),
        Sample((r(1, 2, 4, 3), r(1, 2, 3, 3), r(1, 2, 3, 3), mask)),
        Sample((r(1, 2, 4, 3), r(1, 2, 3, 3), r(1, 2, 3, 3), r(4, 3))),
        Sample((r(1, 4, 2, 3), r(1, 2, 3, 3), r(1, 2, 3, 3)), {"enable_gqa": True}),
    ]


register(
    F.scaled_dot_product_attention,
    rule=_rule,
    spec=OpSpec("scaled_dot_product_attention", F.scaled_dot_product_attention, _samples),
)


def _flash(func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """The CPU kernel called by its own name: it also returns the logarithm of each row's sum."""
    named = dict(zip(("query", "key", "value", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    level = top_level(named.values())
    plain = {name: split(x, level)[0] for name, x in named.items()}
    value, total = func(**plain)
    out = attention(**named)
    q = named["query"]
    scale = named.get("scale")
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums = torch.logsumexp(_scores(q, named["key"], named.get("attn_mask"), bool(named.get("is_causal")), factor), -1)
    num = count(level, named.values())

    def around(v: Tensor, found: Tensor) -> Tensor:
        tan = split(found, level)[1]
        return make(v, Zero(num) if tan is None else tan, level)

    return around(value, out), around(total, sums)


_kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
if _kernel is not None:
    register(_kernel, _kernel.default, rule=_flash)
