"""Systems of equations with known answers: every root finder meets every one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

F64 = torch.float64


class System(NamedTuple):
    """``fn(x, *args) = 0`` from ``start``; ``solution(*args)`` in closed form where there is one."""

    fn: Callable[..., Tensor]
    start: Tensor
    args: tuple[Tensor, ...]
    solution: Callable[..., Tensor] | None = None


def _t(*rows: float) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def _kepler(E: Tensor, e: Tensor, M: Tensor) -> Tensor:
    return E - e * torch.sin(E) - M


def _rosenbrock(x: Tensor, a: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return torch.stack([10 * (v - u * u), a[..., 0] - u], -1)


def _powell(x: Tensor, p: Tensor) -> Tensor:
    """Powell's badly scaled function."""
    u, v = x.unbind(-1)
    return torch.stack([p[..., 0] * u * v - 1, torch.exp(-u) + torch.exp(-v) - p[..., 1]], -1)


def _chandrasekhar(x: Tensor, c: Tensor) -> Tensor:
    """Chandrasekhar's H-equation, discretised by the midpoint rule."""
    n = x.shape[-1]
    mu = (torch.arange(n, dtype=x.dtype) + 0.5) / n
    kernel = mu[:, None] / (mu[:, None] + mu)
    return x - 1 / (1 - c / (2 * n) * (x @ kernel.T))


_A = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64) + 3 * torch.eye(3, dtype=F64)

SYSTEMS = {
    "linear": System(lambda x, b: x @ _A.to(x).T - b, torch.zeros(2, 3, dtype=F64), (_t(1, 2, 3),), None),
    "square root": System(
        lambda x, a: x * x - a, torch.ones(4, 1, dtype=F64), (_t(0.5, 1, 2, 9)[:, None],), torch.sqrt
    ),
    "kepler": System(_kepler, torch.ones(1, dtype=F64), (_t(0.9), _t(0.1))),
    "kepler, many": System(_kepler, torch.full((5, 1), 3.0, dtype=F64), (_t(0.9), _t(0.1, 0.5, 1, 2, 3)[:, None])),
    "rosenbrock": System(_rosenbrock, _t(-1.2, 1), (_t(1.0),), lambda a: torch.cat([a, a * a])),
    "powell": System(_powell, _t(0, 1), (_t(1e4, 1.0001),)),
    "chandrasekhar": System(_chandrasekhar, torch.ones(10, dtype=F64), (_t(0.9),)),
}
