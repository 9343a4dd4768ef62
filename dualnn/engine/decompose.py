"""Rules from a decomposition: the value from torch's own op, the directions from plain code that computes the same.

The plain code runs on duals, so its inner ops meet their rules and further levels follow. Its own value is used for
nothing, except where an op draws random numbers: there value and directions must come from one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, count, make, split, top_level
from dualnn.engine.registry import OpSpec, SampleMaker, register, unsupported
from dualnn.engine.tangents import Zero


def decomposition(
    name: str,
    *functions: Callable,
    samples: SampleMaker | None = None,
    own_value: bool = True,
    smooth: bool = True,
    reverse: bool = True,
) -> Callable[[Callable], Callable]:
    """Register plain code for ops that lack a rule.

    Args:
        name: For the tests' ids.
        functions: The torch callables that it serves.
        samples: Sample calls.
        own_value: Take the value from the op itself (False: from the decomposition).
        smooth: False where the op has kinks.
        reverse: False where torch has no second reverse derivative to compare with.
    """

    def decorate(reference: Callable) -> Callable:
        def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
            if kwargs.get("out") is not None:
                raise unsupported(func, "has no dual rule with out=")
            out = reference(*args, **kwargs)
            return with_values(func, args, kwargs, out) if own_value else out

        spec = None if samples is None else OpSpec(name, functions[0], samples, smooth=smooth, reverse=reverse)
        register(*functions, rule=rule, spec=spec)
        return reference

    return decorate


def with_values(func: Callable, args: tuple, kwargs: dict, out: Any) -> Any:
    """The tangents of ``out`` around the values of ``func``'s own result."""
    inputs, spec = pytree.tree_flatten((args, kwargs))
    level = top_level(inputs)
    num = count(level, inputs)
    plain_args, plain_kwargs = pytree.tree_unflatten([split(x, level)[0] for x in inputs], spec)
    values, value_spec = pytree.tree_flatten(func(*plain_args, **plain_kwargs))
    leaves = pytree.tree_leaves(out)
    made = []
    for value, leaf in zip(values, leaves, strict=True):
        if isinstance(value, Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex):
            tan = split(leaf, level)[1]
            value = make(value, Zero(num) if tan is None else tan, level)
        made.append(value)
    return pytree.tree_unflatten(made, value_spec)


def rebased(x: Any, value: Tensor) -> Any:
    """The same tangents, at every level, around another plain value (torch's own, bit for bit)."""
    return make(rebased(x._primal, value), x._tan, x._level) if isinstance(x, DualTensor) else value
