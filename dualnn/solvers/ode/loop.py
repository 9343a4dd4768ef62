"""The loop around a method: accepts and rejects, sample by sample, and hands accepted steps on.

Values come first, on plain tensors without a graph. Who differentiates (`Follower`) gets every accepted step with its
size and stages, as constants.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dualnn.solvers.ode.control import Tolerance, first_step
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Method, Trial, held
from dualnn.solvers.ode.newton import Limits
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.stats import OdeStats, Status


class Output(NamedTuple):
    """A requested time that some samples passed in a step."""

    row: int
    samples: Tensor
    theta: Tensor
    value: Tensor


class Step(NamedTuple):
    """An accepted step: ``good`` samples moved from ``t`` by ``h`` to ``carry``; the others' entries are harmless."""

    t: Tensor
    h: Tensor
    good: Tensor
    frozen: tuple[Tensor, ...]
    carry: tuple[Tensor, ...]
    outputs: tuple[Output, ...]

    @property
    def lengths(self) -> Tensor:
        """``h``, and next to nothing for the others: from a rejected length f may overflow, and 0 times inf is nan."""
        return torch.where(self.good, self.h, 1e-6 * self.h)


class Follower(Protocol):
    """Who differentiates the steps."""

    def start(self, t: Tensor, h: Tensor) -> None:
        """Times and first steps, ``batch``."""

    def errors(self, step: Step, tol: Tolerance) -> Tensor | None:
        """Size of the tangents' error in a step that the values accept, ``batch``; None: not tested."""

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
) -> tuple[Tensor, OdeStats]:
    """Values at the requested times, on plain tensors.

    Shape:
        ``y: (*batch, n), t: (T,) -> (T, *batch, n)``.

    Returns:
        The values (nan after the end of samples that were given up), and the course.
    """
    tol = method.tolerance(tol)
    batch, count = y.shape[:-1], len(t)
    whole = torch.ones(batch, dtype=y.dtype, device=y.device)
    now, end = t[0] * whole, t[-1]
    sign = 1.0 if float(end) >= float(t[0]) else -1.0
    f = field(now, y)
    status = torch.where(torch.isfinite(f).all(-1), Status.RUNNING, Status.NONFINITE)
    if count == 1:
        status = torch.where(status == Status.RUNNING, Status.DONE, status)
    fixed = options.step_size is not None
    lengths = None if options.step_size is None else torch.as_tensor(options.step_size, dtype=y.dtype).reshape(-1)
    if lengths is not None:
        h = sign * lengths[0] * whole
    elif options.first_step is not None:
        h = sign * min(options.first_step, abs(float(end - t[0]))) * whole
    else:
        h = first_step(field, now, y, f, (end - t[0]) * whole, method.error_order, tol)
        h = torch.where(torch.isfinite(h) & (h != 0), h, sign * 1e-6)
    if follower is not None:
        follower.start(now, h)
    state = method.begin(field, now, y, f, h)
    rows = [y, *(torch.full_like(y, torch.nan) for _ in range(count - 1))]
    cursor = torch.ones(batch, dtype=torch.int64, device=y.device)
    steps = rejected = failures = iterations = attempts = torch.zeros_like(cursor)
    last = whole
    taken, why = torch.zeros_like(h), status
    land = method.land if options.land is None else options.land
    eps = torch.finfo(y.dtype).eps
    limits = _limits(tol, options, eps)

    while True:
        active = status == Status.RUNNING
        if not bool(active.any()):
            break
        if lengths is not None:
            h = sign * lengths[steps.clamp_max(len(lengths) - 1)]
        elif options.max_step is not None:
            h = sign * torch.clamp_max(h.abs(), options.max_step)
        target = t[cursor.clamp_max(count - 1)] if land else end
        remaining = target - now
        # A step that nearly reaches the target is stretched to it. (A finished sample keeps its harmless step.)
        lands = active & (h.abs() * (1 + eps**0.5 if fixed else 1.01) >= remaining.abs())
        planned, h = h, torch.where(lands, remaining, h)
        h = torch.where(active & (h != 0), h, planned)
        trial = method.attempt(field, now, state, h, active, tol, limits)
        ends = method.solution(trial.state.carry)
        finite = torch.isfinite(trial.norm) & torch.isfinite(ends).all(-1)
        passed = active & trial.solved & finite & ((trial.norm <= 1) | fixed)
        norm = trial.norm
        reached = torch.where(lands, target, now + h)

        if follower is not None and bool(passed.any()) and not fixed:
            size = follower.errors(Step(now, h, passed, _frozen(passed, trial), (), ()), tol)
            if size is not None:
                norm = torch.where(passed, torch.maximum(norm, size), norm)
                passed = passed & (size <= 1)
        outputs: list[Output] = []
        after = torch.where(passed, reached, now)
        if bool(passed.any()):
            while True:
                wanted = t[cursor.clamp_max(count - 1)]
                crossed = passed & (cursor < count) & (sign * (after - wanted) >= 0)
                if not bool(crossed.any()):
                    break
                theta = torch.where(lands & (wanted == target), 1.0, (wanted - now) / h)
                value = method.dense(state.carry, trial.state.carry, trial.stages, h, theta)
                value = torch.where((theta == 1).unsqueeze(-1), ends, value)
                for row in torch.unique(cursor[crossed]).tolist():
                    here = crossed & (cursor == row)
                    rows[row] = torch.where(here.unsqueeze(-1), value, rows[row])
                    outputs.append(Output(row, here, theta, value))
                cursor = cursor + crossed
        merged = held(passed, trial.state, state)
        if follower is not None and bool(passed.any()):
            follower.take(Step(now, h, passed, _frozen(passed, trial), merged.carry, tuple(outputs)))
        state, factor = method.adapt(field, after, trial, merged, norm, last, passed, tol, fixed)
        attempts = attempts + active
        steps = steps + passed
        iterations = iterations + trial.iterations
        unsolved = active & ~trial.solved
        failures = failures + unsolved
        rejected = rejected + (active & trial.solved & ~passed)
        why = torch.where(active & trial.solved & finite, Status.COLLAPSED, why)
        why = torch.where(active & ~finite, Status.NONFINITE, why)
        why = torch.where(unsolved & trial.regular, torch.where(finite, Status.NEWTON, Status.NONFINITE), why)
        why = torch.where(active & ~trial.regular, Status.SINGULAR, why)
        last = torch.where(passed, norm, last)
        taken = torch.where(passed, h, taken)
        factor = torch.where(unsolved, 0.25 if options.step_size is None else 1.0, factor)
        new = h * factor
        # A step that was cut short to land says nothing against the one that was planned.
        new = torch.where(passed & lands & (planned.abs() > new.abs()), planned, new)
        h = torch.where(active, new, planned)
        now = after
        status = torch.where(active & (cursor >= count), Status.DONE, status)
        running = status == Status.RUNNING
        short = h.abs() <= 4 * eps * torch.maximum(now.abs(), (end - t[0]).abs() * eps)
        status = torch.where(running & ~passed & (short | fixed), why, status)
        status = torch.where(running & passed & short & ~lands, Status.COLLAPSED, status)
        status = torch.where((status == Status.RUNNING) & (attempts >= options.max_steps), Status.MAX_STEPS, status)

    stats = OdeStats(
        steps, rejected, failures, iterations, status, now, taken,
        field.counts.evaluations, field.counts.jacobians, field.counts.factorisations,
    )  # fmt: skip
    return torch.stack(rows), stats


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
