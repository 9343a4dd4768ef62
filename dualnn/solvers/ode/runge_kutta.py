r"""Explicit Runge-Kutta methods, given by their coefficients.

.. math:: k_i = f\Bigl(t_n + c_i h,\; y_n + h \sum_{j<i} a_{ij} k_j\Bigr), \qquad y_{n+1} = y_n + h \sum_i b_i k_i

with the error estimate :math:`h \sum_i e_i k_i` and the interpolant
:math:`y(t_n + \theta h) = y_n + h \sum_i k_i \sum_m P_{im} \theta^{m}`.

Reference:
    Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, sections II.4 to II.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.solvers.ode.control import Controller, Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Carry, Others, State, Trial, all_of, formed
from dualnn.solvers.ode.newton import Limits


class RungeKutta:
    """A method whose last stage is the next step's first one.

    Args:
        a: Rows of the tableau, the first stage (empty) left out; the last row is the solution's weights.
        c: Nodes of those stages.
        e: Weights of the error estimate, one a stage (the first included); or two estimates that count together.
        p: Interpolant, ``(stages, degree)``, powers 1, 2, … of theta.
        error_order: Of the error estimate's leading term in h, less one.
        control: The controller.
        later: Rows and nodes of further stages, which the interpolant alone needs.
    """

    land = False

    def __init__(
        self,
        a: Sequence[Sequence[float]],
        c: Sequence[float],
        e: Sequence[float] | tuple[Sequence[float], Sequence[float]],
        p: Sequence[Sequence[float]],
        error_order: int,
        control: Controller,
        later: tuple[Sequence[Sequence[float]], Sequence[float]] = ((), ()),
    ) -> None:
        self.c, self.control, self.error_order = c, control, error_order
        self.a = [torch.tensor(row, dtype=torch.float64) for row in a]
        self.e, self.p = torch.tensor(e, dtype=torch.float64).t(), torch.tensor(p, dtype=torch.float64)
        self.later = [(torch.tensor(row, dtype=torch.float64), c) for row, c in zip(*later, strict=True)]

    def solution(self, carry: Carry) -> Tensor:
        """Its first part."""
        return carry[0]

    def tolerance(self, tol: Tolerance) -> Tolerance:
        """The tolerance itself."""
        return tol

    def begin(self, field: Field, t: Tensor, y: Tensor, f: Tensor, h: Tensor) -> State:
        """The first stage is known."""
        return State((y, f))

    def attempt(
        self, field: Field, t: Tensor, state: State, h: Tensor, active: Tensor, tol: Tolerance, limits: Limits
    ) -> Trial:
        """The stages, one by one."""
        carry, stages, estimate = self.follow(field, t, state.carry, h, ())
        error = estimate()
        scale = tol.scale(state.carry[0], carry[0])
        return Trial(State(carry), stages, (), error, tol.measure(error, scale), *all_of(active, h))

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
        """By the controller."""
        return state, self.control.factor(norm, last, good)

    def carry(self, field: Field, t: Tensor, y: Tensor, h: Tensor) -> Carry:
        """The solution and its slope."""
        return y, field(t, y)

    def follow(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor, frozen: tuple[Tensor, ...]
    ) -> tuple[Carry, tuple[Any, ...], Callable[[], Tensor]]:
        """The same formulas, on whatever the carry is."""
        y, f = carry
        wide = h.unsqueeze(-1)
        slopes = [f]
        at = y
        for row, c in zip(self.a, self.c, strict=True):
            at = y + wide * (torch.stack(slopes, -1) @ row.to(h))
            slopes.append(field(t + c * h, at))
        k = torch.stack(slopes, -1)

        def all_stages() -> Tensor:
            more = list(slopes)
            for row, c in self.later:
                more.append(field(t + c * h, y + wide * (torch.stack(more, -1) @ row.to(h))))
            return torch.stack(more, -1)

        def estimate() -> Tensor:
            error = k @ self.e.to(h)
            return wide * error if self.e.dim() == 1 else wide.unsqueeze(-1) * error.mT

        return (at, slopes[-1]), (all_stages if self.later else k,), estimate

    def dense(self, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, theta: Tensor) -> Tensor:
        """By Horner's rule in theta."""
        (k,) = formed(stages)
        terms = (k @ self.p.to(h)).unbind(-1)
        theta, total = theta.unsqueeze(-1), terms[-1]
        for term in terms[-2::-1]:
            total = total * theta + term
        return old[0] + h.unsqueeze(-1) * theta * total
