r"""Backward differences of variable order 1 to 5, in the numerical differentiation formulas' variant.

With backward differences :math:`D_j = \nabla^j y` on a grid of the present step (quasi-constant),

.. math::

   \Bigl(1 - \kappa_k\Bigr) \gamma_k \Bigl(y_{n+1} - \sum_{j \le k} D_j\Bigr) + \sum_{j=1}^{k} \gamma_j D_j
   = h f(t_{n+1}, y_{n+1}), \qquad \gamma_j = \sum_{i \le j} 1/i.

A step is one implicit equation for :math:`d = y_{n+1} - \sum_{j \le k} D_j`; all the rest is linear in the history: a
change of step or order is a matrix that depends on neither the solution nor the arguments. So the derivative of a step
is one linear solve with the Jacobian at its end, and these matrices again. A method is its coefficients: `KAPPA`.

Reference:
    Shampine, Reichelt, "The MATLAB ODE Suite", 1997; Byrne, Hindmarsh, "A polyalgorithm for the numerical solution of
    ordinary differential equations", 1975.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, make
from dualnn.engine.tangents import Dense
from dualnn.solvers.factors import LU
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.ode.along import along, apart
from dualnn.solvers.ode.control import Controller, Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Carry, Others, State, Trial
from dualnn.solvers.ode.newton import Limits, newton

HIGHEST = 5
ROWS = HIGHEST + 3  # the solution, differences up to the order, and two more that judge the neighbouring orders
KAPPA = torch.tensor([0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0], dtype=torch.float64)
MAX_ITERATIONS = 4


def _tables() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For each order: alpha, error constants, and the matrices that predict, update and judge; order 0 stands still."""
    gamma = torch.zeros(HIGHEST + 1, dtype=torch.float64)
    gamma[1:] = torch.cumsum(1 / torch.arange(1, HIGHEST + 1, dtype=torch.float64), 0)
    alpha = (1 - KAPPA) * gamma
    alpha[0] = 1.0
    constant = torch.zeros(HIGHEST + 2, dtype=torch.float64)
    constant[: HIGHEST + 1] = KAPPA * gamma
    constant += 1 / torch.arange(1, HIGHEST + 3, dtype=torch.float64)
    predict = torch.zeros(HIGHEST + 1, 2, ROWS, dtype=torch.float64)
    update = torch.zeros(HIGHEST + 1, ROWS, ROWS + 1, dtype=torch.float64)  # last column: of d
    judge = torch.zeros(HIGHEST + 1, 2, ROWS, dtype=torch.float64)
    for k in range(HIGHEST + 1):
        predict[k, 0, : k + 1] = 1
        predict[k, 1, : k + 1] = gamma[: k + 1] / alpha[k]
        update[k, :, :ROWS] = torch.eye(ROWS)
        update[k, : k + 1, : k + 1] = torch.ones(k + 1, k + 1).triu()
        update[k, : k + 2, ROWS] = 1
        update[k, k + 1, k + 1] = 0
        update[k, k + 2, k + 2] = 0
        update[k, k + 2, k + 1] = -1
        update[k, k + 2, ROWS] = 1
        if k:
            judge[k, 0, k] = constant[k - 1]
            judge[k, 1, k + 2] = constant[k + 1]
    return alpha, constant, predict, update, judge


ALPHA, CONSTANT, PREDICT, UPDATE, JUDGE = _tables()


class BDF:
    """The carry is the history ``(*batch, ROWS, n)``.

    Args:
        max_order: At most 5.
    """

    land = False
    error_order = 1
    control = Controller(a=0.5)

    def __init__(self, max_order: int = HIGHEST) -> None:
        self.max_order = max_order

    def solution(self, carry: Carry) -> Tensor:
        """The history's first row."""
        return carry[0][..., 0, :]

    def tolerance(self, tol: Tolerance) -> Tolerance:
        """The tolerance itself."""
        return tol

    def begin(self, field: Field, t: Tensor, y: Tensor, f: Tensor, h: Tensor) -> State:
        """Order 1 knows the slope."""
        f, jacobian, _ = field.linearise(t, y)
        order = torch.ones(h.shape, dtype=torch.int64, device=h.device)
        history = _history(y, field.slope(t, y, f), h)
        current = torch.isfinite(jacobian).flatten(-2).all(-1)
        return State((history,), (h, order, torch.zeros_like(order), jacobian, current))

    def attempt(
        self, field: Field, t: Tensor, state: State, h: Tensor, active: Tensor, tol: Tolerance, limits: Limits
    ) -> Trial:
        """Rescale the history, predict, and correct by Newton's method with a Jacobian that is kept while it serves."""
        (history,) = state.carry
        spacing, order, equal, jacobian, current = state.memory
        equal = torch.where(h == spacing, equal, 0)
        history = history + rescaling(order, h / spacing) @ history
        predicted, past = (PREDICT.to(h)[order] @ history).unbind(-2)
        scale = tol.scale(predicted)
        weight = (h / ALPHA.to(h)[order]).unsqueeze(-1)
        inertia = field.inertia(predicted)
        end = t + h
        d = torch.zeros_like(predicted)
        solved = ~active
        regular = torch.ones_like(active)
        iterations = torch.zeros_like(order)
        for _ in range(2):
            factors = field.factorise(inertia - weight.unsqueeze(-1) * jacobian)

            def step(d: Tensor, factors: LU = factors) -> tuple[Tensor, Tensor]:
                slopes = field(end, predicted + d)
                return factors.solve(weight * slopes - field.weigh(past + d)), slopes

            trying = active & ~solved
            found = newton(step, torch.zeros_like(d), scale, trying, limits, tol, MAX_ITERATIONS)
            d = torch.where(trying.unsqueeze(-1), found.x, d)
            finite = (
                torch.isfinite(jacobian).flatten(-2).all(-1)
            )  # LU of an infinite matrix can look like a regular one's
            solved = solved | (found.solved & finite)
            regular = torch.where(trying, found.regular & finite, regular)
            iterations = iterations + found.iterations
            stale = active & ~solved & ~current
            if not bool(stale.any()):
                break
            fresh = field.linearise(end, predicted)[1]
            jacobian = torch.where(stale[..., None, None], fresh, jacobian)
            current = current | stale
        y = predicted + d
        error = CONSTANT.to(h)[order].unsqueeze(-1) * d
        norm = tol.measure(error, tol.scale(y))
        new = State((_updated(history, d, order),), (h, order, equal + 1, jacobian, current))
        return Trial(new, (order,), (d, h / spacing, order), error, norm, solved, regular, iterations)

    def adapt(
        self,
        field: Field,
        t: Tensor,
        trial: Trial,
        state: State,
        norm: Tensor,
        last: Tensor,
        good: Tensor,
        tol: Tolerance,
        fixed: bool,
        others: Others | None = None,
    ) -> tuple[State, Tensor]:
        """Order and step are chosen after order + 1 steps of one length: those that allow the longest step."""
        spacing, order, equal, _, _ = state.memory
        jacobian, current = trial.state.memory[3:]
        ready = good & (equal > order)
        if fixed:
            order = torch.where(ready, (order + 1).clamp_max(self.max_order), order)
            equal = torch.where(ready, 0, equal)
            state = State(state.carry, (spacing, order, equal, jacobian, current & ~good))
            return state, torch.ones_like(norm)
        spent = trial.iterations.clamp_max(MAX_ITERATIONS)
        safety = 0.9 * (2 * MAX_ITERATIONS + 1) / (2 * MAX_ITERATIONS + spent)
        rejected = torch.clamp(safety * norm ** (-1 / (order + 1)), 0.2, 0.9)
        factor = torch.where(good, 1.0, torch.nan_to_num(rejected, 0.2))
        if bool(ready.any()):
            judge = JUDGE.to(norm)[order]

            def neighbours(carry: Carry, tol: Tolerance) -> Tensor:
                carried, scale = judge @ carry[0], tol.scale(carry[0][..., 0, :])
                return torch.stack([tol.measure(carried[..., i, :], scale) for i in range(2)], -1)

            sizes = neighbours(state.carry, tol)
            if others is not None and (moved := others(neighbours)) is not None:
                sizes = torch.maximum(sizes, moved)
            lower = torch.where(order > 1, sizes[..., 0], torch.inf)
            higher = torch.where(order < self.max_order, sizes[..., 1], torch.inf)
            sizes = torch.stack([lower, norm, higher], -1)
            exponents = -1 / (order.unsqueeze(-1) + torch.arange(3, device=order.device))
            best, which = (torch.clamp_min(sizes, 1e-10) ** exponents).max(-1)
            factor = torch.where(ready, torch.clamp(safety * best, 0.2, 10.0), factor)
            order = torch.where(ready, order + which - 1, order)
        equal = torch.where(ready | ~good, 0, equal)
        return State(state.carry, (spacing, order, equal, jacobian, current & ~good)), factor

    def carry(self, field: Field, t: Tensor, y: Tensor, h: Tensor) -> Carry:
        """The history at the start: a straight line."""
        return (_history(y, field.slope(t, y), h),)

    def follow(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor, frozen: tuple[Tensor, ...]
    ) -> tuple[Carry, tuple[Any, ...], Callable[[], Tensor]]:
        """One implicit node; the rest is linear."""
        known, ratio, order = frozen
        (history,) = carry
        history = history + rescaling(order, ratio) @ history
        predicted, past = (PREDICT.to(h)[order] @ history).unbind(-2)
        weight = (h / ALPHA.to(h)[order]).unsqueeze(-1)

        if (quick := along(field, (predicted, past, t), known.shape[-1])) is not None:
            (value, dy), (_, dpast) = (apart(x, quick.level, quick.num) for x in (predicted, past))
            now, dt = apart(t, quick.level, quick.num) if isinstance(t, DualTensor) else (t, None)
            jacobian, forced = quick.linearise(now + h, value + known, dt, dy)
            matrix = quick.field.inertia(known) - weight.unsqueeze(-1) * jacobian
            moved = LU(matrix).solve(weight * forced - quick.field.weigh(dpast))
            d: Tensor = make(known, Dense(moved), quick.level)
            return (_updated(history, d, order),), (order,), lambda: CONSTANT.to(h)[order].unsqueeze(-1) * d

        def residual(d: Tensor, predicted: Tensor, past: Tensor, t: Tensor, *args: Any) -> Tensor:
            inner = field.at(args)
            return inner.weigh(d + past) - weight * inner(t + h, predicted + d)

        def linearise(d: Tensor, predicted: Tensor, past: Tensor, t: Tensor, *args: Any) -> LU:
            inner = field.at(args)
            jacobian = inner.linearise(t + h, predicted + d)[1]
            return LU(inner.inertia(d) - weight.unsqueeze(-1) * jacobian)

        d = implicit(Problem(residual, lambda *_: (known, None), linearise), predicted, past, t, *field.args)
        return (_updated(history, d, order),), (order,), lambda: CONSTANT.to(h)[order].unsqueeze(-1) * d

    def dense(self, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, theta: Tensor) -> Tensor:
        """The polynomial through the history."""
        (order,) = stages
        s = theta - 1
        factors = [torch.ones_like(s)]
        for m in range(HIGHEST):
            factors.append(factors[-1] * (s + m) / (m + 1))
        weights = torch.stack(factors, -1) * (torch.arange(HIGHEST + 1, device=order.device) <= order.unsqueeze(-1))
        return (weights.unsqueeze(-2) @ new[0][..., : HIGHEST + 1, :]).squeeze(-2)


def _history(y: Tensor, f: Tensor, h: Tensor) -> Tensor:
    zero = torch.zeros_like(y)
    return torch.stack([y, h.unsqueeze(-1) * f, *(zero for _ in range(ROWS - 2))], -2)


def _updated(history: Tensor, d: Tensor, order: Tensor) -> Tensor:
    matrix = UPDATE.to(device=d.device, dtype=d.dtype)[order]
    return matrix[..., :ROWS] @ history + matrix[..., ROWS:] * d.unsqueeze(-2)


def rescaling(order: Tensor, ratio: Tensor) -> Tensor:
    """What a step ``ratio`` times as long adds to the differences up to the order: ``(*batch, ROWS, ROWS)``."""
    both = _products(ratio) @ _products(torch.ones_like(ratio))
    inside = torch.arange(HIGHEST + 1, device=order.device) <= order.unsqueeze(-1)
    eye = torch.eye(HIGHEST + 1, dtype=ratio.dtype, device=ratio.device)
    counted = inside.unsqueeze(-1) & inside.unsqueeze(-2) & (ratio != 1)[..., None, None]
    return torch.nn.functional.pad(torch.where(counted, both.mT - eye, 0.0), (0, 2, 0, 2))


def _products(ratio: Tensor) -> Tensor:
    i = torch.arange(1, HIGHEST + 1, dtype=ratio.dtype, device=ratio.device)
    inner = (i.unsqueeze(-1) - 1 - ratio[..., None, None] * i) / i.unsqueeze(-1)
    return torch.cumprod(torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 0, 1, 0), value=1.0), -2)
