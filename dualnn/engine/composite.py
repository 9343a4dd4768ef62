"""Composite functions: re-run the Python body of a torch function so that its inner calls meet dual rules.

Most of ``torch.nn.functional`` is Python that checks for ``__torch_function__`` and then calls a few basic ops. We
run that same body with its guard answered "no"; the basic ops then arrive one by one. Nothing is copied: the body
is torch's own code object, whatever the version.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
HOMES = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch._lowrank")


def _no(*_: Any) -> bool:
    return False


@functools.cache
def unguarded(func: Callable) -> Callable | None:
    """Torch's own body of ``func`` with its ``has_torch_function`` guards answered "no" (None if it has none)."""
    if not isinstance(func, types.FunctionType):
        return None
    inner = getattr(func, "__wrapped__", None)  # Tensor methods decorated by _handle_torch_function_and_wrap...
    if func.__module__ not in HOMES:
        return None
    if isinstance(inner, types.FunctionType):
        return unguarded(inner) or inner
    if not any(name in func.__code__.co_names for name in GUARDS):
        return None
    scope = {**func.__globals__, **dict.fromkeys(GUARDS, _no)}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def composite_rule(func: Callable) -> Callable | None:
    """A rule that re-runs the body of ``func`` (None where there is no such body)."""
    body = unguarded(func)
    if body is None:
        return None

    def rule(_: Callable, args: tuple, kwargs: dict) -> Any:
        return body(*args, **kwargs)

    rule.on_parts = True  # type: ignore[attr-defined]  # its inner calls arrive one by one
    return rule


def is_composite(func: Callable) -> bool:
    """Whether torch offers a Python body for ``func`` that can be re-run (the tests assert it per version)."""
    return unguarded(func) is not None


def run_body(func: Callable) -> Callable:
    """The body of a composite, for rules that need it explicitly."""
    body = unguarded(func)
    if body is None:
        raise RuntimeError(f"torch {torch.__version__} has no re-runnable Python body for {func}")
    return body
