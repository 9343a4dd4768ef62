r"""The loop around a compiled step: one program for a whole attempted step, its decision and its derivative included.

An adaptive step of a small system is hundreds of tensor operations on a few numbers each, so it costs what calling them
costs. Here it is recorded once, with value and K directions side by side as ``(1 + K, *batch, n)``, and compiled. All
that differs from call to call is an argument: tolerances, times, step sizes. Samples that are rejected or have finished
are held by selection. The loop outside asks two things only: does anybody go on, and was a requested time passed.

On a CPU most small systems become one C++ function without a tensor in it (`engine.entrywise`), which takes steps until
one of the answers changes. What a program does not carry (second order, reverse mode) follows as it does beside the
ordinary loop, from the values that the program found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from dualnn.engine.compiling import compile, module_of
from dualnn.engine.dual_tensor import DualTensor, make, primal_of, split
from dualnn.engine.entrywise import entrywise
from dualnn.engine.levels import fresh_level
from dualnn.engine.parameters import swapped
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import push
from dualnn.engine.written import Written
from dualnn.solvers.factors import refuse_mixing
from dualnn.solvers.fused import OPTIONS, programs_of, weakly
from dualnn.solvers.ode.along import apart, single
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.ode.course import Course, Plan, aim, begun, judged
from dualnn.solvers.ode.field import Counts, Field
from dualnn.solvers.ode.follow import moving
from dualnn.solvers.ode.loop import Follower, Step, first, planned
from dualnn.solvers.ode.method import Carry, Method, State, Trial
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.outputs import Outputs
from dualnn.solvers.ode.stats import OdeStats, Status

FLOATS = 4  # of the numbers in a Course
CHANGING = 4  # inputs of a program that change from step to step; the others are constant
GUESSES = 8  # at which arguments differ from sample to sample
AT_ONCE = 1000  # steps of a C++ program, which Python cannot interrupt
EVERY = 8  # steps of a program of many kernels before it is asked how it stands: a GPU's answer costs some of them


@runtime_checkable
class Straight(Method, Protocol):
    """A method whose step is one straight program."""

    def straight(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor
    ) -> tuple[Carry, tuple[Any, ...], Tensor, Tensor]:
        """Value and derivative at once: the new carry, the stages, the error estimate, and whose matrix is regular."""


def integrate(
    fn: Callable[..., Tensor],
    args: Sequence[Any],
    method: Straight,
    field: Field,
    y0: Tensor,
    t: Tensor,
    tol: Tolerance,
    options: Options,
    sizes: Tensor | None,
    follower: Follower | None,
) -> tuple[Tensor, OdeStats] | None:
    """As `loop.integrate`, with directions of one level carried along; None where there is no program, which was said.

    Args:
        fn: As the user gave it; a module's parameters and buffers are found in it.
        args: Likewise.
        method: The integrator.
        field: The same right-hand side on plain arguments.
        y0: The start, with its directions.
        t: The requested times, likewise.
        tol: As in `loop.integrate`.
        options: Likewise.
        sizes: As in `follow.Forward`: tangents take part in the error test.
        follower: Who differentiates; None: nobody, or the program itself.

    Returns:
        The values at the requested times, with their directions, and the course.
    """
    tol = method.tolerance(tol)
    held = tensors_of(fn)
    given = (*held, *args)
    level = single((y0, t, *given)) if follower is None else 0
    num = next((v.num_tangents for v in (y0, t, *given) if isinstance(v, DualTensor)), 0) if level else 0
    whole, times = together(y0, level, num), primal_of(t).detach()
    move = moving(t) if level else None
    shift = None if move is None else apart(move, level, num)[1]
    y, now = whole[0], times[0].expand(whole.shape[1:-1])
    plan, batched = planned(times, options), y.dim() > 1

    known = _known(fn, method, tol.norm, batched, bool(options.land))
    if batched and len(y) > 1 and y.shape not in known.checked:
        refuse_mixing(partial(field, now), y)
        known.checked.add(y.shape)
    f = field(now, y)
    status = torch.where(torch.isfinite(f).all(-1), Status.RUNNING, Status.NONFINITE)
    if len(times) == 1:
        status = torch.where(status == Status.RUNNING, Status.DONE, status)
    course = begun(now, first(method, field, now, y, f, plan, tol, options), status)
    outputs = Outputs(times, whole, plan.sign, now.shape)
    outputs.rows[1:, 1:] = 0  # what was never reached has no derivative
    settings = Settings(*plan, tol.rtol, tol.atol, sizes, None if shift is None else shift[:, 0])
    state = [batch_last(whole, batched), torch.stack(course[:FLOATS]), torch.stack(course[FLOATS:])]
    found = known.prepared((*state, outputs.wanted, settings), given, level, len(y) if batched else 0, fn)
    if found is None:
        return None
    run, constant = found
    if follower is not None:
        follower.start(now, course.h)

    most = AT_ONCE if isinstance(run, Written) else 1 if options.land else EVERY
    most = 1 if follower is not None else most  # a step that has to end at a requested time needs the next one at once
    wanted, running, spent = outputs.wanted, bool((status == Status.RUNNING).any()), 0
    while running:
        taken, flags, count = _several(run, state, [wanted, *constant], most)
        state, spent = taken[-1].new, spent + count
        running, crossed = flags.reshape(2, -1).any(1).tolist()
        if crossed or follower is not None:
            for one in taken:
                one.enter(method, outputs, shift, follower)
            wanted = outputs.wanted
    for name in ("evaluations", "jacobians", "factorisations"):
        setattr(field.counts, name, getattr(field.counts, name) + spent * getattr(known.step.counts, name))
    value, moved = outputs.rows[:, 0], outputs.rows[:, 1:].movedim(1, 0)
    return make(value, Dense(moved), level) if num else value, Course(*state[1], *state[2]).stats(field.counts)


class Settings(NamedTuple):
    """Numbers that a program is given: those of a `Plan`, the tolerances, and how much the start of time moves."""

    start: Tensor
    end: Tensor
    sign: Tensor
    max_step: Tensor | None
    lengths: Tensor | None
    max_steps: Tensor
    rtol: Tensor
    atol: Tensor
    sizes: Tensor | None
    shift: Tensor | None

    @property
    def plan(self) -> Plan:
        """What is asked for."""
        return Plan(*self[:6])


class _Taken(NamedTuple):
    """A run of the program: the state before and after it, and the last step's stages."""

    old: list[Tensor]
    new: list[Tensor]
    stages: Tensor

    def enter(self, method: Method, outputs: Outputs, shift: Tensor | None, follower: Follower | None) -> None:
        """Results at the requested times that the step passed, and the follower's share."""
        (start, before, counts), (end, after, counted) = self.old, self.new
        old, new, u = (batch_first(x, before.dim() > 1) for x in (start, end, self.stages))
        now, passed = before[0], counted[0] > counts[0]
        h = torch.where(passed, after[3], before[1])
        found = outputs.take(now, after[0], h, passed, new, partial(method.dense, (old,), (new,), (u,), h))
        for output in found:
            if shift is None:
                break
            ones = Dense(output.theta.new_ones(1, *output.theta.shape))
            _, slope = push(partial(method.dense, (old[0],), (new[0],), (u[0],), h), (output.theta,), [ones])
            moved = (shift[:, output.row] - shift[:, 0]).reshape(-1, *(1,) * new[0].dim())
            per_time = torch.where(output.samples.unsqueeze(-1), slope.dense()[0] / h.unsqueeze(-1), 0.0)
            outputs.rows[output.row, 1:] += per_time * moved
        if follower is not None and bool(passed.any()):
            frozen = torch.where(passed[..., None, None], u[0], 0.0)
            plain = tuple(o._replace(value=o.value[0]) for o in found)
            follower.take(Step(now, h, passed, (frozen,), (new[0],), plain))


def _several(
    run: Callable[..., Sequence[Tensor]], state: list[Tensor], rest: list[Tensor], most: int
) -> tuple[list[_Taken], Tensor, int]:
    """Steps that may be taken before somebody has to look: those of interest, the answers, and how many they were."""
    if isinstance(run, Written):
        count, old, (*new, stages, flags) = run.repeat([*state, *rest], len(state), most)
        return [_Taken(old, new, stages)], flags, count
    taken, crossed = [], []
    for _ in range(most):
        old = state
        *state, stages, flags = run(*state, *rest)
        taken.append(_Taken(old, state, stages))
        crossed.append(flags[1])
    return taken, torch.stack([flags[0], torch.stack(crossed).any(0)]), most


class _Known:
    """The programs of one function and method."""

    def __init__(self, step: _Step) -> None:
        self.step, self.program = step, compile(step, backend=step.build)
        self.checked: set[torch.Size] = set()  # batches in which samples do not mix

    def prepared(
        self, numbers: tuple[Any, ...], given: Sequence[Any], level: int, batch: int, fn: Callable
    ) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]] | None:
        """The program, and its inputs behind the first four, which change from step to step."""
        parts = [split(v, level) if level else (primal_of(v), None) for v in given]
        wide = [batch > 0 and isinstance(v, Tensor) and v.dim() > 0 and len(v) == batch for v, _ in parts]
        values = [
            batch_last(v.detach(), w, 0) if isinstance(v, Tensor) else v for (v, _), w in zip(parts, wide, strict=True)
        ]
        tangents = [None if d is None else batch_last(d.dense(), w) for (_, d), w in zip(parts, wide, strict=True)]
        kinds = zip((*values, *tangents), (*wide, *wide), strict=True)
        changing = [batch > 0] * CHANGING + [False] * sum(x is not None for x in numbers[4])
        self.step.batched = changing + [w for v, w in kinds if isinstance(v, Tensor)]
        module = module_of(fn)
        mode = () if module is None else tuple(m.training for m in module.modules())
        found = self.program.prepared((*numbers, values, tangents, tuple(wide), mode))
        return None if found is None else (found[0], found[1][CHANGING:])


def _known(fn: Callable, method: Straight, *more: Any) -> _Known:
    programs, key = programs_of(fn), ("odeint", method, *more)
    if key not in programs:
        programs[key] = _Known(_Step(fn, method, *more))
    return programs[key]


class _Step:
    """What is recorded. Holds ``fn`` weakly, for the table of programs must not keep it alive."""

    def __init__(self, fn: Callable[..., Tensor], method: Straight, norm: str, batched: bool, land: bool) -> None:
        self.fn, self.method, self.norm, self.many, self.land = weakly(fn), method, norm, batched, land
        self.counts = Counts()
        self.batched: list[bool] = []  # of the tensors it is called with, whether their last axis is the batch
        self.__name__ = self.__qualname__ = getattr(fn, "__qualname__", type(fn).__name__)

    def build(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """One C++ function of numbers if it can be written, else what inductor makes of the tensors."""
        if all(x.device.type == "cpu" for x in inputs):
            # An argument as long as the batch may still be the same for all samples.
            doubtful = [i for i, b in enumerate(self.batched) if b and i >= CHANGING]
            for shared in islice(product((False, True), repeat=len(doubtful)), GUESSES):
                batched = list(self.batched)
                for i, one_for_all in zip(doubtful, shared, strict=True):
                    batched[i] = not one_for_all
                if (program := entrywise(graph, batched)) is not None:
                    return program
        return torch._inductor.compile(graph, list(inputs), options=OPTIONS)

    def __call__(
        self,
        whole: Tensor,
        floats: Tensor,
        integers: Tensor,
        wanted: Tensor,
        settings: Settings,
        values: list[Any],
        tangents: list[Tensor | None],
        wide: tuple[bool, ...],
        mode: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        """The state after one attempted step, its stages, and whether each sample goes on, and passed what it wanted.

        Shape:
            ``whole: (1 + K, n, *batch), floats: (4, *batch), integers: (7, *batch), wanted: batch``; stages
            ``(1 + K, n, s, *batch)``, answers ``(2, *batch)``.
        """
        whole = batch_first(whole, self.many)
        plan, tol = settings.plan, Tolerance(settings.rtol, settings.atol, self.norm)
        course = Course(*floats, *integers)
        target = wanted if self.land else plan.end.expand_as(wanted)
        tried = aim(course, plan, target)
        end, u, error, regular = self._tried(whole, course.now, tried.h, settings.shift, values, tangents, wide)
        norm = tol.measure(error[0], tol.scale(whole[0], end[0]))
        trial = Trial(State((end,)), (u,), (u,), error, norm, regular, regular, torch.zeros_like(course.steps))
        finite = torch.isfinite(norm) & torch.isfinite(end[0]).all(-1)
        fixed = plan.lengths is not None
        passed = tried.active & regular & finite & ((norm <= 1) | fixed)
        if settings.sizes is not None and not fixed:
            size = tol.of_directions(settings.sizes, whole[1:], end[1:], error[1:])
            norm = torch.where(passed, torch.maximum(norm, size), norm)
            passed = passed & (size <= 1)
        factor = self.method.control.factor(norm, course.last, passed)
        done = passed & tried.lands & (target == plan.end)
        new = judged(course, tried, trial, finite, passed, norm, done, factor, plan)
        crossed = passed & (plan.sign * (new.now - wanted) >= 0)
        return (
            batch_last(torch.where(passed.unsqueeze(-1), end, whole), self.many),
            torch.stack(new[:FLOATS]),
            torch.stack(new[FLOATS:]),
            batch_last(u, self.many),
            torch.stack([new.status == Status.RUNNING, crossed]),
        )

    def _tried(
        self,
        whole: Tensor,
        now: Tensor,
        h: Tensor,
        shift: Tensor | None,
        values: list[Any],
        tangents: list[Tensor | None],
        wide: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """End, stages and error estimate, values and directions together, and whose matrix is regular."""
        fn = self.fn()
        assert fn is not None, "a program is only used by calls that hold its function"
        held = tensors_of(fn)
        module = module_of(fn) or nn.Module()

        def rhs(t: Tensor, y: Tensor, *args: Any) -> Tensor:
            with swapped(module, dict(zip(held, args, strict=False))):
                return fn(t, y, *args[len(held) :])

        num = len(whole) - 1
        with fresh_level() as level:

            def dual(value: Any, tan: Tensor | None) -> Any:
                return value if tan is None else make(value, Dense(tan), level)

            args = [
                dual(batch_first(v, w, 0), None if d is None else batch_first(d, w))
                for v, d, w in zip(values, tangents, wide, strict=True)
            ]
            y = dual(whole[0], whole[1:] if num else None)
            if shift is not None:
                shift = shift.reshape(-1, *(1,) * now.dim()).expand(-1, *now.shape)
            self.counts = Counts()
            (end,), (u,), error, regular = self.method.straight(
                Field(rhs, args, self.counts), dual(now, shift), (y,), h
            )
            return together(end, level, num), together(u, level, num), together(error, level, num), regular


def tensors_of(fn: Callable) -> list[Tensor]:
    """Parameters and buffers of a module, or of the module that a method belongs to."""
    module = module_of(fn)
    return [] if module is None else [*module.parameters(), *module.buffers()]


def together(x: Any, level: int, num: int) -> Tensor:
    """Value and directions as one tensor ``(1 + num, *shape)``."""
    if not num:
        return primal_of(x).unsqueeze(0)
    value, tan = apart(x, level, num)
    return torch.cat([value.unsqueeze(0), tan])


def batch_last(x: Tensor, batched: bool, axis: int = 1) -> Tensor:
    """From ``(1 + K, *batch, …)`` to ``(1 + K, …, *batch)``, in memory: one entry of all samples side by side."""
    return x.movedim(axis, -1).contiguous() if batched else x


def batch_first(x: Any, batched: bool, axis: int = 1) -> Any:
    """Back."""
    return x.movedim(-1, axis) if batched else x
