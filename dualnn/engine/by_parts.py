"""Linear maps of duals, part by part: of values and tangents of every level alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, count, make, split, top_level
from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import Dense, PerSample, Tangent, Zero


def linear(op: Callable[..., Tensor], lead: tuple[int, ...], *xs: Any) -> Any:
    """Apply a map that is linear in all operands together to plain tensors or duals of any levels.

    Args:
        op: ``op(lead, *xs)`` on plain tensors ``(*lead, *shape)``.
        lead: Sizes of the axes of directions in front.
        xs: The operands.
    """
    level = top_level(xs)
    if level == 0:
        return op(lead, *xs)
    parts = [split(x, level) for x in xs]
    primal = linear(op, lead, *(p for p, _ in parts))
    nums = {x._tan.num for x in xs if isinstance(x, DualTensor) and x._level == level}
    num = nums.pop() if len(nums) == 1 else count(level, xs)
    if all(t is None for _, t in parts):
        return make(primal, Zero(num), level)
    batch = samples_of(*(t for _, t in parts))
    return make(primal, of_kind(linear(op, (num, *lead), *(_dense(p, t, num) for p, t in parts)), batch), level)


def with_graph_of(old: Any, new: Any) -> Any:
    """The numbers of ``new`` with the reverse graph of ``old``: what torch leaves of a write under no_grad."""
    level = top_level((old, new))
    if level == 0:
        if not old.requires_grad:
            return new
        with torch.enable_grad():
            kept = old.clone()
        with torch.no_grad():
            return kept.copy_(new)
    (p_old, t_old), (p_new, t_new) = split(old, level), split(new, level)
    primal = with_graph_of(p_old, p_new)
    num = count(level, (old, new))
    if t_old is not None and t_old.requires_grad:
        t_new = of_kind(with_graph_of(t_old.dense(), _dense(p_new, t_new, num)), samples_of(t_old, t_new))
    return make(primal, Zero(num) if t_new is None else t_new, level)


def samples_of(*tangents: Tangent | None) -> int:
    """The batch of tangents whose samples are kept apart, 0 for ordinary ones; raises where they differ."""
    kinds = {t.batch if isinstance(t, PerSample) else 0 for t in tangents if t is not None and not t.is_zero}
    if len(kinds) > 1:
        raise StructureError(
            "a value reduced over the batch and one that still depends on every sample are written into one tensor: "
            "samples mix before the loss. Use per_sample=False."
        )
    return kinds.pop()


def of_kind(data: Tensor, batch: int) -> Dense:
    """Directions kept apart for ``batch`` samples, or (0) ordinary ones."""
    return PerSample(data, batch) if batch else Dense(data)


def _dense(primal: Any, tan: Tangent | None, num: int) -> Tensor:
    if tan is not None:
        return tan.dense()
    return torch.zeros((num, *primal.shape), dtype=primal.dtype, device=primal.device)
