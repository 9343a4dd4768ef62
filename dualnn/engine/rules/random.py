"""Dropout: one mask, drawn once, for the value and all its tangents.

The mask comes from torch's own op on ones of the value's layout, which draws the same numbers as the op on the
value would: a run under duals drops what the backprop run drops.
"""

from collections.abc import Callable
from typing import Any

import torch

from dualnn.engine.dual_tensor import make, primal_of
from dualnn.engine.generic import first, register_inplace
from dualnn.engine.registry import register, spellings


def _noise(name: str) -> None:
    def rule(func: Callable, call: tuple, kwargs: dict) -> Any:
        x, call, kwargs = first(func, call, kwargs)
        mask = func(torch.ones_like(primal_of(x)), *call, **kwargs)
        return make(x._primal * mask, x._tan.scale(mask, x.shape), x._level)

    found: list[Callable] = spellings(name)
    register(*found, rule=rule)
    register_inplace(name, rule, found)


_noise("dropout")
_noise("feature_dropout")
