"""The loop around a method: accepts and rejects, sample by sample, and hands accepted steps on.

Values come first, on plain tensors without a graph. Who differentiates (`Follower`) gets every accepted step with its
size and stages, as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dualnn.solvers.ode.control import Tolerance, first_step
from dualnn.solvers.ode.course import Plan, aim, begun, judged, reached
from dualnn.solvers.ode.events import Crossing
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Carry, Method, Trial, held
from dualnn.solvers.ode.newton import Limits
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.outputs import Output, Outputs
from dualnn.solvers.ode.progress import Tell
from dualnn.solvers.ode.stats import OdeStats, Status
from dualnn.solvers.ode.watch import Watch


class Step(NamedTuple):
    """An accepted step: ``good`` samples moved from ``t`` by ``h`` to ``carry``; the others' entries are harmless.

    Samples that end at an event within it are not among the good ones: they stay where it began.
    """

    t: Tensor
    h: Tensor
    good: Tensor
    frozen: tuple[Tensor, ...]
    carry: tuple[Tensor, ...]
    outputs: tuple[Output, ...]
    crossings: tuple[Crossing, ...] = ()
    every: bool = False  # all samples are good

    @property
    def lengths(self) -> Tensor:
        """``h``, and next to nothing for the others: from a rejected length f may overflow, and 0 times inf is nan."""
        used = self.good
        for crossing in self.crossings:
            used = used | crossing.samples
        return torch.where(used, self.h, 1e-6 * self.h)


class Follower(Protocol):
    """Who differentiates the steps."""

    crossings: list[Crossing]  # the events that were met, differentiably

    def start(self, t: Tensor, h: Tensor) -> None:
        """Times and first steps, ``batch``."""

    def errors(self, step: Step, tol: Tolerance) -> Tensor | None:
        """Size of the tangents' error in a step that the values accept, ``batch``; None: not tested."""

    def largest(self, measure: Callable[[Carry, Tolerance], Tensor], tol: Tolerance) -> Tensor | None:
        """Of an error that ``measure`` finds in a carry: the largest in the tangents'. None: they are not tested."""

    def take(self, step: Step) -> None:
        """Go along with an accepted step."""

    def finish(self) -> Tensor:
        """The requested values, ``(T, *batch, n)``."""


def integrate(
    method: Method,
    field: Field,
    y: Tensor,
    t: Tensor,
    tol: Tolerance,
    options: Options,
    follower: Follower | None,
    watch: Callable[[Tensor, Tensor, bool], Watch] | None = None,
    tell: Tell | None = None,
) -> tuple[Tensor, OdeStats, list[Crossing]]:
    """Values at the requested times, on plain tensors.

    Shape:
        ``y: (*batch, n), t: (T,) -> (T, *batch, n)``.

    Returns:
        The values (nan after the end of samples that were given up, or that met a terminal event), the course, and
        the events that were met.
    """
    tol = method.tolerance(tol)
    plan = planned(t, options)
    now = t[0].expand(y.shape[:-1])
    f = field(now, y)
    status = torch.where(torch.isfinite(f).all(-1), Status.RUNNING, Status.NONFINITE)
    if len(t) == 1:
        status = torch.where(status == Status.RUNNING, Status.DONE, status)
    course = begun(now, first(method, field, now, y, f, plan, tol, options), status)
    if follower is not None:
        follower.start(now, course.h)
    state = method.begin(field, now, y, f, course.h)
    found = Outputs(t, y, plan.sign, now.shape)
    land = method.land if options.land is None else options.land
    limits = _limits(tol, options, torch.finfo(y.dtype).eps)
    fixed = plan.lengths is not None

    watching = watch(now, y, method.land and not fixed) if watch else None

    while True:
        target = found.wanted if land else plan.end
        if watching is not None:
            sooner = plan.sign * (watching.target - target) < 0  # not so where it is nan
            target = torch.where(sooner, watching.target, target)
        tried = aim(course, plan, target)
        active, h, now = tried.active, tried.h, course.now
        if not bool(active.any()):
            break
        if tell is not None:
            tell(now, h, active)
        trial = method.attempt(field, now, state, h, active, tol, limits)
        ends = method.solution(trial.state.carry)
        finite = torch.isfinite(trial.norm) & torch.isfinite(ends).all(-1)
        passed = active & trial.solved & finite & ((trial.norm <= 1) | fixed)
        norm = trial.norm

        if follower is not None and not fixed and bool(passed.any()):
            size = follower.errors(Step(now, h, passed, _frozen(passed, trial), (), ()), tol)
            if size is not None:
                norm = torch.where(passed, torch.maximum(norm, size), norm)
                passed = passed & (size <= 1)
        after = reached(course, tried)
        seen = None
        if watching is not None and bool(passed.any()):
            seen = watching.look(method, state.carry, trial, now, h, after, passed)
            passed = passed & ~seen.again
        after, moves = torch.where(passed, after, now), passed
        if seen is not None:
            after, moves = seen.shortened(after, plan.sign), passed & seen.stop.isnan()
        dense = partial(method.dense, state.carry, trial.state.carry, trial.stages, h)
        outputs = found.take(now, after, h, passed, ends, dense)
        every = bool(moves.all())  # then there is nothing to hold
        merged = trial.state if every else held(moves, trial.state, state)
        if follower is not None and bool(passed.any()):
            crossings = () if seen is None else seen.crossings
            frozen = trial.frozen if every else _frozen(passed, trial)
            follower.take(Step(now, h, moves, frozen, merged.carry, outputs, crossings, every))
        others = None if follower is None else partial(follower.largest, tol=tol)
        state, factor = method.adapt(field, after, trial, merged, norm, course.last, moves, tol, fixed, others)
        course = judged(course, tried, trial, finite, passed, norm, found.complete, factor, plan)
        if seen is not None:
            course = seen.ended(course, tried)
    return found.rows, course.stats(field.counts), [] if watching is None else watching.crossings


def planned(t: Tensor, options: Options) -> Plan:
    """What is asked for."""
    limit, lengths = options.max_step, options.step_size
    return Plan(
        t[0],
        t[-1],
        torch.where(t[-1] >= t[0], 1.0, -1.0).to(t),
        None if limit is None else t.new_tensor(limit),
        None if lengths is None else torch.as_tensor(lengths, dtype=t.dtype, device=t.device).reshape(-1),
        torch.tensor(options.max_steps, device=t.device),
    )


def first(
    method: Method, field: Field, now: Tensor, y: Tensor, f: Tensor, plan: Plan, tol: Tolerance, options: Options
) -> Tensor:
    """The first step of every sample, signed."""
    span = plan.end - plan.start
    if plan.lengths is not None:
        return (plan.sign * plan.lengths[0]).expand_as(now)
    if options.first_step is not None:
        return (plan.sign * span.abs().clamp_max(options.first_step)).expand_as(now)
    slope = field.slope(now, y, f)
    h = first_step(field.slope, now, y, slope, span.expand_as(now), method.error_order, tol)
    return torch.where(torch.isfinite(h) & (h != 0), h, plan.sign * 1e-6)


def _frozen(passed: Tensor, trial: Trial) -> tuple[Tensor, ...]:
    """What the derivative needs; zeros, which are harmless, for samples that stay."""
    return held(passed, trial.frozen, tuple(map(torch.zeros_like, trial.frozen)))


def _limits(tol: Tolerance, options: Options, eps: float) -> Limits:
    rtol = tol.rtol.min()
    if options.newton_tol is not None:
        return Limits(torch.full_like(rtol, options.newton_tol))
    if options.step_size is not None:  # as exactly as the dtype gives
        return Limits(20 * eps / rtol, 50)
    return Limits(torch.maximum(10 * eps / rtol, torch.clamp_max(rtol.sqrt(), 0.03)))
