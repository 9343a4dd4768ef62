r"""Anderson acceleration (type II) for :math:`z = f(z)`.

Over the last m iterates, weights :math:`\alpha` that sum to 1 and minimise
:math:`\lVert \sum_i \alpha_i (f(z_i) - z_i) \rVert` give the next iterate :math:`\sum_i \alpha_i f(z_i)`; m = 1 is
Picard's plain iteration. Samples are independent: each has its own weights and its own end.

Reference:
    Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49, 2011.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor
from dualnn.solvers.stats import Stats, Status

RIDGE = 1e-10  # nearly parallel differences make the Gram matrix singular: relative, far below the tolerance


def anderson(
    fn: Callable[[Tensor], Tensor], z: Tensor, tol: float, max_steps: int, memory: int
) -> tuple[Tensor, Stats]:
    """Iterate; a sample that has converged is held.

    Args:
        fn: ``(B, n) -> (B, n)``, sample by sample.
        z: Where to start.
        tol: Largest entry of ``fn(z) - z`` at which a sample has converged.
        max_steps: Evaluations of ``fn`` at most.
        memory: Iterates that are combined.

    Returns:
        The last value of ``fn``, and its `Stats`.
    """
    past: list[tuple[Tensor, Tensor]] = []
    iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    running = torch.ones_like(iterations, dtype=torch.bool)
    value, worst, evaluations = z, torch.full_like(z[:, 0], torch.inf), 0
    # A context costs as much as several of the kernels in it.
    autocast = torch.is_autocast_enabled(z.device.type)
    while evaluations < max_steps:
        value = fn(z)
        evaluations += 1
        residual = value - z
        worst = residual.detach().abs().amax(1)
        iterations = iterations + running
        running = running & (worst > tol) & (worst < torch.inf)  # nan is neither
        if not bool(running.any()):
            break
        past = [*past, (value, residual)][-memory:]
        if autocast:
            with torch.autocast(z.device.type, enabled=False):
                following = _mixed(past)
        else:
            following = _mixed(past)
        following = torch.where(torch.isfinite(following), following, value)
        z = torch.where(running.unsqueeze(1), following, z)
    # A sample that has stopped was held, so that its last residual is the one it stopped with.
    status = torch.full_like(iterations, Status.CONVERGED)
    status = torch.where(torch.isfinite(worst), status, Status.NONFINITE)
    status = torch.where(running, Status.MAX_STEPS, status)
    return value, Stats(iterations, worst, status, evaluations, 0)


def _mixed(past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The combination: least squares on residual differences, per sample."""
    value, residual = past[-1]
    if len(past) == 1:
        return value
    wide = torch.promote_types(value.dtype, torch.float32)  # torch has no linear algebra for half precision
    dr = (residual.unsqueeze(2) - torch.stack([r for _, r in past[:-1]], 2)).to(wide)
    dv = (value.unsqueeze(2) - torch.stack([v for v, _ in past[:-1]], 2)).to(wide)
    gram = dr.transpose(1, 2) @ dr
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    right = dr.transpose(1, 2) @ residual.unsqueeze(2).to(wide)
    if isinstance(gram, DualTensor) or gram.requires_grad:  # unrolled, for comparison
        gamma, regular = torch.linalg.solve(gram + ridge[:, None, None] * eye, right), None
    else:
        gamma, info = torch.linalg.solve_ex(gram + ridge[:, None, None] * eye, right)
        regular = (info == 0).unsqueeze(1)
    mixed = value - (dv @ gamma).squeeze(2).to(value.dtype)
    return mixed if regular is None else torch.where(regular, mixed, value)
