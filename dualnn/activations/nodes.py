"""Quadrature nodes, and sums over them in pieces that fit the cache: shared by `beta_cdf` and `bessel`."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

#: Numbers held at once: nodes times entries.
PIECE = 2**18


@cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@cache
def half_line(step: float = 1 / 20, low: float = -3.6, high: float = 6.5) -> tuple[Tensor, Tensor]:
    """Nodes and weights on (0, inf) for integrands that decay as an exponential of scale 1 (double exponential rule).

    s = exp(v - exp(-v)), v evenly spaced.
    """
    v = torch.arange(low, high, step, dtype=torch.float64)
    s = torch.exp(v - torch.exp(-v))
    return s, step * s * (1 + torch.exp(-v))


def quadrature(integrand: Callable[[Tensor], Tensor], rule: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """Sum of weight * integrand(node), the nodes on a new leading axis.

    Args:
        integrand: ``(k, 1, ..., 1) -> (k, *like.shape)``.
        rule: Nodes and weights.
        like: A tensor of the result's shape, dtype and device.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> quadrature(lambda t: x * t, gauss_legendre(4), x)
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    nodes, weights = (t.to(like).reshape(-1, *(1,) * like.dim()) for t in rule)
    total = torch.zeros_like(like)
    piece = max(1, PIECE // max(1, like.numel()))
    for t, w in zip(nodes.split(piece), weights.split(piece), strict=True):
        total += (integrand(t) * w).sum(0)
    return total
