r"""Simplified Newton iterations for a step's equations, each sample with its own end.

Increments shrink as :math:`\lVert \Delta_{k+1} \rVert \approx \Theta \lVert \Delta_k \rVert`, so what is left after
one is about :math:`\Theta / (1 - \Theta)` of it.

Reference:
    Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996, section IV.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualnn.solvers.line_search import over
from dualnn.solvers.ode.control import Tolerance


class Found(NamedTuple):
    """Solutions, and which samples have one; where not, whether the matrix was to blame."""

    x: Tensor
    solved: Tensor
    regular: Tensor
    iterations: Tensor


class Limits(NamedTuple):
    """When an iteration stops: at ``tol`` times the error test's tolerance, or after so many iterations."""

    tol: Tensor
    iterations: int | None = None


def newton(
    step: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    scale: Tensor,
    active: Tensor,
    limits: Limits,
    tol: Tolerance,
    most: int,
) -> Found:
    """Iterate until what is left is small enough, in the norm of the error test.

    Args:
        step: The increment at an iterate, and the slopes it was made of.
        x: Where to start, ``(*batch, …)``.
        scale: Broadcasts against x: what counts as 1.
        active: Samples to solve, ``batch``.
        limits: When to stop.
        tol: Norm.
        most: Iterations, if ``limits`` does not say.
    """
    limit, most = limits.tol, limits.iterations or most
    zero = torch.zeros(active.shape, dtype=scale.dtype, device=scale.device)
    before = zero
    iterations = torch.zeros(active.shape, dtype=torch.int64, device=scale.device)
    pending, solved = active, ~active
    regular = torch.ones_like(active)
    floor = 4 * torch.finfo(x.dtype).eps / tol.rtol.min()
    rough = torch.clamp_max(1000 * floor, 0.03)
    for k in range(most):
        change, slopes = step(x)
        size = tol.measure((change / scale).flatten(active.dim()), torch.ones_like(zero).unsqueeze(-1))
        finite = torch.isfinite(size)
        regular = regular & (finite | ~pending | ~torch.isfinite(slopes).flatten(active.dim()).all(-1))
        rate = torch.where(before > 0, size / torch.where(before > 0, before, 1.0), zero) if k else zero
        # Hopeless: growing, or too slow for the iterations that are left.
        left = rate ** (most - k) / (1 - rate) * size
        small = size <= floor
        # At the level of rounding errors increments shrink no further: as good as the dtype gives.
        small = small | ((rate > 0.3) & (size <= rough))
        hopeless = ~finite | (((rate >= 1) | (left > limit)) & ~small & (k > 0))
        moving = pending & ~hopeless
        iterations = iterations + pending
        x = torch.where(over(moving, x), x + change, x)
        arrived = (size == 0) | small | ((k > 0) & (rate / (1 - rate) * size < limit))
        solved = solved | (moving & arrived)
        pending = moving & ~arrived
        before = size
        if not bool(pending.any()):
            break
    return Found(x, solved & active, regular, iterations)
