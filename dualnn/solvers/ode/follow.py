r"""Derivatives of the discrete solution: every accepted step once more, on duals or recorded by autograd.

The steps' sizes, orders and every decision are constants, so what comes out is the exact derivative of

.. math:: y_{n+1} = \Phi_{h_n}(t_n, y_n, p),

which is itself a consistent discretisation of the variational equations. Times move rigidly: with :math:`t_0` moves the
whole grid, and a requested time moves along the interpolant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, primal_of, top_level
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.ode.crossing import crossed
from dualnn.solvers.ode.events import Crossing
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.loop import Step
from dualnn.solvers.ode.method import Carry, Method, held
from dualnn.solvers.ode.outputs import Output


def moving(t: Tensor) -> Tensor | None:
    """Zero in value: how much every requested time moves; None where nobody asks."""
    if isinstance(t, DualTensor) or (torch.is_grad_enabled() and t.requires_grad):
        return t - primal_of(t).detach()
    return None


def shifted(t: Tensor, move: Tensor | None) -> Tensor:
    """A time of the grid, which moves with its start."""
    return t if move is None else t + move[0]


def interpolated(
    method: Method, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, output: Output, move: Tensor | None
) -> Tensor:
    """The solution at a requested time."""
    theta = output.theta if move is None else output.theta + (move[output.row] - move[0]) / h
    return method.dense(old, new, stages, h, theta)


class Forward:
    """Goes along at once, so memory does not depend on the number of steps (unless autograd records the duals).

    Args:
        method: The integrator.
        field: The right-hand side with its arguments as they were given.
        y: The start, likewise.
        t: The requested times, likewise.
        size: Tangents take part in the error test: the size of each direction, ``(K,)``, relative to what it moves.
        events: Functions of the events, with the right-hand side's arguments.
    """

    def __init__(
        self,
        method: Method,
        field: Field,
        y: Tensor,
        t: Tensor,
        size: Tensor | None = None,
        events: Sequence[Callable[..., Tensor]] = (),
    ) -> None:
        self.method, self.field, self.size, self.events = method, field, size, events
        self.crossings: list[Crossing] = []
        self.recorded = torch.is_grad_enabled()  # the loop around the steps runs under no_grad
        self.move = moving(t)
        empty = torch.full_like(primal_of(y).detach(), torch.nan)
        self.rows: list[Any] = [y, *(empty for _ in range(len(t) - 1))]
        self.carry: Carry = ()
        self._last: Any = None

    def start(self, t: Tensor, h: Tensor) -> None:
        """The carry before the first step."""
        with torch.set_grad_enabled(self.recorded):
            self.carry = self.method.carry(self.field, shifted(t, self.move), self.rows[0], h)

    def errors(self, step: Step, tol: Tolerance) -> Tensor | None:
        """The norm of every direction's error, the largest."""
        if self.size is None:
            return None
        with torch.set_grad_enabled(self.recorded):
            found = self._last = self._followed(step)
            error = found[2]()
        if not isinstance(error, DualTensor):
            return None
        old, new = (_tangent(self.method.solution(c)) for c in (self.carry, found[0]))
        return tol.of_directions(self.size, old, new, _tangent(error))

    def largest(self, measure: Callable[[Carry, Tolerance], Tensor], tol: Tolerance) -> Tensor | None:
        """Among all directions."""
        if self.size is None or not any(isinstance(c, DualTensor) for c in self.carry):
            return None
        return measure(tuple(map(_tangent, self.carry)), self._scaled(tol)).amax(0)

    def _scaled(self, tol: Tolerance) -> Tolerance:
        """What counts as 1 for tangents ``(K, *batch, n)``."""
        return tol if self.size is None else tol.for_directions(self.size, self.rows[0].dim())

    def take(self, step: Step) -> None:
        """The step with its stages as constants, then what was asked for in it."""
        with torch.set_grad_enabled(self.recorded):
            carry, stages, _ = self._last or self._followed(step)
            self._last = None
            for output in step.outputs:
                value = interpolated(self.method, self.carry, carry, stages, step.lengths, output, self.move)
                self.rows[output.row] = torch.where(output.samples.unsqueeze(-1), value, self.rows[output.row])
            start = shifted(step.t, self.move)
            for c in step.crossings:
                fn = self.events[c.event]
                t, y = crossed(fn, self.method, self.field.args, start, self.carry, carry, stages, step.h, c)
                self.crossings.append(c._replace(t=t, y=y))
            self.carry = carry if step.every else held(step.good, carry, self.carry)

    def finish(self) -> Tensor:
        """All requested values, ``(T, *batch, n)``."""
        with torch.set_grad_enabled(self.recorded):
            return torch.stack(self.rows)

    def _followed(self, step: Step) -> Any:
        return self.method.follow(self.field, shifted(step.t, self.move), self.carry, step.lengths, step.frozen)


def _tangent(x: Any) -> Tensor:
    """Of the highest level, plain."""
    if not isinstance(x, DualTensor):
        return torch.zeros((1, *x.shape), dtype=x.dtype, device=x.device)
    return primal_of(x.tangent).detach()


def differentiated(values: Sequence[Any]) -> bool:
    """Whether somebody differentiates these arguments."""
    recorded = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
    return bool(top_level(values)) or recorded


def sizes(values: Sequence[Any]) -> Tensor:
    """How large each direction of the highest level is beside what it moves: the largest ratio, ``(K,)``."""
    level = top_level(values)
    found: list[Tensor] = []
    for v in values:
        if isinstance(v, DualTensor) and v._level == level and not v._tan.is_zero:
            value, rows = primal_of(v.primal).detach(), _tangent(v)
            ratio = torch.where(value != 0, rows.abs() / torch.where(value != 0, value.abs(), 1.0), 0.0)
            found.append(ratio.reshape(len(rows), -1).amax(1))
    if not found:
        return torch.ones(1, dtype=torch.float64)
    largest = torch.stack(found).amax(0)
    return torch.where(largest > 0, largest, 1.0)
