"""Backpropagation through the accepted steps, linearised again in backward: no graph is kept.

Steps are gathered in segments. Of each segment backward keeps its first carry and, for every step, its time, length and
stages; it repeats the segment's steps with a graph, backpropagates, and drops the graph again. So memory is a few n for
a step, and gradients are those of the discrete solution to rounding. Differentiated again, they are recorded in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge import save, saved
from dualnn.engine.dual_tensor import primal_of
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.ode.crossing import crossed
from dualnn.solvers.ode.events import Crossing
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.follow import interpolated, moving, shifted
from dualnn.solvers.ode.loop import Step
from dualnn.solvers.ode.method import Carry, Method, held

SEGMENT = 32


class Reverse:
    """Gathers steps in segments, each one node of autograd's graph.

    Args:
        method: The integrator.
        field: The right-hand side with its arguments as they were given.
        y: The start, likewise.
        t: The requested times, likewise.
        events: Functions of the events, with the right-hand side's arguments.
    """

    def __init__(
        self, method: Method, field: Field, y: Tensor, t: Tensor, events: Sequence[Callable[..., Tensor]] = ()
    ) -> None:
        self.method, self.field, self.move, self.events = method, field, moving(t), events
        self.crossings: list[Crossing] = []
        self.rows: list[Tensor] = [y, *(torch.full_like(y.detach(), torch.nan) for _ in range(len(t) - 1))]
        self.carry: Carry = ()
        self._steps: list[Step] = []

    def start(self, t: Tensor, h: Tensor) -> None:
        """The carry before the first step."""
        with torch.enable_grad():
            self.carry = self.method.carry(self.field, shifted(t, self.move), self.rows[0], h)

    def errors(self, step: Step, tol: Tolerance) -> None:
        """There are no tangents."""

    def largest(self, measure: Callable[[Carry, Tolerance], Tensor], tol: Tolerance) -> None:
        """There are no tangents."""

    def take(self, step: Step) -> None:
        """Keep it."""
        self._steps.append(step)
        if len(self._steps) == SEGMENT:
            self._close()

    def finish(self) -> Tensor:
        """All requested values, ``(T, *batch, n)``."""
        if self._steps:
            self._close()
        with torch.enable_grad():
            return torch.stack(self.rows)

    def _close(self) -> None:
        segment = _Segment(self.method, self.field, self._steps, len(self.carry), self.move is not None, self.events)
        inputs = (*self.carry, *(() if self.move is None else (self.move,)), *self.field.args)
        with torch.enable_grad():
            found = _Node.apply(segment, *inputs)  # type: ignore[no-untyped-call]
            self.carry, rest = found[: len(self.carry)], iter(found[len(self.carry) :])
            for outputs, crossings in segment.asked:
                for output in outputs:
                    value = next(rest)
                    self.rows[output.row] = torch.where(output.samples.unsqueeze(-1), value, self.rows[output.row])
                self.crossings += [c._replace(t=next(rest), y=next(rest)) for c in crossings]
        self._steps = []


class _Segment:
    """Some steps, packed: thousands of small tensors cost more than their numbers."""

    def __init__(
        self,
        method: Method,
        field: Field,
        steps: Sequence[Step],
        width: int,
        moves: bool,
        events: Sequence[Callable[..., Tensor]],
    ) -> None:
        self.method, self.field, self.width, self.moves, self.events = method, field.at(()), width, moves, events
        self.asked = [(step.outputs, step.crossings) for step in steps]
        self._packed = [torch.stack(x) for x in zip(*((s.t, s.lengths, s.good, *s.frozen) for s in steps), strict=True)]
        inside = [
            x for s in steps for x in (*(o.value for o in s.outputs), *(z for c in s.crossings for z in (c.t, c.y)))
        ]
        self.values: tuple[Tensor, ...] | None = (*steps[-1].carry, *inside)

    def run(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The steps again, differentiably: the carry at their end, and what was asked for in each."""
        carry, rest = inputs[: self.width], inputs[self.width :]
        move, args = (rest[0], rest[1:]) if self.moves else (None, rest)
        field = self.field.at(args)
        values: list[Tensor] = []
        for (t, h, good, *frozen), asked in zip(zip(*self._packed, strict=True), self.asked, strict=True):
            start = shifted(t, move)
            new, stages, _ = self.method.follow(field, start, carry, h, tuple(frozen))
            outputs, crossings = asked
            values += [interpolated(self.method, carry, new, stages, h, o, move) for o in outputs]
            for c in crossings:
                values += crossed(self.events[c.event], self.method, field.args, start, carry, new, stages, h, c)
            carry = held(good, new, carry)
        return (*carry, *values)


class _Node(torch.autograd.Function):
    """A segment's values are known; its gradients come from running it again."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: D102
        ctx.segment = segment
        save(ctx, inputs)
        values, segment.values = segment.values, None
        return tuple(v.clone() for v in values or ())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        inputs, _ = saved(ctx)
        again = torch.is_grad_enabled()
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        with torch.enable_grad():
            # Fresh aliases: what else depends on these tensors must count as constant here.
            fresh = list(inputs)
            for i in wanted:
                x = inputs[i]
                fresh[i] = x.view_as(x) if again and x.requires_grad else primal_of(x).detach().requires_grad_()
            found = ctx.segment.run(*fresh)
            reached = [(y, g) for y, g in zip(found, grads, strict=True) if y.requires_grad]
            if not reached:
                return None, *[None] * len(inputs)
            pulled = torch.autograd.grad(
                [y for y, _ in reached],
                [fresh[i] for i in wanted],
                [g for _, g in reached],
                create_graph=again,
                allow_unused=True,
            )
        out: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(wanted, pulled, strict=True):
            out[i] = g
        return None, *out
