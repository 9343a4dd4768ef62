"""Dropout: one mask, drawn once, for the value and all its tangents; and noise drawn in place.

The mask comes from torch's own op on ones of the value's layout, which draws the same numbers as the op on the
value would: a run under duals drops what the backprop run drops.
"""

from collections.abc import Callable
from typing import Any

import torch

from dualnn.engine.dual_tensor import DualTensor, make, primal_of, top_level
from dualnn.engine.generic import first, register_inplace
from dualnn.engine.inplace import write
from dualnn.engine.registry import register, spellings, unsupported


def _noise(name: str) -> None:
    def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
        x, call, kwargs = first(func, call, kwargs)
        ones = torch.ones_like(primal_of(x))
        mask = func(ones, *call, **kwargs)
        if mask is ones:  # nothing is dropped: torch returns x itself
            return x
        return make(x._primal * mask, x._tan.scale(mask, x.shape), x._level)

    found: list[Callable] = spellings(name)
    register(*found, rule=rule)
    register_inplace(name, rule, found)


_noise("dropout")
_noise("feature_dropout")


def _fill(func: Callable, args: tuple, kwargs: dict) -> Any:
    """``normal_`` and its kin: the destination forgets what it held; parameters of the distribution are plain."""
    target, *rest = args
    if not isinstance(target, DualTensor) or top_level((*rest, *kwargs.values())) > 0:
        raise unsupported(func, "has no dual rule for dual parameters of a distribution: scale and shift plain noise")
    return write(target, func(torch.empty_like(primal_of(target)), *rest, **kwargs), func)


for _name in ("normal_", "uniform_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_", "bernoulli_"):
    register(*spellings(_name), rule=_fill)
