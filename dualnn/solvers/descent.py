r"""The loop that every minimiser shares: when a sample has arrived, and when it never will.

A method is one `Step`: from x to a better x, each sample for itself. A sample has arrived when the largest entry of
its gradient is within the tolerance. With no tolerance given it goes on, as exactly as the dtype gives. What that is,
the gradient's own rounding tells, :math:`\epsilon \kappa |x|`, with the curvature
:math:`\kappa = |\Delta g| / |\Delta x|` that the steps have met (the largest, a tenth forgotten at every step). A
sample has arrived

* within :math:`\epsilon^{3/4}`, once a step has not halved its gradient, or it is below its rounding;
* within 8 roundings, once ten steps have not halved it, or none can be found (the best of them is kept);
* where no step can be found and the fall that the method predicts is below the rounding of f.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dualnn.solvers.line_search import over
from dualnn.solvers.newton import default_tolerance
from dualnn.solvers.stats import Stats, Status
from dualnn.solvers.wolfe import Evaluate, Point, finite, noise, plain

PATIENCE = 10


class Taken(NamedTuple):
    """A step's outcome.

    Attributes:
        x: The new iterates (unchanged where a trial was refused).
        at: What is known there.
        stuck: Samples for which the method has no further step to try.
        fall: Decrease of f that the step predicted.
        singular: Samples whose step is not determined.
    """

    x: Tensor
    at: Point
    stuck: Tensor
    fall: Tensor
    singular: Tensor | None = None


class Step(Protocol):
    """One iteration of a method, with what it remembers."""

    def __call__(self, x: Tensor, at: Point, active: Tensor) -> Taken:
        """Move the active samples."""


def descend(evaluate: Evaluate, step: Step, x: Tensor, tol: float | None, max_steps: int) -> tuple[Tensor, Stats]:
    """Repeat a step until every sample has arrived or failed.

    Args:
        evaluate: The objective.
        step: The method.
        x: Where to start, ``(*batch, n)``.
        tol: Largest entry of the gradient; None: as exactly as the dtype gives.
        max_steps: At most.

    Returns:
        The iterates and their `Stats` (evaluations and Jacobians are the objective's to count).
    """
    limit = default_tolerance(x) if tol is None else tol
    at = evaluate(x)
    size = _largest(at)
    status = torch.where(finite(at), Status.RUNNING, Status.NONFINITE)
    status = torch.where((size <= limit) if tol is not None else (size == 0), Status.CONVERGED, status)
    iterations, waited = torch.zeros_like(status), torch.zeros_like(status)
    best_x, best, curvature = x, size, torch.zeros_like(size)
    for _ in range(max_steps):
        active = status == Status.RUNNING
        if not bool(active.any()):
            break
        before_x, before = plain(x), plain(at.gradient)
        taken = step(x, at, active)
        x, at = taken.x, taken.at
        iterations = iterations + active
        size = _largest(at)
        if taken.singular is not None:
            status = torch.where(active & taken.singular, Status.SINGULAR, status)
            active = active & ~taken.singular
        if tol is not None:
            status = torch.where(active & taken.stuck, Status.STALLED, status)
            status = torch.where(active & (size <= limit), Status.CONVERGED, status)
            continue
        length = (plain(x) - before_x).abs().amax(-1)
        met = torch.where(length > 0, (plain(at.gradient) - before).abs().amax(-1) / length, 0.0)
        curvature = torch.maximum(met, 0.9 * curvature)
        rounding = torch.finfo(x.dtype).eps * curvature * plain(x).abs().amax(-1)
        late = (torch.minimum(size, best) <= limit) | (size <= 8 * rounding)
        waited = torch.where(active & late & (size > 0.5 * best), waited + 1, 0)
        keep = active & (~late | (size < best))
        best_x, best = torch.where(over(keep, x), x, best_x), torch.where(keep, size, best)
        done = (best <= limit) & ((waited >= 1) | taken.stuck | (best <= rounding))
        done = done | (late & ((waited >= PATIENCE) | taken.stuck))
        done = done | (taken.stuck & (taken.fall <= 2 * noise(at.value)))
        status = torch.where(active & taken.stuck, Status.STALLED, status)
        status = torch.where(active & done, Status.CONVERGED, status)
    else:
        status = torch.where(status == Status.RUNNING, Status.MAX_STEPS, status)
    if tol is None:
        arrived = status == Status.CONVERGED
        x, size = torch.where(over(arrived, x), best_x, x), torch.where(arrived, best, size)
    return x, Stats(iterations, size, status, 0, 0)


def _largest(at: Point) -> Tensor:
    return plain(at.gradient).abs().amax(-1)
