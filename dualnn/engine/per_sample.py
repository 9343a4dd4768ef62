"""Derivatives per sample through a scalar loss: keep the batch axis of the tangent when the value loses it.

While a signal needs d(loss of sample b), reductions over the leading axis sum each sample's share of the tangent
apart: ``(K, B, …)`` becomes `PerSample` directions ``(K * B, …)`` instead of ``(K, …)``. A leading axis of B * m
(tokens flattened into the batch) counts as B groups of m.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import PerSample, Tangent


class _State(threading.local):
    level = 0
    batch = 0


_state = _State()


@contextmanager
def keep_samples(level: int, batch: int) -> Iterator[None]:
    """Keep the samples of ``batch`` apart in reductions of duals at ``level``."""
    before = _state.level, _state.batch
    _state.level, _state.batch = level, batch
    try:
        yield
    finally:
        _state.level, _state.batch = before


def reduce_batch(tan: Tangent, level: int, dims: tuple[int, ...], keepdim: bool, ndim: int) -> Tangent | None:
    """Sum a tangent over ``dims`` (non-negative, 0 among them) with samples kept apart.

    Returns:
        The `PerSample` tangent, or None where this reduction is an ordinary one.
    """
    if _state.level != level or 0 not in dims or ndim == 0 or isinstance(tan, PerSample):
        return None
    data: Tensor = tan.dense()
    rows, batch = data.shape[1], _state.batch
    if rows % batch:
        raise StructureError(
            f"a reduction over {rows} rows cannot be shared out to a batch of {batch} samples: rows were selected or "
            "samples were mixed before the loss. Use per_sample=False (unbiased; its variance is B times larger)."
        )
    apart = data.reshape(data.shape[0] * batch, rows // batch, *data.shape[2:])
    return PerSample(apart.sum([d + 1 for d in dims], keepdim=keepdim), batch)
