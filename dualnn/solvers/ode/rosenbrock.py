r"""Rosenbrock methods: linearly implicit Runge-Kutta, one matrix and no iteration a step.

With :math:`W = M / (\gamma h) - f_y(t_n, y_n)` (M: the mass matrix, or I),

.. math::

   W u_i = f\Bigl(t_n + c_i h,\; y_n + \sum_{j<i} a_{ij} u_j\Bigr) + \frac1h M \sum_{j<i} C_{ij} u_j + h d_i f_t,
   \qquad y_{n+1} = y_n + \sum_j m_j u_j.

The derivative of a step holds that of the matrix, :math:`\dot f_y u_i` (mixed second derivatives of f): W is formed on
whatever the solution is, a dual or recorded by autograd, and every stage is one implicit node that shares its factors.

Reference:
    Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996, section IV.7 (the form without products with
    the Jacobian: equation 7.25).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import count, make, primal_of
from dualnn.engine.tangents import Dense
from dualnn.solvers.elimination import Elimination
from dualnn.solvers.factors import LU, Factors
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.ode.along import apart, single
from dualnn.solvers.ode.control import Controller, Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Carry, Others, State, Trial, all_of
from dualnn.solvers.ode.newton import Limits


class Rosenbrock:
    """A stiffly accurate method whose last stage is the error estimate.

    Args:
        gamma: The diagonal.
        a: Rows of the tableau, from the second stage; the solution's weights are the last row with a 1 added.
        couple: Rows of C.
        c: Nodes of those stages.
        d: Weights of the derivative in time, of every stage.
        p: Interpolant: rows of weights K_1, K_2, … of the stages.
        error_order: Of the error estimate's leading term in h, less one.
        control: The controller.
    """

    land = False

    def __init__(
        self,
        gamma: float,
        a: Sequence[Sequence[float]],
        couple: Sequence[Sequence[float]],
        c: Sequence[float],
        d: Sequence[float],
        p: Sequence[Sequence[float]],
        error_order: int,
        control: Controller,
    ) -> None:
        self.gamma, self.c, self.d, self.control, self.error_order = gamma, c, d, control, error_order
        self.pairs = list(zip(a, couple, strict=True))
        # One product gives both sums of a stage.
        self.rows = [torch.tensor(pair, dtype=torch.float64).T for pair in self.pairs]
        self.weights = torch.tensor([*a[-1], 1.0], dtype=torch.float64)
        self.p = torch.tensor(p, dtype=torch.float64).T

    def solution(self, carry: Carry) -> Tensor:
        """Its first part."""
        return carry[0]

    def tolerance(self, tol: Tolerance) -> Tolerance:
        """The tolerance itself."""
        return tol

    def begin(self, field: Field, t: Tensor, y: Tensor, f: Tensor, h: Tensor) -> State:
        """The linearisation is that of the first step."""
        return State((y,), field.linearise(t, y))

    def attempt(
        self, field: Field, t: Tensor, state: State, h: Tensor, active: Tensor, tol: Tolerance, limits: Limits
    ) -> Trial:
        """The stages with known factors."""
        (y,) = state.carry
        f, jacobian, slope = state.memory
        factors = field.factorise(self._matrix(field, jacobian, h))
        end, u = self._stages(field, t, y, h, f, slope, factors.solve)
        error = u[..., -1]
        norm = tol.measure(error, tol.scale(y, end))
        # LU of an infinite matrix can look like that of a regular one.
        regular = torch.isfinite(jacobian).flatten(-2).all(-1) & torch.isfinite(u[..., 0]).all(-1)
        _, _, iterations = all_of(active, h)
        return Trial(State((end,), state.memory), (u,), (u,), error, norm, regular, regular, iterations)

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
        """Linearise where a new step begins; the step by the controller."""
        if bool(good.any()):
            state = State(state.carry, field.linearise(t, state.carry[0]))
        return state, self.control.factor(norm, last, good)

    def carry(self, field: Field, t: Tensor, y: Tensor, h: Tensor) -> Carry:
        """The solution."""
        return (y,)

    def follow(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor, frozen: tuple[Tensor, ...]
    ) -> tuple[Carry, tuple[Any, ...], Callable[[], Tensor]]:
        """The same formulas, with a matrix that moves."""
        (y,) = carry
        (known,) = frozen
        f, jacobian, slope = field.linearise(t, y)
        matrix = self._matrix(field, jacobian, h)
        factors = LU(primal_of(matrix).detach())
        if not field.weighted and (level := single((y, t, *field.args))):
            num = count(level, (y, t, *field.args))
            start, dy = apart(y, level, num)
            moved = self._moved(field, t, start, dy, h, known, (f, jacobian, slope), factors, level)
            end: Tensor = make(start + known @ self.weights.to(h), Dense(dy + moved @ self.weights.to(h)), level)
            stages = make(known, Dense(moved), level)
            return (end,), (stages,), lambda: stages[..., -1]
        given = iter(known.unbind(-1))

        def solve(rhs: Tensor) -> Tensor:
            return implicit(_linear(factors, next(given)), matrix, rhs)

        end, u = self._stages(field, t, y, h, f, slope, solve)
        return (end,), (u,), lambda: u[..., -1]

    def _moved(
        self,
        field: Field,
        t: Tensor,
        y: Tensor,
        dy: Tensor,
        h: Tensor,
        known: Tensor,
        linear: tuple[Tensor, Tensor, Tensor],
        factors: LU,
        level: int,
    ) -> Tensor:
        """The directions of the stages, whose values are known: plain but for the right-hand side itself."""
        num, wide = len(dy), h.unsqueeze(-1)
        df, djacobian, dslope = (apart(x, level, num)[1] for x in linear)
        forced = djacobian @ known  # (K, *batch, n, s)
        d = torch.tensor(self.d, dtype=h.dtype, device=h.device)
        forced += (wide * dslope).unsqueeze(-1) * d
        out = torch.empty_like(forced)
        out[..., 0] = factors.solve(df + forced[..., 0])
        for i, (row, c) in enumerate(zip(self.rows, self.c, strict=True), 1):
            row = row.to(h)
            sums = out[..., :i] @ row
            at = make(y + known[..., :i] @ row[:, 0], Dense(dy + sums[..., 0]), level)
            (_, pushed) = apart(field(t + c * h, at), level, num)
            out[..., i] = factors.solve(pushed + sums[..., 1] / wide + forced[..., i])
        return out

    def straight(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor
    ) -> tuple[Carry, tuple[Any, ...], Tensor, Tensor]:
        """Value and derivative at once: the new carry, the stages, the error estimate, and whose matrix is regular."""
        (y,) = carry
        f, jacobian, slope = field.linearise(t, y)
        matrix = self._matrix(field, jacobian, h)
        factors = Elimination(primal_of(matrix))
        field.counts.factorisations += 1
        level = single((matrix, f))

        def solve(rhs: Tensor) -> Tensor:
            if not level:
                return factors.solve(rhs)
            num = count(level, (matrix, rhs))
            (_, moved), (value, pushed) = apart(matrix, level, num), apart(rhs, level, num)
            u = factors.solve(value)
            return make(u, Dense(factors.solve(pushed - (moved * u.unsqueeze(-2)).sum(-1))), level)

        end, u = self._stages(field, t, y, h, f, slope, solve, written_out=True)
        regular = torch.isfinite(primal_of(jacobian)).flatten(-2).all(-1) & torch.isfinite(primal_of(u)[..., 0]).all(-1)
        return (end,), (u,), u[..., -1], regular

    def dense(self, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, theta: Tensor) -> Tensor:
        r""":math:`(1-\theta) y_n + \theta (y_{n+1} + (1-\theta)(K_1 + \theta (K_2 + \theta K_3)))`."""
        (u,) = stages
        terms = (u @ self.p.to(h)).unbind(-1)
        theta, total = theta.unsqueeze(-1), terms[-1]
        for term in terms[-2::-1]:
            total = total * theta + term
        return old[0] + theta * (new[0] - old[0] + (1 - theta) * total)

    def _matrix(self, field: Field, jacobian: Tensor, h: Tensor) -> Tensor:
        return field.inertia(jacobian) / (self.gamma * h)[..., None, None] - jacobian

    def _stages(
        self,
        field: Field,
        t: Tensor,
        y: Tensor,
        h: Tensor,
        f: Tensor,
        slope: Tensor,
        solve: Any,
        written_out: bool = False,
    ) -> tuple[Tensor, Tensor]:
        wide = h.unsqueeze(-1)
        sums: Any = _written_out if written_out else _by_product
        rows: Any = self.pairs if written_out else self.rows
        found = [solve(f + (self.d[0] * wide) * slope)]
        at = y
        for row, c, d in zip(rows, self.c, self.d[1:], strict=True):
            moved, coupled = sums(found, row)
            at = y + moved
            rhs = field(t + c * h, at) + field.weigh(coupled) / wide
            found.append(solve(rhs + (d * wide) * slope if d else rhs))
        return at + found[-1], torch.stack(found, -1)


def _by_product(found: list[Tensor], row: Tensor) -> tuple[Tensor, Tensor]:
    """Both sums of a stage: one kernel."""
    both = torch.stack(found, -1) @ row.to(found[0])
    return both[..., 0], both[..., 1]


def _written_out(found: list[Tensor], row: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Both sums of a stage, as arithmetic that a compiler fuses with the rest."""
    a, b = (sum((w * u for w, u in zip(c[1:], found[1:], strict=True)), c[0] * found[0]) for c in row)
    return a, b


def _linear(factors: Factors, known: Tensor) -> Problem:
    """``matrix @ u = rhs``, whose solution is known."""
    return Problem(
        lambda u, matrix, rhs: (matrix @ u.unsqueeze(-1)).squeeze(-1) - rhs,
        lambda matrix, rhs: (known, factors),
        lambda u, matrix, rhs: factors,
        lambda u, matrix, rhs: False,
    )
