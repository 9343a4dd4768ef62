"""Levels: which infinitesimal a tangent belongs to, so that nested derivatives are never confused.

Every `jvp` opens a fresh level from one increasing counter; the operands of lower levels are constants to it.
Duals that a user builds by hand in one context share that context's level, so that they can be combined. The
context is per thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dualnn.engine.custom_functions import accept_duals, refuse_duals

_counter = itertools.count(1)


class _Context(threading.local):
    def __init__(self) -> None:
        self.stack = [next(_counter)]


_context = _Context()


@contextmanager
def fresh_level() -> Iterator[int]:
    """Open a level above all that exist; duals built by hand inside get one above it."""
    level = next(_counter)
    _context.stack.append(next(_counter))
    refuse_duals()
    try:
        yield level
    finally:
        accept_duals()
        _context.stack.pop()


def user_level() -> int:
    """The level of duals built by hand in the present context."""
    return _context.stack[-1]
