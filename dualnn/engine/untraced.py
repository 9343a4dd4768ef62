"""Functions that ``torch.compile`` calls instead of tracing: one clean graph break."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(fn: F) -> F:
    """Keep dynamo out of ``fn``; unlike ``torch.compiler.disable`` this costs nothing where nobody compiles."""
    disabled = torch.compiler.disable(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else fn(*args, **kwargs)

    return call  # type: ignore[return-value]
