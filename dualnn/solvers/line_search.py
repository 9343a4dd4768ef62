r"""Backtracking line search, sample by sample.

Try :math:`x + t d` for :math:`t = 1, \tfrac12, \tfrac14, …` until the merit has fallen by the share of the predicted
fall that Armijo's condition asks, :math:`\varphi(x + t d) \le \varphi(x) + c\,t\,\varphi'(0)`. A trial that is not
finite is refused. Samples that are done keep their place while others go on.

Reference:
    Nocedal, Wright, "Numerical Optimization", 2006, algorithm 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ARMIJO = 1e-4


class Found(NamedTuple):
    """Where a search ended: the new points, what was evaluated there, and which samples found a lower merit."""

    x: Tensor
    value: Tensor
    merit: Tensor
    accepted: Tensor
    evaluations: int


def backtrack(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    value: Tensor,
    merit: Tensor,
    direction: Tensor,
    slope: Tensor,
    active: Tensor,
    halvings: int = 30,
) -> Found:
    """Search along ``direction`` from ``x``.

    Args:
        evaluate: ``evaluate(x) -> (value, merit)``; the value is handed back with the accepted point.
        x: ``(*batch, n)``.
        value: What ``evaluate`` gave at x.
        merit: ``batch``-shaped.
        direction: Of x's shape.
        slope: Derivative of the merit along the direction (negative), ``batch``-shaped.
        active: Which samples search; the others stay.
        halvings: Of the step, at most.
    """
    t = torch.ones_like(merit)
    pending = active
    for tried in range(halvings + 1):
        trial = x + t.unsqueeze(-1) * direction
        new_value, new_merit = evaluate(trial)
        good = pending & (new_merit <= merit + ARMIJO * t * slope)  # a comparison with nan is false
        if tried == 0:
            found = _where(good, (trial, new_value, new_merit), (x, value, merit))
        else:
            found = _where(good, (trial, new_value, new_merit), found)
        pending = pending & ~good
        if not bool(pending.any()):
            break
        t = torch.where(pending, t / 2, t)
    new_x, new_value, new_merit = found
    return Found(new_x, new_value, new_merit, active & ~pending, tried + 1)


def over(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of samples with axes added so that it broadcasts against their entries."""
    return mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim()))


def _where(mask: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(over(mask, a), a, b) for a, b in zip(new, old, strict=True))
