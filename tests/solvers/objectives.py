"""Minimisation problems with known answers: every method meets every one that it can."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.solvers.systems import F64


class Task(NamedTuple):
    """Minimise from ``start``; ``residual`` where it is a least-squares problem (``fn`` is then half its square).

    ``solution(*args)`` is the minimum in closed form, where there is one; derivatives are taken in the last argument.
    """

    start: Tensor
    args: tuple[Tensor, ...]
    objective: Callable[..., Tensor] | None = None
    residual: Callable[..., Tensor] | None = None
    solution: Callable[..., Tensor] | None = None

    def fn(self, x: Tensor, *args: Tensor) -> Tensor:
        if self.objective is not None:
            return self.objective(x, *args)
        return (self.residual(x, *args) ** 2).sum(-1) / 2


def _t(*rows: float) -> Tensor:
    return torch.tensor(rows, dtype=F64)


_random = torch.Generator().manual_seed(3)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=_random)


_ROOT = _randn(3, 3)
MATRIX = _ROOT @ _ROOT.T + torch.eye(3, dtype=F64)
DATA, TARGET = _randn(20, 4), _randn(20)
HELD_OUT, HELD_TARGET = _randn(15, 4), _randn(15)
LABEL = torch.sign(_randn(20))
TIMES = torch.linspace(0, 2, 8, dtype=F64)
READINGS = 2 * torch.exp(-0.7 * TIMES) + 0.1 * _randn(8)


def quadratic(x: Tensor, b: Tensor) -> Tensor:
    return (x * (x @ MATRIX.to(x))).sum(-1) / 2 - (b * x).sum(-1)


def rosenbrock(x: Tensor, a: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return torch.stack([10 * (v - u * u), a[..., 0] - u], -1)


def beale(x: Tensor, c: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    return torch.stack([c[0] - u + u * v, c[1] - u + u * v**2, c[2] - u + u * v**3], -1)


def ridge(w: Tensor, strength: Tensor) -> Tensor:
    return torch.cat([DATA @ w - TARGET, torch.exp(strength / 2) * w], -1)


def ridge_solution(strength: Tensor) -> Tensor:
    eye = torch.eye(4, dtype=F64)
    return torch.linalg.solve(DATA.T @ DATA + torch.exp(strength) * eye, DATA.T @ TARGET)


def logistic(w: Tensor, strength: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-LABEL * (DATA @ w)).mean() + torch.exp(strength[0]) * (w * w).sum() / 2


def decay(x: Tensor, y: Tensor) -> Tensor:
    """Fit of an exponential to readings that it cannot meet."""
    return x[..., :1] * torch.exp(-x[..., 1:] * TIMES) - y


TASKS = {
    "quadratic": Task(
        torch.zeros(2, 3, dtype=F64),
        (_randn(2, 3),),
        objective=quadratic,
        solution=lambda b: torch.linalg.solve(MATRIX, b.mT).mT,
    ),
    "rosenbrock": Task(_t(-1.2, 1), (_t(1),), residual=rosenbrock, solution=lambda a: torch.cat([a, a * a])),
    "rosenbrock, many": Task(
        _t(-1.2, 1).repeat(5, 1),
        (_t(1, 0.5, -1.2, 3, -0.1)[:, None],),
        residual=rosenbrock,
        solution=lambda a: torch.cat([a, a * a], -1),
    ),
    "beale": Task(_t(1.5, 0.4), (_t(1.5, 2.25, 2.625),), residual=beale, solution=lambda c: _t(3, 0.5)),
    "ridge": Task(torch.zeros(4, dtype=F64), (_t(0.3),), residual=ridge, solution=ridge_solution),
    "logistic": Task(torch.zeros(4, dtype=F64), (_t(-2),), objective=logistic),
    "decay": Task(_t(1, 1), (READINGS,), residual=decay),
}
