"""In-place operations on duals: compute out of place, then exchange both parts.

A dual's parts are never overwritten (an earlier op may hold them, and a caller's tensor may be the value), so a
write replaces them; where views are looking at the same memory, `views.Memory` sees to it that they see the write.
Plain destinations cannot hold a tangent, so they raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dualnn.engine.by_parts import with_graph_of
from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.registry import Rule, op_name
from dualnn.engine.tangents import Zero
from dualnn.engine.views import Memory, keeps_strides

# They change which entries the tensor shows, not the entries: its views, and what it is a view of, stay as they are.
RESHAPING = ("t_", "transpose_", "squeeze_", "unsqueeze_")


def write(target: Any, value: Any, func: Callable) -> Any:
    """Make ``target`` hold ``value`` (a dual or plain tensor of the same shape)."""
    name = op_name(func)
    if not isinstance(target, DualTensor):
        raise UnsupportedOpError(
            f"{name} writes a dual into a plain tensor, which cannot hold a tangent. Make the destination dual "
            "(for example torch.zeros_like(x) or x.new_zeros(...) of a dual x), or write out of place."
        )
    if isinstance(value, DualTensor) and value._level > target._level:
        raise UnsupportedOpError(
            f"{name} writes a dual of level {value._level} into one of level {target._level}: the destination belongs "
            "to an outer derivative. Make the destination inside the function that is differentiated."
        )
    if value is target:
        return target
    if name.rpartition(".")[2] in RESHAPING:
        return _show_as(target, value)
    if value.shape != target.shape:
        raise UnsupportedOpError(
            f"{name}: the result of shape {tuple(value.shape)} does not fit the destination {tuple(target.shape)}"
        )
    if value.dtype != target.dtype:
        value = value.to(target.dtype)
    memory = target._memory
    if memory is None or not memory.others(target):
        # Torch keeps the destination's strides, which decide later whether a reshape is a view.
        memory = None if keeps_strides(target, value) else Memory(target)
    if memory is not None:
        target._memory = memory
        memory.write(target, value, name)
        return target
    if not torch.is_grad_enabled():
        value = with_graph_of(target, value)
    if isinstance(value, DualTensor) and value._level == target._level:
        target._primal, target._tan = value._primal, value._tan
    else:
        target._primal, target._tan = value, Zero(target._tan.num)
    target._memory = None
    return target


def _show_as(target: DualTensor, view: DualTensor) -> DualTensor:
    target._primal, target._tan, target._memory = view._primal, view._tan, view._memory
    return target


def inplace_of(rule: Rule, plain: Callable) -> Rule:
    """The in-place form of an op's rule; ``plain`` is the out-of-place callable."""

    def inplace(func: Callable, args: tuple, kwargs: dict) -> Any:
        target = args[0]
        if not isinstance(target, DualTensor):
            write(target, None, func)
        return write(target, rule(plain, args, kwargs), func)

    return inplace
