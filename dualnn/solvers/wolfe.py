r"""Line search for minima, sample by sample: a step with enough fall and enough flattening (weak Wolfe conditions).

.. math::
    f(x + t d) \le f(x) + c_1 t\, g^T d, \qquad g(x + t d)^T d \ge c_2\, g^T d.

Starting from t = 1, a trial that breaks the first is an upper end and one that breaks the second a lower end; the next
trial doubles, or halves the bracket. The second condition is what keeps :math:`s^T y > 0` for quasi-Newton updates.

Near a minimum the fall drowns in the rounding of f long before the gradient is exact. There (f has not risen beyond
its rounding, or the step is shorter than :math:`4 \sqrt\epsilon\, |x|`) a trial counts as low enough if the slope has
not become steeper uphill than :math:`(1 - 2 c_1) |g^T d|`: the first condition by the trapezoidal rule, exact where f
is quadratic (Hager and Zhang). So minima are found to the precision of the gradient, not to its square root.

Reference:
    Lewis, Overton, "Nonsmooth optimization via quasi-Newton methods", Math. Program. 141, 2013 (the bisection);
    Hager, Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line search", SIAM J.
    Optim. 16, 2005; Nocedal, Wright, "Numerical Optimization", 2006, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.solvers.line_search import ARMIJO, over

CURVATURE = 0.9


class Point(NamedTuple):
    """What is known at x: value, gradient, and what else the method evaluates with them, each ``(*batch, …)``."""

    value: Tensor
    gradient: Tensor
    rest: tuple[Tensor, ...] = ()


Evaluate = Callable[[Tensor], Point]


def choose(mask: Tensor, new: Point, old: Point) -> Point:
    """Sample by sample, one point or the other."""
    value, gradient, *rest = (
        torch.where(over(mask, a), a, b) for a, b in zip((*new[:2], *new.rest), (*old[:2], *old.rest), strict=True)
    )
    return Point(value, gradient, tuple(rest))


def plain(x: Tensor) -> Tensor:
    """The value alone: decisions are not differentiated."""
    return primal_of(x).detach()


def noise(value: Tensor) -> Tensor:
    """Rounding to expect in an objective's value."""
    value = plain(value)
    return 8 * torch.finfo(value.dtype).eps * value.abs()


def small(step: Tensor, x: Tensor) -> Tensor:
    """Which steps change f by less than its rounding may, if terms of size :math:`x^T H x` cancel in it."""
    root = torch.finfo(x.dtype).eps ** 0.5
    return plain(step).abs().amax(-1) <= 4 * root * plain(x).abs().amax(-1)


def finite(point: Point) -> Tensor:
    """Which samples have a finite value and gradient."""
    return torch.isfinite(plain(point.value)) & torch.isfinite(plain(point.gradient)).all(-1)


def search(
    evaluate: Evaluate, x: Tensor, at: Point, direction: Tensor, active: Tensor, trials: int = 40
) -> tuple[Tensor, Point, Tensor]:
    """Search along a descent direction.

    Args:
        evaluate: The objective at ``(*batch, n)``.
        x: Where.
        at: What is known there.
        direction: Of x's shape.
        active: Which samples search; the others stay.
        trials: Evaluations at most.

    Returns:
        ``(x, point, found)``: samples without ``found`` have stayed where they were.
    """
    direction = torch.where(over(active, direction), direction, 0.0)
    d = plain(direction)
    value = plain(at.value)
    slope = (plain(at.gradient) * d).sum(-1)
    t = torch.ones_like(value)
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    pending, found = active, torch.zeros_like(active)
    best_x, best = x, at
    for _ in range(trials):
        trial = x + t.unsqueeze(-1) * direction
        point = evaluate(trial)
        new, new_slope = plain(point.value), (plain(point.gradient) * d).sum(-1)
        fallen = new <= value + ARMIJO * t * slope  # a comparison with nan is false
        blind = (new <= value + noise(at.value)) | small(t.unsqueeze(-1) * d, x)
        near = blind & (new_slope <= (1 - 2 * ARMIJO) * slope.abs())
        good = pending & (fallen | near) & finite(point)
        best_x, best = torch.where(over(good, trial), trial, best_x), choose(good, point, best)
        found = found | good
        pending = pending & ~(good & (new_slope >= CURVATURE * slope))
        if not bool(pending.any()):
            break
        low, high = torch.where(pending & good, t, low), torch.where(pending & ~good, t, high)
        wider = torch.where(torch.isinf(high), 2 * t, (low + high) / 2)
        t = torch.where(pending, wider, t)
    return best_x, best, found & (plain(best_x) != plain(x)).any(-1)  # a step below x's own rounding is none
