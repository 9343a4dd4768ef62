"""What every integration method does: `Method`, and the records that it exchanges with the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dualnn.solvers.line_search import over
from dualnn.solvers.ode.control import Controller, Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.newton import Limits

Carry = tuple[Tensor, ...]
# The largest norm among tangents in the error test, of an error that the argument measures in one carry; None: none.
Others = Callable[[Callable[["Carry", Tolerance], Tensor]], Tensor | None]


class State(NamedTuple):
    """Where every sample stands; plain tensors with the batch first.

    Attributes:
        carry: What the differentiable step starts from: the solution first (or its history).
        memory: What only the values need: Jacobians, guesses, orders.
    """

    carry: Carry
    memory: tuple[Tensor, ...] = ()


class Trial(NamedTuple):
    """One attempted step of every sample; plain tensors.

    Attributes:
        state: Where it leads.
        stages: What `Method.dense` needs of it (see `formed`).
        frozen: What `Method.follow` takes as constants: the solution of its equations, its order.
        error: Estimated local error, ``(*batch, n)`` or, of two estimates, ``(*batch, 2, n)``.
        norm: Its size, ``batch``; at most 1 passes.
        solved: Samples whose stage equations were solved.
        regular: Samples whose iteration matrix was.
        iterations: Of Newton's method.
    """

    state: State
    stages: tuple[Any, ...]
    frozen: tuple[Tensor, ...]
    error: Tensor
    norm: Tensor
    solved: Tensor
    regular: Tensor
    iterations: Tensor


class Method(Protocol):
    """An integrator, as pure functions: value and derivative apart, the loop outside.

    ``attempt`` computes values alone. ``follow`` repeats an accepted step differentiably, on DualTensors of any level
    or recorded by autograd, with the step size, the order and every decision held constant.
    """

    land: bool  # whether steps end at every requested time, for want of an interpolant of the method's order
    control: Controller
    error_order: int  # of the error estimate's leading term in h, less one

    def solution(self, carry: Carry) -> Tensor:
        """The value in a carry."""

    def tolerance(self, tol: Tolerance) -> Tolerance:
        """What the error estimate is held to, for the result to meet ``tol``."""

    def begin(self, field: Field, t: Tensor, y: Tensor, f: Tensor, h: Tensor) -> State:
        """The state at the start."""

    def attempt(
        self, field: Field, t: Tensor, state: State, h: Tensor, active: Tensor, tol: Tolerance, limits: Limits
    ) -> Trial:
        """One step of ``h: batch`` from ``t: batch``."""

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
        """After the decision, at the new ``t``: the state to go on from, and the factor for the step size.

        ``norm`` counts the tangents that are in the error test; ``others`` measures further errors of theirs.
        """

    def carry(self, field: Field, t: Tensor, y: Tensor, h: Tensor) -> Carry:
        """The carry at the start, differentiably."""

    def follow(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor, frozen: tuple[Tensor, ...]
    ) -> tuple[Carry, tuple[Any, ...], Callable[[], Tensor]]:
        """The step again, differentiably: the new carry, stages for `dense`, and the error estimate on demand."""

    def dense(self, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, theta: Tensor) -> Tensor:
        """The solution at ``t + theta h``, differentiably; ``h, theta: batch``."""


def held(mask: Tensor, new: Any, old: Any) -> Any:
    """New tensors where the mask is set, old ones elsewhere, in any nesting of (named) tuples."""
    if isinstance(new, Tensor):
        return torch.where(over(mask, new), new, old)
    parts = [held(mask, a, b) for a, b in zip(new, old, strict=True)]
    return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)


def formed(stages: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Stages as tensors: those that only an interpolant needs are callables until somebody interpolates."""
    return tuple(s() if callable(s) else s for s in stages)


def all_of(mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solved, regular and iterations of a method that iterates nothing."""
    yes = torch.ones_like(mask)
    return yes, yes, torch.zeros(mask.shape, dtype=torch.int64, device=like.device)
