r"""Looking for events: in which accepted step a function changes sign, and where in it.

The root on the step's interpolant is bracketed to the last bit. A method with a poor interpolant (radau) takes the step
again to the root, until it ends there: the solution at a step's end is of the method's own order.

Reference:
    Shampine, Thompson, "Event location for ordinary differential equations", 2000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, StructureError
from dualnn.solvers.bracketed import chandrupatla, shrink
from dualnn.solvers.ode.course import Aim, Course
from dualnn.solvers.ode.events import Crossing, Event
from dualnn.solvers.ode.method import Carry, Method, Trial, formed
from dualnn.solvers.ode.stats import Status
from dualnn.solvers.stats import those

RETRIES = 12  # steps taken again for one event, at most; two or three are usual


class Seen(NamedTuple):
    """What a step holds.

    Attributes:
        crossings: Events.
        stop: Time at which samples end in it, nan for the others.
        again: Samples that must take the step again, to their `Watch.target`.
    """

    crossings: tuple[Crossing, ...]
    stop: Tensor
    again: Tensor

    def shortened(self, after: Tensor, sign: Tensor) -> Tensor:
        """Up to where results count: for samples that end, the float behind their event (which is inside the step)."""
        behind = torch.nextafter(self.stop, sign * torch.inf)
        return torch.where(self.stop.isnan() | (self.stop == after), after, behind)

    def ended(self, course: Course, tried: Aim) -> Course:
        """Those that met a terminal event are done; those that take the step again have lost nothing by it."""
        stopped = ~self.stop.isnan()
        status = torch.where(self.again & (course.status != Status.MAX_STEPS), Status.RUNNING, course.status)
        return course._replace(
            status=torch.where(stopped, Status.EVENT, status),
            now=torch.where(stopped, self.stop, course.now),
            h=torch.where(stopped, tried.h, torch.where(self.again, tried.planned, course.h)),
            rejected=course.rejected - self.again.to(course.rejected),
        )


class Watch:
    """Looks for events in accepted steps, on values.

    Args:
        events: What to look for.
        fns: Their functions, as ``fn(t, y)`` for times of the batch's shape.
        t: The start, ``batch``.
        y: The solution there.
        refine: Steps must end at events.
    """

    def __init__(
        self, events: Sequence[Event], fns: Sequence[Callable[..., Tensor]], t: Tensor, y: Tensor, refine: bool
    ) -> None:
        self.events, self.fns, self.refine = events, fns, refine
        self.last = [self._value(k, t, y, torch.ones_like(t, dtype=torch.bool)) for k in range(len(events))]
        self.side = [torch.sign(g) for g in self.last]
        self.count = [torch.zeros_like(t, dtype=torch.int64) for _ in events]
        self.crossings: list[Crossing] = []
        self.target = torch.full_like(t, torch.nan)  # where a step taken again ends
        self.retries = torch.zeros_like(t, dtype=torch.int64)

    def look(
        self,
        method: Method,
        old: Carry,
        trial: Trial,
        now: Tensor,
        h: Tensor,
        after: Tensor,
        passed: Tensor,
    ) -> Seen:
        """What the samples that ``passed`` from ``now`` to ``after`` met."""
        new, end = trial.state.carry, method.solution(trial.state.carry)
        resolution = 8 * torch.finfo(h.dtype).eps * torch.maximum(now.abs(), after.abs())
        stages: tuple[Any, ...] = trial.stages
        values, found = [], []
        short = torch.full_like(h, torch.inf)  # how far an event may lie behind a step that was to end there
        for k, event in enumerate(self.events):
            g, before, side = self._value(k, after, end, passed), self.last[k], self.side[k]
            values.append(g)
            ahead = torch.where(g.abs() < before.abs(), g / (before - g), torch.inf).abs() * h.abs()
            # A step that was to end at an event, and falls short of it by less than times resolve.
            nearly = ~self.target.isnan() & (ahead <= resolution)
            meets = passed & (side != 0) & ((torch.sign(g) != side) | nearly)
            short = torch.minimum(short, ahead)
            if not bool(meets.any()):
                found.append((meets, torch.ones_like(h), meets))
                continue
            stages = formed(stages)
            theta = self._locate(k, method, (old, new, stages), now, h, meets, before, torch.where(nearly, 0.0, g))
            wanted = meets & ((side == -event.direction) if event.direction else True)
            found.append((meets, theta, wanted))
        infinite = torch.full_like(h, torch.inf)
        first = infinite
        for _, theta, wanted in found:
            first = torch.where(wanted, torch.minimum(first, theta), first)
        again = torch.zeros_like(passed)
        if self.refine:
            beyond = passed & ~self.target.isnan() & torch.isinf(first) & (short <= 0.1 * h.abs())
            first = torch.where(beyond, 1 + short / h.abs(), first)
            off = ((1 - first) * h).abs()
            again = torch.isfinite(first) & (off > resolution) & (self.retries < RETRIES)
        self.retries = torch.where(again, self.retries + 1, torch.where(passed, 0, self.retries))
        self.target = torch.where(again, now + first * h, torch.where(passed, torch.nan, self.target))
        taken = passed & ~again
        stop = infinite
        for k, event in enumerate(self.events):
            meets, theta, wanted = found[k]
            if event.terminal:
                ends = taken & wanted & (self.count[k] + 1 >= int(event.terminal))
                stop = torch.where(ends, torch.minimum(stop, theta), stop)
        crossings: list[Crossing] = []
        for k in range(len(self.events)):
            meets, theta, wanted = found[k]
            samples = taken & wanted & (theta <= stop)
            if bool(samples.any()):
                theta = torch.where(samples, theta, 1.0)
                y = torch.where((theta == 1).unsqueeze(-1), end, method.dense(old, new, formed(stages), h, theta))
                t = torch.where(theta == 1, after, now + theta * h)
                scale = torch.maximum(values[k].abs(), self.last[k].abs())
                crossings.append(Crossing(k, samples, theta, scale, t, y))
            self.count[k] = self.count[k] + samples
            side = torch.where(self.side[k] == 0, torch.sign(values[k]), self.side[k])
            self.side[k] = torch.where(taken, torch.where(meets, -self.side[k], side), self.side[k])
            self.last[k] = torch.where(taken, values[k], self.last[k])
        self.crossings += crossings
        time = torch.where(stop == 1, after, now + stop * h)
        return Seen(tuple(crossings), torch.where(torch.isfinite(stop), time, torch.nan), again)

    def _locate(
        self, k: int, method: Method, step: Any, now: Tensor, h: Tensor, meets: Tensor, before: Tensor, g: Tensor
    ) -> Tensor:
        """The root on the interpolant; 1 for samples that have none."""
        old, new, stages = step
        side = self.side[k]
        # The sign that counts at the step's start is the one since the last event: rounding does not repeat that.
        before = torch.where(before * side > 0, before, side * torch.finfo(h.dtype).tiny)

        def value(theta: Tensor) -> Tensor:
            inside = self._value(k, now + theta * h, method.dense(old, new, stages, h, theta), meets)
            return torch.where(meets, torch.where(theta <= 0, before, torch.where(theta >= 1, g, inside)), 0.0)

        low, high = torch.where(meets, 0.0, torch.ones_like(h)), torch.ones_like(h)
        return shrink(value, low, high, low / 2 + high / 2, 0.0, 100, chandrupatla)[0]

    def _value(self, k: int, t: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        g = self.fns[k](t, y)
        if not isinstance(g, Tensor) or g.shape != t.shape or g.dtype != t.dtype:
            got = f"{g.dtype} {tuple(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
            raise StructureError(f"event {k} must return one number a sample, {t.dtype} {tuple(t.shape)}: got {got}")
        bad = samples & ~torch.isfinite(g)
        if bool(bad.any()):
            where = torch.nonzero(bad.reshape(-1)).flatten().tolist()
            raise ConvergenceError(
                f"event {k} is nan or infinite for {those(where, g.numel())}, first at t = "
                f"{float(t.reshape(-1)[where[0]]):.9g}: check its function there"
            )
        return g
