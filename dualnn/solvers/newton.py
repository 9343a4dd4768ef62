r"""Newton's method for :math:`F(x) = 0`, with a backtracking line search on :math:`\tfrac12 \lVert F \rVert^2`.

.. math:: x \leftarrow x + t\,d, \qquad F_x(x)\,d = -F(x).

Samples are independent: each has its own step length and its own end, and is held once it has arrived. With no
tolerance given, a sample that has come within :math:`\epsilon^{3/4}` takes one more step with the factors at hand,
which leaves it at rounding error; and one whose steps no longer change it has arrived as well.

Reference:
    Dennis, Schnabel, "Numerical Methods for Unconstrained Optimization and Nonlinear Equations", 1996, chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dualnn.solvers.factors import Factors
from dualnn.solvers.line_search import backtrack
from dualnn.solvers.stats import Stats, Status

Linearise = Callable[[Tensor], tuple[Tensor, Factors]]


class Model(Protocol):
    """Where the steps come from: a linear model of the function, exact or updated."""

    formed: int  # Jacobians so far

    def at(self, x: Tensor, f: Tensor, active: Tensor) -> tuple[Tensor, Factors, Tensor]:
        """At ``x`` with value ``f``: the value, factors, and which ``active`` samples' are of the true Jacobian."""


class Exact:
    """The true Jacobian at every step."""

    def __init__(self, linearise: Linearise) -> None:
        self.linearise, self.formed = linearise, 0

    def at(self, x: Tensor, f: Tensor, active: Tensor) -> tuple[Tensor, Factors, Tensor]:
        """Form and factorise it."""
        value, factors = self.linearise(x)
        self.formed += 1
        return value, factors, active


def newton(
    fn: Callable[[Tensor], Tensor], linearise: Linearise, x: Tensor, tol: float | None, max_steps: int
) -> tuple[Tensor, Stats, Factors | None]:
    """Solve ``fn(x) = 0`` for ``x: (*batch, n)``.

    Args:
        fn: The residual.
        linearise: Its value and factorised Jacobian.
        x: Where to start.
        tol: Largest entry of the residual at which a sample has converged; None: as exactly as the dtype gives.
        max_steps: At most.

    Returns:
        The last iterate, its `Stats`, and the factors of the last step (taken at the iterate before).
    """
    return descend(fn, Exact(linearise), x, tol, max_steps)


def descend(
    fn: Callable[[Tensor], Tensor], model: Model, x: Tensor, tol: float | None, max_steps: int
) -> tuple[Tensor, Stats, Factors | None]:
    """The iteration, with the steps of any model; a step that leads nowhere is final only with the true Jacobian."""
    limit = default_tolerance(x) if tol is None else tol
    factors: Factors | None = None
    f = fn(x)
    evaluations = 1
    merit, size = _merit(f), _largest(f)
    status = torch.where(torch.isfinite(size), Status.RUNNING, Status.NONFINITE)
    status = torch.where(size <= limit, Status.CONVERGED, status)
    iterations = torch.zeros_like(status)

    def evaluate(trial: Tensor) -> tuple[Tensor, Tensor]:
        value = fn(trial)
        return value, _merit(value)

    for _ in range(max_steps):
        active = status == Status.RUNNING
        if not bool(active.any()):
            break
        f, factors, exact = model.at(x, f, active)
        direction = -factors.solve(f)
        regular = torch.isfinite(direction).all(-1)
        status = torch.where(active & ~regular & exact, Status.SINGULAR, status)
        searching = active & regular
        safe = torch.where(searching.unsqueeze(-1), direction, 0.0)
        found = backtrack(evaluate, x, f, merit, safe, -2 * merit, searching)
        evaluations += found.evaluations
        iterations = iterations + searching
        x, f, merit = found.x, found.value, found.merit
        size = _largest(f)
        still = _largest(safe) <= 8 * torch.finfo(x.dtype).eps * _largest(x)
        failed = searching & ~found.accepted & exact
        status = torch.where(failed, Status.STALLED, status)
        if tol is None:  # rounding hides any further fall, but the step says that the sample has arrived
            status = torch.where(failed & still, Status.CONVERGED, status)
        status = torch.where(searching & (size <= limit), Status.CONVERGED, status)
    else:
        status = torch.where(status == Status.RUNNING, Status.MAX_STEPS, status)
    if tol is None and factors is not None:  # one more step for those that arrived, if it does not hurt
        polished = x - torch.nan_to_num(factors.solve(f), 0.0, 0.0, 0.0)
        after = fn(polished)
        evaluations += 1
        better = (status == Status.CONVERGED) & (_largest(after) <= size)
        x, size = torch.where(better.unsqueeze(-1), polished, x), torch.where(better, _largest(after), size)
    return x, Stats(iterations, size, status, evaluations, model.formed), factors


def default_tolerance(x: Tensor) -> float:
    """The precision to the power 3/4: float64 1.8e-12, float32 6.4e-6."""
    return torch.finfo(x.dtype).eps ** 0.75


def _merit(f: Tensor) -> Tensor:
    return (f * f).sum(-1)


def _largest(f: Tensor) -> Tensor:
    return f.abs().amax(-1)
