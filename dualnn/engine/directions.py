r"""Directions of perturbation, drawn from a key and drawn again when needed: regenerated, never stored.

A sampler is data: how one block of directions is drawn, and how directional derivatives are combined. With
directions :math:`u_k` of independent entries of mean 0 and variance 1, :math:`E[(g \cdot u) u] = g`, and the mean of K
of them has relative squared error :math:`(n + 1) / K` (Gaussian; :math:`(n - 1) / K` for Rademacher), n being the
number of perturbed entries. The ``basis`` sampler runs through the unit vectors and sums: exact when K = n.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.errors import unknown_name
from dualnn.engine.scaling import idle

MASK = (1 << 63) - 1


def mixed(key: int, index: int) -> int:
    """A 63-bit seed from a key and an index (splitmix64: neighbouring inputs give unrelated seeds)."""
    z = (key * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & ((1 << 64) - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
    return (z ^ (z >> 31)) & MASK


def _gaussian(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


@functools.lru_cache(maxsize=16)
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
        return (bits & 1).to(dtype) * 2 - 1


def _rademacher(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    # Eight signs from each random byte by a table: nine times faster than drawing each sign by itself.
    size, device = _size(shape), generator.device
    table = (_signs if idle() else _signs.__wrapped__)(dtype, device)
    drawn = torch.empty((size + 7) // 8, dtype=torch.int32, device=device).random_(0, 256, generator=generator)
    return table.index_select(0, drawn).reshape(-1)[:size].reshape(shape)


RANDOM: dict[str, Callable[..., Tensor]] = {"gaussian": _gaussian, "rademacher": _rademacher}
SAMPLERS = (*RANDOM, "basis")


def check_sampler(name: str) -> str:
    """Return ``name`` if it is a sampler, and raise with the nearest choice otherwise."""
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return name


@dataclasses.dataclass(frozen=True)
class Directions:
    """K directions for any number of blocks (tensors), each a pure function of the key and the block's index.

    Attributes:
        sampler: ``"rademacher"``, ``"gaussian"`` or ``"basis"``.
        num: K.
        key: The seed of everything.
        start: The first unit vector (``"basis"``).
    """

    sampler: str
    num: int
    key: int
    start: int = 0

    @property
    def weight(self) -> float:
        """Factor of each directional derivative in the estimate: a mean of random directions, a sum of unit ones."""
        return 1.0 if self.sampler == "basis" else 1.0 / self.num

    def draw(self, index: int, offset: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Directions ``(K, *shape)`` of block ``index``, whose entries start at ``offset`` among all entries."""
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        if self.sampler == "basis":
            size = _size(shape)
            rows = torch.zeros((self.num, size), dtype=like.dtype, device=like.device)
            first, last = max(offset, self.start), min(offset + size, self.start + self.num)
            if first < last:
                k = torch.arange(first - self.start, last - self.start, device=like.device)
                rows[k, torch.arange(first - offset, last - offset, device=like.device)] = 1
            return rows.reshape(self.num, *shape)
        return RANDOM[self.sampler]((self.num, *shape), self._generator(index, like), dtype).to(like.dtype)

    def factors(
        self, index: int, offset: int, shape: tuple[int, ...], rank: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Low-rank directions :math:`\sum_r a_{kr} b_{kr}^T / \sqrt R` of a weight.

        Shape:
            ``a: (K, R, out)``, ``b: (K, R, fan_in)``.
        """
        out, fan_in = shape[0], _size(shape[1:])
        if self.sampler == "basis":
            a = torch.zeros((self.num, rank, out), dtype=like.dtype, device=like.device)
            b = torch.zeros((self.num, rank, fan_in), dtype=like.dtype, device=like.device)
            first, last = max(offset, self.start), min(offset + out * fan_in, self.start + self.num)
            entries = torch.arange(first - offset, max(last - offset, first - offset), device=like.device)
            k = torch.arange(first - self.start, first - self.start + len(entries), device=like.device)
            a[k, 0, entries // fan_in] = 1
            b[k, 0, entries % fan_in] = 1
            return a, b
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        generator = self._generator(index, like)
        a = RANDOM[self.sampler]((self.num, rank, out), generator, dtype)
        b = RANDOM[self.sampler]((self.num, rank, fan_in), generator, dtype)
        if rank > 1:
            a = a / rank**0.5
        return a.to(like.dtype), b.to(like.dtype)

    def _generator(self, index: int, like: Tensor) -> torch.Generator:
        return torch.Generator(device=like.device).manual_seed(mixed(self.key, index))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for s in shape:
        size *= s
    return size
