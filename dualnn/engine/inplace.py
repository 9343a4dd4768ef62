"""In-place operations on duals: compute out of place, then exchange both parts.

A dual's parts are never overwritten (an earlier op may hold them, and a caller's tensor may be the value), so a
write replaces them. Members of one memory family (a base and its views) would then disagree; until views are
regenerated a write to a member of a family raises while another member is alive. Plain destinations cannot hold
a tangent, so they raise too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.registry import Rule, op_name
from dualnn.engine.tangents import Zero


def link_view(base: DualTensor, view: DualTensor) -> None:
    """Note that ``view`` shows ``base``'s memory (decided by storage: a reshape may have copied)."""
    if not shares_memory(base._primal, view._primal):
        return
    if base._family is None:
        base._family = [weakref.ref(base)]
    view._family = base._family
    base._family.append(weakref.ref(view))


def shares_memory(a: Any, b: Any) -> bool:
    """Whether two values look at one storage."""
    if isinstance(a, DualTensor) or isinstance(b, DualTensor):
        return a is b or (
            isinstance(a, DualTensor) and isinstance(b, DualTensor) and a._family is not None and a._family is b._family
        )
    if is_functorch_wrapped_tensor(a) or is_functorch_wrapped_tensor(b):
        return True  # their storage cannot be asked for: a view op is taken at its word
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


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
    others = [m for m in map(_alive, target._family or ()) if m is not None and m is not target]
    if others:
        raise UnsupportedOpError(
            f"{name} writes in place to a dual that shares memory with a view (or is one). Write out of place "
            "(x[i] = x[i] + v in place of x[i] += v), or call .clone() on the view before writing."
        )
    if value.shape != target.shape:
        raise UnsupportedOpError(
            f"{name}: the result of shape {tuple(value.shape)} does not fit the destination {tuple(target.shape)}"
        )
    if value.dtype != target.dtype:
        value = value.to(target.dtype)
    if isinstance(value, DualTensor) and value._level == target._level:
        target._primal, target._tan = value._primal, value._tan
    else:
        target._primal, target._tan = value, Zero(target._tan.num)
    target._family = None
    return target


def _alive(ref: weakref.ref) -> Any:
    return ref()


def inplace_of(rule: Rule, plain: Callable) -> Rule:
    """The in-place form of an op's rule; ``plain`` is the out-of-place callable."""

    def inplace(func: Callable, args: tuple, kwargs: dict) -> Any:
        target = args[0]
        if not isinstance(target, DualTensor):
            write(target, None, func)
        return write(target, rule(plain, args, kwargs), func)

    return inplace
