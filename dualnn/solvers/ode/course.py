"""Where an integration stands, sample by sample, and how one attempted step changes that.

Pure functions of tensors, shared by the loop (`loop`) and the compiled step (`fused`): every number that may differ
from call to call is a tensor, and nothing here asks for a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualnn.solvers.ode.field import Counts
from dualnn.solvers.ode.method import Trial
from dualnn.solvers.ode.stats import OdeStats, Status


class Plan(NamedTuple):
    """What a call asks for.

    Attributes:
        start: Time, 0-dim.
        end: Likewise.
        sign: 1 or -1, of the direction of time.
        max_step: Longest step; None: no limit.
        lengths: Lengths of fixed steps, ``(S,)``; None: adaptive.
        max_steps: Attempted steps at most.
    """

    start: Tensor
    end: Tensor
    sign: Tensor
    max_step: Tensor | None
    lengths: Tensor | None
    max_steps: Tensor


class Course(NamedTuple):
    """How every sample stands, ``batch``: floating point numbers, then int64.

    Attributes:
        now: Its time.
        h: The step planned next, signed.
        last: Error norm of the last accepted step.
        taken: That step.
        steps: Accepted ones.
        rejected: By the error test.
        failures: Of Newton's method.
        iterations: Of Newton's method.
        attempts: Steps tried.
        status: `Status`.
        why: The status that a sample gets if it has to be given up now.
    """

    now: Tensor
    h: Tensor
    last: Tensor
    taken: Tensor
    steps: Tensor
    rejected: Tensor
    failures: Tensor
    iterations: Tensor
    attempts: Tensor
    status: Tensor
    why: Tensor

    def stats(self, counts: Counts) -> OdeStats:
        """The report at the end."""
        return OdeStats(
            self.steps, self.rejected, self.failures, self.iterations, self.status, self.now, self.taken,
            counts.evaluations, counts.jacobians, counts.factorisations,
        )  # fmt: skip


class Aim(NamedTuple):
    """The step about to be tried: ``h``, whether it ``lands`` on its ``target``, and what was ``planned`` before."""

    active: Tensor
    h: Tensor
    lands: Tensor
    target: Tensor
    planned: Tensor


def begun(now: Tensor, h: Tensor, status: Tensor) -> Course:
    """Before the first step."""
    none = torch.zeros_like(status)
    return Course(now, h, torch.ones_like(now), torch.zeros_like(now), *(none,) * 5, status, status)


def aim(course: Course, plan: Plan, target: Tensor) -> Aim:
    """The next step of every sample, as far as ``target`` at most; a finished one repeats a harmless one, never 0."""
    active, h, now = course.status == Status.RUNNING, course.h, course.now
    if plan.lengths is not None:
        h = plan.sign * plan.lengths[course.steps.clamp_max(len(plan.lengths) - 1)]
    elif plan.max_step is not None:
        h = plan.sign * torch.minimum(h.abs(), plan.max_step)
    remaining = target - now
    # A step that nearly reaches the target is stretched to it.
    reach = 1.01 if plan.lengths is None else 1 + torch.finfo(h.dtype).eps ** 0.5
    lands = active & (h.abs() * reach >= remaining.abs())
    tried = torch.where(lands, remaining, h)
    return Aim(active, torch.where(active & (tried != 0), tried, h), lands, target, h)


def reached(course: Course, tried: Aim) -> Tensor:
    """Where the step ends: exactly on its target if it lands."""
    return torch.where(tried.lands, tried.target, course.now + tried.h)


def judged(
    course: Course,
    tried: Aim,
    trial: Trial,
    finite: Tensor,
    passed: Tensor,
    norm: Tensor,
    done: Tensor,
    factor: Tensor,
    plan: Plan,
) -> Course:
    """After a step that ``passed``, or not: counted, with the next one planned, and hopeless samples given up.

    Args:
        course: Before it.
        tried: The step.
        trial: What came out.
        finite: Whose result is.
        passed: Which samples go on from its end.
        norm: Its error.
        done: Which samples have arrived at the end.
        factor: From h to the next step.
        plan: What was asked for.
    """
    active, h, lands, target, planned = tried
    now = torch.where(passed, reached(course, tried), course.now)
    unsolved = active & ~trial.solved
    why = torch.where(active & trial.solved & finite, Status.COLLAPSED, course.why)
    why = torch.where(active & ~finite, Status.NONFINITE, why)
    why = torch.where(unsolved & trial.regular, torch.where(finite, Status.NEWTON, Status.NONFINITE), why)
    why = torch.where(active & ~trial.regular, Status.SINGULAR, why)
    fixed = plan.lengths is not None
    new = h * torch.where(unsolved, 1.0 if fixed else 0.25, factor)
    # A step that was cut short to land says nothing against the one that was planned.
    new = torch.where(passed & lands & (planned.abs() > new.abs()), planned, new)
    new = torch.where(active, new, planned)
    eps = torch.finfo(h.dtype).eps
    span = (plan.end - plan.start).abs()
    short = new.abs() <= 4 * eps * torch.maximum(now.abs(), span * eps)
    attempts = course.attempts + active
    status = torch.where(active & done, Status.DONE, course.status)
    running = status == Status.RUNNING
    status = torch.where(running & ~passed & (True if fixed else short), why, status)
    status = torch.where(running & passed & short & ~lands, Status.COLLAPSED, status)
    status = torch.where((status == Status.RUNNING) & (attempts >= plan.max_steps), Status.MAX_STEPS, status)
    return Course(
        now,
        new,
        torch.where(passed, norm, course.last),
        torch.where(passed, h, course.taken),
        course.steps + passed,
        course.rejected + (active & trial.solved & ~passed),
        course.failures + unsolved,
        course.iterations + trial.iterations,
        attempts,
        status,
        why,
    )
