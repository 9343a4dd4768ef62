"""Autocast, as it was when a function was first called: a backward pass that calls it again runs outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def as_now(fn: Callable, device_type: str) -> Callable:
    """``fn``, which runs in today's autocast state whenever it is called.

    Args:
        fn: Any function.
        device_type: Where its tensors are: ``"cpu"``, ``"cuda"``, …

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product = as_now(torch.mm, "cpu")
        >>> product(torch.ones(1, 1), torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    state = _state(device_type)

    def same(*args: Any) -> Any:
        if _state(device_type) == state:
            return fn(*args)
        enabled, dtype = state
        with torch.autocast(device_type, dtype, enabled=enabled):
            return fn(*args)

    return same


def _state(device_type: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
