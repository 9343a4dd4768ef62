"""Layouts: which numbers of a flat memory a tensor shows, read off a plain tensor's strides."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.errors import UnsupportedOpError


class Layout(NamedTuple):
    """Which numbers of a memory a tensor shows: counted in real numbers, a complex one is two."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_complex: bool
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, x: Tensor, origin: int = 0) -> Layout:
        """The layout of a plain tensor, in a memory that begins at ``origin`` of its storage."""
        size, stride, offset = tuple(x.shape), x.stride(), int(x.storage_offset())
        if not x.is_complex():
            return cls(size, stride, offset - origin, False, False, x.is_neg())
        pairs = (*(2 * s for s in stride), 1)
        return cls((*size, 2), pairs, 2 * offset - origin, True, x.is_conj(), x.is_neg())

    def extent(self) -> int:
        """How far from its offset the layout reaches."""
        return 1 + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def covers(self, length: int) -> bool:
        """Whether this is all of a memory, in its order."""
        expected = length
        for n, s in zip(self.size, self.stride, strict=True):
            expected //= n
            if n > 1 and s != expected:
                return False
        return self.offset == 0 and math.prod(self.size) == length

    def overlaps_itself(self) -> bool:
        """Whether one number appears at several places (``expand``, some ``unfold``)."""
        reach = 0
        for s, n in sorted((s, n) for n, s in zip(self.size, self.stride, strict=True) if n > 1):
            if s <= reach:  # then it may: count
                shown = torch.arange(self.extent()).as_strided(self.size, self.stride)
                return shown.unique().numel() < shown.numel()
            reach += (n - 1) * s
        return False

    def shown(self, lead: tuple[int, ...], flat: Tensor) -> Tensor:
        """What the layout shows of memories ``(*lead, length)``."""
        plain(flat)
        flat = flat.contiguous()
        x = flat.as_strided(*self._within(lead, flat))
        if self.is_complex:
            x = torch.view_as_complex(x)
        if self.is_conj:
            x = x.conj()
        return torch._neg_view(x) if self.is_neg else x

    def written(self, lead: tuple[int, ...], value: Tensor, flat: Tensor | None, length: int) -> Tensor:
        """New memories ``(*lead, length)`` with ``value`` in this layout's places, ``flat`` (or zeros) elsewhere."""
        plain(value)
        if self.is_conj:
            value = value.conj()
        if self.is_neg:
            value = -value
        if self.is_complex:
            value = torch.view_as_real(value.resolve_conj())
        if self.covers(length):
            return value.reshape(*lead, length)
        if flat is None:
            new = torch.zeros((*lead, length), dtype=value.dtype, device=value.device)
        else:
            new = plain(flat).clone(memory_format=torch.contiguous_format)
        # Not torch.as_strided_scatter: the gradient that it gives its first argument is wrong (torch 2.14).
        new.as_strided(*self._within(lead, new)).copy_(value)
        return new

    def _within(self, lead: tuple[int, ...], flat: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        steps = [flat.shape[-1]]
        for n in lead[:0:-1]:
            steps.insert(0, steps[0] * n)
        outer = tuple(steps) if lead else ()
        return (*lead, *self.size), (*outer, *self.stride), int(flat.storage_offset()) + self.offset


def plain(x: Tensor) -> Tensor:
    """The tensor itself; raises inside torch.func, whose tensors do not tell their strides."""
    if is_functorch_wrapped_tensor(x):
        raise UnsupportedOpError(
            "a write to a dual that shares memory with a view (or is one) inside torch.func: write out of place "
            "(x[i] = x[i] + v in place of x[i] += v), or call .clone() on the view before writing."
        )
    return x
