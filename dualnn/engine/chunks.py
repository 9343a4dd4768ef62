r"""Directions a few at a time: as many as are asked for, or as many as a budget of bytes allows.

A pass with k directions holds at its peak :math:`a + b k` bytes: what the values need, and every direction's own. Both
are measured, on the first passes, which have 2 and 4 directions and whose results are kept; the others have
:math:`\lfloor (\mathrm{memory} - a) / b \rfloor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dualnn.engine.errors import DualInputError, DualShapeError
from dualnn.engine.live_bytes import LiveBytes

T = TypeVar("T")


def in_chunks(push: Callable[[int, int], T], size: int, chunk: int | None, memory: int | None) -> list[T]:
    """Push ``size`` directions, some at a time.

    Args:
        push: ``push(start, stop)`` pushes directions ``start … stop - 1``.
        size: How many there are (none are pushed once).
        chunk: At most this many at a time.
        memory: As many at a time as keep the tensors that a pass makes within this many bytes.

    Returns:
        What ``push`` returned, in order.

    Raises:
        DualShapeError: ``chunk`` is smaller than one.
        DualInputError: Both are given, or ``memory`` does not suffice for a single direction.
    """
    if chunk is not None and memory is not None:
        raise DualInputError(f"chunk={chunk} and memory={memory} both say how many directions are pushed: give one")
    if memory is None:
        step = max(size, 1) if chunk is None else chunk
        if step < 1:
            raise DualShapeError(f"chunk must be at least 1, got {chunk}")
        return [push(start, min(start + step, size)) for start in range(0, max(size, 1), step)]
    out = [push(0, min(1, size))]  # also makes what is made once and stays
    start, peaks = 1, []
    for count in (2, 4):
        stop = min(start + count, size)
        if stop <= start:
            return out
        with LiveBytes() as live:
            out.append(push(start, stop))
        peaks.append(live.peak)
        start = stop
    if start >= size:
        return out
    each = max((peaks[1] - peaks[0]) / 2, 1.0)
    step = int((memory - max(peaks[0] - 2 * each, 0.0)) / each)
    if step < 1:
        raise DualInputError(
            f"memory={memory} bytes do not suffice for one direction: at its peak a pass held {peaks[0]} bytes with 2 "
            f"directions and {peaks[1]} with {count}"
        )
    return out + [push(i, min(i + step, size)) for i in range(start, size, step)]
