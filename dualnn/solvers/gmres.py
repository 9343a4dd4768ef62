r"""Restarted GMRES for many systems at once: :math:`A x = b` from products :math:`A v` alone.

Arnoldi's process builds an orthonormal basis :math:`V_k` of the Krylov space with :math:`A V_k = V_{k+1} \bar H_k`;
:math:`x = V_k y` minimises :math:`\lVert b - A x \rVert`, which Givens rotations of the Hessenberg matrix solve as it
grows. After ``restart`` products the process starts again from the residual, computed afresh: a cycle corrects the
rounding of the one before.

Reference:
    Saad, Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems", SIAM J.
    Sci. Stat. Comput. 7, 1986; Saad, "Iterative Methods for Sparse Linear Systems", 2003, algorithm 6.9 and section
    6.5.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RESTART = 50
CYCLES = 100
SLOW = 0.9  # a cycle that leaves more of the residual than this has stagnated


def gmres(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    rtol: float,
    restart: int = RESTART,
    cycles: int = CYCLES,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Solve a system for every row of ``rhs``.

    Args:
        apply: The product :math:`A v` for all rows at once.
        rhs: ``(*rows, n)``.
        rtol: Relative residual to reach; where rounding does not allow it, ten times the rounding error of the product,
            :math:`10\,\epsilon\,\lVert A \rVert \lVert x \rVert`, is taken for solved if it is small.
        restart: Basis vectors at most.
        cycles: Restarts at most.

    Returns:
        ``(x, relative residual, solved)``, the last two one a row. A row with a product that is not finite is not
        solved.
    """
    length = _norm(rhs)
    rounding = 10 * torch.finfo(rhs.dtype).eps
    x, residual = torch.zeros_like(rhs), rhs
    size, weight = length, torch.zeros_like(length)
    running = size > 0
    for _ in range(cycles):
        if not bool(running.any()):
            break
        change, seen = _cycle(apply, residual, size, running, rtol * length, min(restart, rhs.shape[-1]))
        x = torch.where(running.unsqueeze(-1), x + change, x)
        weight = torch.maximum(weight, seen)
        residual = torch.where(running.unsqueeze(-1), rhs - apply(x), residual)
        before, size = size, torch.where(running, _norm(residual), size)
        solved = _solved(size, length, rtol, rounding * weight * _norm(x))
        running = running & ~solved & (size <= SLOW * before)
    solved = _solved(size, length, rtol, rounding * weight * _norm(x))
    return x, size / torch.where(length > 0, length, 1.0), solved


def _cycle(
    apply: Callable[[Tensor], Tensor], residual: Tensor, size: Tensor, running: Tensor, target: Tensor, restart: int
) -> tuple[Tensor, Tensor]:
    """The correction of one cycle, and the largest :math:`|A v|` of a unit vector."""
    start = residual / torch.where(running, size, 1.0).unsqueeze(-1)
    basis = [torch.where(running.unsqueeze(-1), start, 0.0)]
    upper: list[list[Tensor]] = []  # columns of the triangular factor
    rotations: list[tuple[Tensor, Tensor]] = []
    right = [torch.where(running, size, 0.0)]
    weight = torch.zeros_like(size)
    for j in range(restart):
        w = apply(basis[j])
        length = _norm(w)
        weight = torch.maximum(weight, length)
        known = torch.stack(basis)
        column = torch.zeros_like(known[..., 0])
        for _ in range(2):  # classical Gram-Schmidt, twice is enough
            parts = (known * w).sum(-1)
            w = w - (parts.unsqueeze(-1) * known).sum(0)
            column = column + parts
        rest = _norm(w)
        # Nothing but rounding is left: the space is invariant, and holds the solution.
        rest = torch.where(rest > 4 * torch.finfo(w.dtype).eps * length, rest, 0.0)
        basis.append(torch.where((rest > 0).unsqueeze(-1), w / torch.where(rest > 0, rest, 1.0).unsqueeze(-1), 0.0))
        entries = list(column)
        for i, (c, s) in enumerate(rotations):
            above, below = entries[i], entries[i + 1]
            entries[i], entries[i + 1] = c * above + s * below, c * below - s * above
        top = torch.hypot(entries[j], rest)
        safe = torch.where(top > 0, top, 1.0)
        c, s = torch.where(top > 0, entries[j] / safe, 1.0), rest / safe
        rotations.append((c, s))
        entries[j] = top
        upper.append(entries)
        right.append(-s * right[j])
        right[j] = c * right[j]
        if not bool((right[-1].abs() > target).any()):
            break
    y: list[Tensor] = []
    for i in reversed(range(len(upper))):
        known_part = sum((upper[k][i] * v for k, v in zip(range(len(upper) - 1, i, -1), y, strict=True)), right[i] * 0)
        pivot = upper[i][i]
        y.append(torch.where(pivot > 0, (right[i] - known_part) / torch.where(pivot > 0, pivot, 1.0), 0.0))
    weights = torch.stack(y[::-1])
    return (weights.unsqueeze(-1) * torch.stack(basis[: len(y)])).sum(0), weight


def _solved(size: Tensor, length: Tensor, rtol: float, rounding: Tensor) -> Tensor:
    # A singular system's huge x has rounding errors of any size: they do not count beyond half the digits.
    return (size <= rtol * length) | ((size <= rounding) & (size <= torch.finfo(size.dtype).eps ** 0.5 * length))


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)
