r"""Projections on the permutahedron, the hull of all orders of a row: shared by `soft_sort` and `rank`.

The projection of z (sorted, falling) on the permutahedron of w (falling) is z minus the falling sequence nearest to
z - w, which is constant on blocks (isotonic regression, pool adjacent violators). So the result is, block by block, the
shape of z at the mean of w, and its derivative is a mean over blocks: exact, and never worse conditioned than a mean.

Reference:
    Blondel, Teboul, Berthet, Djolonga, "Fast differentiable sorting and ranking", 2020, arXiv 2002.08871.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualnn.engine.bridge_linear import linear
from dualnn.engine.errors import DualInputError


def check_strength(name: str, strength: float) -> None:
    """Raise unless the strength of the regularisation is positive and finite."""
    if not 0 < strength < math.inf:
        raise DualInputError(f"{name}: strength must be positive, got {strength}")


def pooled(s: np.ndarray) -> np.ndarray:
    """For every entry the index of its block in the falling sequence nearest to s, by pool adjacent violators.

    Shape:
        s: (n,) -> (n,), integers from 0.
    """
    means: list[float] = []
    sizes: list[int] = []
    for value in s.tolist():
        mean, size = value, 1
        while means and means[-1] <= mean:  # False for NaN
            last, count = means.pop(), sizes.pop()
            mean, size = (last * count + mean * size) / (count + size), count + size
        means.append(mean)
        sizes.append(size)
    return np.repeat(np.arange(len(sizes)), sizes)


def block_mean(t: Tensor, blocks: Tensor) -> Tensor:
    """Every entry replaced by the mean over its block, along the last dimension.

    Shape:
        t: (*, n), blocks: (*, n), integers; broadcastable -> (*, n).
    """
    blocks = blocks.expand(t.shape)
    counts = torch.zeros_like(t).scatter_add(-1, blocks, torch.ones_like(t))
    sums = torch.zeros_like(t).scatter_add(-1, blocks, t)
    return (sums / counts.clamp(min=1)).gather(-1, blocks)


class _Pool:
    """A rule for the bridge: (w, s) -> (means of w over the blocks of s, the blocks), differentiated in w."""

    name, batched = "permutahedron", True

    def value(self, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        flat = s.detach().reshape(-1, s.shape[-1]).cpu().numpy()
        found = np.stack([pooled(row) for row in flat]) if len(flat) else np.zeros(flat.shape, dtype=np.int64)
        blocks = torch.from_numpy(found).to(device=s.device, dtype=torch.int64).reshape(s.shape)
        return block_mean(w, blocks), blocks

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> Sequence[Any]:
        return (None if tangents[0] is None else block_mean(tangents[0], out[1])), None

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> Sequence[Tensor]:
        # A mean over blocks is symmetric.
        return [block_mean(grads[0], out[1]) if i == 0 else torch.zeros_like(primals[1]) for i in wanted]


@torch.compiler.disable
def pool(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The means of w over the blocks of the falling sequence nearest to s, differentiable in w; and the blocks.

    Shape:
        w, s: (*, n) -> (*, n), (*, n).

    Example:
        >>> pool(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 1.0, -7.0]))
        (tensor([2., 2., 5.]), tensor([0, 0, 1]))
    """
    mean, blocks = linear(_Pool(), w, s)
    return mean, blocks


def falling(n: int, like: Tensor) -> Tensor:
    """(n, n - 1, ..., 1) in the dtype and on the device of a tensor."""
    return torch.arange(n, 0, -1, dtype=like.dtype, device=like.device)


def projection_reference(z: list, w: list) -> list:
    """The projection of z on the permutahedron of w, on mpmath numbers, by the min-max formula."""
    order = sorted(range(len(z)), key=lambda i: -z[i])
    ordered, target = [z[i] for i in order], sorted(w, reverse=True)
    s = [a - b for a, b in zip(ordered, target, strict=True)]
    n = len(s)
    v = [
        min(max(sum(s[j : k + 1]) / (k - j + 1) for k in range(i, n)) for j in range(i + 1)) for i in range(n)
    ]  # falling isotonic regression
    found = [a - b for a, b in zip(ordered, v, strict=True)]
    return [found[order.index(i)] for i in range(n)]
