"""What `entrywise` and its rules speak of: tensors taken apart, and the program that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dualnn.engine.written import Op

LARGEST = 4096  # entries of a tensor that is taken apart

Entry = Op | float | int | bool


class Entries(NamedTuple):
    """A tensor taken apart.

    Attributes:
        data: Its entries, an array of objects; of length 1 along the batch.
        batch: Axis of the samples, or None.
        dtype: Of the tensor.
    """

    data: Any
    batch: int | None
    dtype: torch.dtype


class WholeError(Exception):
    """Something can only be done with whole tensors."""


class Builder(Protocol):
    """The program, for the rules."""

    size: int  # of the batch

    def emit(self, target: str, dtype: torch.dtype, *args: Any) -> Op:
        """An operation, or the same one if it is there already."""

    def pair(self, target: Any, dtype: torch.dtype, a: Entry, b: Entry) -> Entry:
        """An operation of two entries of one dtype."""

    def aligned(self, values: Sequence[Entries], dim: int) -> tuple[list[Any], int | None]:
        """Arrays of ``dim`` axes that broadcast, and the batch's axis."""


def shape_of(out: Tensor, batch: int | None) -> list[int]:
    """Of the entries of a result."""
    return [1 if d == batch else n for d, n in enumerate(out.shape)]
