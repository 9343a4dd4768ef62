r"""Events: when :math:`g(t, y(t, p), p)` passes through zero, with the derivative of time and state.

A step in which g changes sign holds an event, at the root :math:`\theta` of g on the step's interpolant. Both it and
the state there obey the implicit function theorem,

.. math::

   \dot\theta = -\frac{g_t\,\dot t_n + g_y\,\dot{\hat y}(\theta) + g_p\,\dot p}{h\,g_t + g_y\,\hat y'(\theta)},
   \qquad t_e = t_n + \theta h, \qquad y_e = \hat y(\theta),

with :math:`\hat y` the interpolant, whose own coefficients move. A method with a poor interpolant (radau) takes the
step again to the root, until it ends there; the interpolant's value and slope at the end are those of the solution.

Reference:
    Hiskens, Pai, "Trajectory sensitivity analysis of hybrid systems", IEEE Trans. Circuits Syst. I 47, 2000; Shampine,
    Thompson, "Event location for ordinary differential equations", 2000; in neural ODEs: Chen, Amos, Nickel, 2021,
    arXiv 2011.03902.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, DualInputError, SingularMatrixError, StructureError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.bracketed import chandrupatla, shrink
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.ode.course import Aim, Course
from dualnn.solvers.ode.method import Carry, Method, Trial, formed
from dualnn.solvers.ode.stats import Status
from dualnn.solvers.stats import those

RETRIES = 12  # steps taken again for one event, at most; two or three are usual


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to watch for.

    Attributes:
        fn: ``fn(t, y, *args) -> (*batch,)``, with the arguments of the right-hand side: zero at the event.
        terminal: Whether a sample ends there; a number: at that occurrence.
        direction: 1: only where ``fn`` rises, -1: only where it falls, 0: both.
        required: Raise for samples without an occurrence.
    """

    fn: Callable[..., Tensor]
    terminal: bool | int = False
    direction: int = 0
    required: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise DualInputError(f"an event must be a function event(t, y, *args), got {type(self.fn).__name__}")
        if self.direction not in (-1, 0, 1):
            raise DualInputError(f"an event's direction must be -1, 0 or 1, got {self.direction!r}")
        if self.terminal < 0:
            raise DualInputError(f"an event's terminal must be a bool or a number of occurrences, got {self.terminal}")

    @classmethod
    def of(cls, given: Any) -> Event:
        """From an event, or a function that may have scipy's attributes ``terminal`` and ``direction``."""
        if isinstance(given, Event):
            return given
        direction = getattr(given, "direction", 0)
        return cls(given, getattr(given, "terminal", False), (direction > 0) - (direction < 0))


def events_of(given: Any) -> tuple[tuple[Event, ...], bool]:
    """What a user asks for, and whether it was one alone."""
    if given is None:
        return (), False
    if isinstance(given, (tuple, list)):
        return tuple(map(Event.of, given)), False
    return (Event.of(given),), True


class Occurrences(NamedTuple):
    """The occurrences of one event, in the order in which they come; nan where a sample has no (more) of them.

    Attributes:
        t: Times, ``(M, *batch)``: M is the largest number of occurrences of any sample, and at least 1.
        y: States, ``(M, *batch, n)``.
        counts: How many each sample has, ``batch``.
    """

    t: Tensor
    y: Tensor
    counts: Tensor


class Crossing(NamedTuple):
    """Samples that met an event in a step: at ``t + theta h`` of it; the others' entries are harmless.

    Attributes:
        event: Which.
        samples: Mask, ``batch``.
        theta: Where in the step.
        scale: The largest value of the event's function at the step's ends.
        t: When.
        y: The state there.
    """

    event: int
    samples: Tensor
    theta: Tensor
    scale: Tensor
    t: Tensor
    y: Tensor


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


class _Slope:
    """Division by the derivative of an event's function along the step."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def solve(self, rhs: Tensor) -> Tensor:
        """The quotient."""
        return rhs / self.slope

    solve_transposed = solve


def crossed(
    fn: Callable[..., Tensor],
    method: Method,
    args: Sequence[Any],
    t: Tensor,
    old: Carry,
    new: Carry,
    stages: tuple[Any, ...],
    h: Tensor,
    crossing: Crossing,
) -> tuple[Tensor, Tensor]:
    """Time and state of a known event, differentiably in the step that holds it and in the arguments.

    Raises:
        SingularMatrixError: The function touches zero without a slope: the event's time has no derivative.
    """
    parts = (*old, *new, *formed(stages))
    ends = len(old), len(old) + len(new), len(parts)

    def state(theta: Tensor, rest: tuple[Any, ...]) -> Tensor:
        return method.dense(rest[: ends[0]], rest[ends[0] : ends[1]], rest[ends[1] : ends[2]], h, theta)

    def residual(theta: Tensor, t: Tensor, *rest: Any) -> Tensor:
        g = fn(t + theta * h, state(theta, rest), *rest[ends[2] :])
        return torch.where(crossing.samples, g, theta - crossing.theta)

    def linearise(theta: Tensor, t: Tensor, *rest: Any) -> _Slope:
        value, tan = push(lambda x: residual(x, t, *rest), (theta,), [Dense(torch.ones_like(theta).unsqueeze(0))])
        slope: Any = dense_of(tan, value)
        flat = ~(slope[0].abs() > torch.finfo(h.dtype).eps ** 0.5 * crossing.scale) & crossing.samples
        if bool(flat.any()):
            where = torch.nonzero(flat.reshape(-1)).flatten().tolist()
            raise SingularMatrixError(
                f"event {crossing.event} has no derivative for {those(where, flat.numel())}: at t = "
                f"{float(crossing.t.reshape(-1)[where[0]]):.9g} its function has no slope in time (it touches zero, or "
                "is a step function). Watch a function that crosses zero, or differentiate without this event."
            )
        return _Slope(slope[0])

    theta = implicit(Problem(residual, lambda *_: (crossing.theta, None), linearise), t, *parts, *args)
    return t + theta * h, state(theta, parts)


def gathered(events: Sequence[Event], crossings: Sequence[Crossing], y: Tensor) -> list[Occurrences]:
    """All occurrences of each event; ``t`` and ``y`` of the crossings may be differentiable. ``y``: the start."""
    batch = y.shape[:-1]
    out = []
    for k in range(len(events)):
        mine = [c for c in crossings if c.event == k]
        if not mine:
            nan = torch.full((1, *y.shape), torch.nan, dtype=y.dtype, device=y.device)
            out.append(Occurrences(nan[..., 0], nan, torch.zeros(batch, dtype=torch.int64, device=y.device)))
            continue
        mask = torch.stack([c.samples for c in mine])
        count = mask.sum(0)
        most = int(count.max())
        first = torch.argsort(~mask, dim=0, stable=True)[:most]
        there = torch.arange(most, device=y.device).reshape(-1, *(1,) * len(batch)) < count
        t = torch.stack([c.t for c in mine]).gather(0, first)
        wide = first.unsqueeze(-1).expand(*first.shape, y.shape[-1])
        states = torch.stack([c.y for c in mine]).gather(0, wide)
        out.append(
            Occurrences(torch.where(there, t, torch.nan), torch.where(there.unsqueeze(-1), states, torch.nan), count)
        )
    return out


def missing(events: Sequence[Event], found: Sequence[Occurrences]) -> None:
    """Raise for events that must occur and did not."""
    for k, (event, got) in enumerate(zip(events, found, strict=True)):
        lost = got.counts == 0
        if event.required and bool(lost.any()):
            where = torch.nonzero(lost.reshape(-1)).flatten().tolist()
            raise ConvergenceError(
                f"event {k} does not occur for {those(where, lost.numel())} up to the last time asked for: integrate "
                "further, or watch for something else (required=False gives nan)"
            )
