r"""A whole root, a few Newton steps and the derivative at their end, as one compiled program.

Small systems solved millions of times spend their time between operations, not in them. So a fixed number of undamped
Newton steps (held where a sample has arrived) and :math:`\dot x = -F_x^{-1} F_p \dot p` are recorded as one straight
program of tensor operations, which `dualnn.compile` makes a single C++ function. The program also says whether this was
enough: every step satisfied the line search with its full length, and the end its tolerance. It goes on from where it
ended while its steps are those of the ordinary solver, which takes over otherwise; so results do not depend on the
speculation.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.compiling import compile
from dualnn.engine.dual_tensor import count, make, primal_of, split, top_level
from dualnn.engine.tangents import Zero
from dualnn.engine.transforms import push
from dualnn.solvers.elimination import Elimination
from dualnn.solvers.factors import block_jacobian
from dualnn.solvers.line_search import ARMIJO
from dualnn.solvers.newton import default_tolerance
from dualnn.solvers.stats import Stats, Status

STEPS = 4
TURNS = 8  # of the program, each from where the last one ended
# One C++ function without temporary arrays: the kernels are shorter than what Python needs to call them.
OPTIONS = {"cpp_wrapper": True, "force_pointwise_cat": True}

_programs: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def fused(
    fn: Callable[..., Tensor], start: Tensor, args: Sequence[Any], tol: float | None
) -> tuple[Tensor, Stats] | None:
    """The solution with its derivative (one level of duals) and course, or None where the ordinary solver is needed.

    Args:
        fn: The residual; the same object in every call, with everything that varies among ``args``.
        start: Plain.
        args: Its further arguments.
        tol: As for `root`.
    """
    program = programs_of(fn).get(tol)
    if program is None:
        # What a program cannot tell: wrong shapes, and samples that mix.
        block_jacobian(lambda x: fn(x, *map(primal_of, args)), start)
        program = programs_of(fn)[tol] = compile(_Program(fn, tol), options=OPTIONS)
    iterations: Tensor | None = None
    for turn in range(1, TURNS + 1):
        ran, found = program.attempt((start, *args), {})
        if not ran:
            return None
        x, taken, residual, status, solved, on_track = found
        iterations = taken if iterations is None else iterations + taken
        if solved:
            return x, Stats(iterations, residual, status, turn * (STEPS + 1), turn * (STEPS + 1))
        if not on_track:
            return None
        start = primal_of(x)  # so far these are the ordinary solver's steps: go on from here
    return None


def programs_of(fn: Callable) -> dict[Any, Any]:
    """The programs of ``fn``; they live as long as it does (a method: as long as its object)."""
    if inspect.ismethod(fn):
        return _programs.setdefault(fn.__self__, {}).setdefault(fn.__func__, {})
    return _programs.setdefault(fn, {})


def weakly(fn: Callable) -> Callable[[], Callable | None]:
    """A reference that does not keep a function (a method: its object) alive."""
    return weakref.WeakMethod(fn) if inspect.ismethod(fn) else weakref.ref(fn)


class _Program:
    """What is recorded. Holds ``fn`` weakly, for the table of programs must not keep it alive."""

    def __init__(self, fn: Callable[..., Tensor], tol: float | None) -> None:
        self.fn = weakly(fn)
        self.tol = tol
        self.__name__ = self.__qualname__ = getattr(fn, "__qualname__", type(fn).__name__)

    def __call__(self, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        fn = self.fn()
        assert fn is not None, "a program is only used by calls that hold its function"
        level = top_level(args)
        parts = [split(a, level) for a in args]
        primals = [p for p, _ in parts]
        limit = default_tolerance(x) if self.tol is None else self.tol

        def equations(u: Tensor) -> Tensor:
            return fn(u, *primals)

        f = equations(x)
        solved = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        iterations = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        going = f.abs().amax(-1) > limit
        for _ in range(STEPS):
            f, jacobian = block_jacobian(equations, x, probe=False)
            trial = x - Elimination(jacobian).solve(f)
            value = equations(trial)
            fell = (value * value).sum(-1) <= (f * f).sum(-1) * (1 - 2 * ARMIJO)
            arrived = ~going
            # A sample that has arrived takes one more step if that does not hurt, as in `newton`.
            moves = going | ((value.abs().amax(-1) <= f.abs().amax(-1)) if self.tol is None else going)
            solved = solved & (arrived | fell)
            iterations = iterations + going
            x, f = (torch.where(moves.unsqueeze(-1), a, b) for a, b in ((trial, x), (value, f)))
            going = going & (f.abs().amax(-1) > limit)
        residual = f.abs().amax(-1)
        on_track = solved.all()
        solved = on_track & (residual <= limit).all()
        course = iterations, residual, torch.full_like(iterations, Status.CONVERGED)
        if not level:
            return x, *course, solved, on_track
        none = make(x, Zero(count(level, args)), level), *course, solved, on_track
        if all(t is None for _, t in parts):
            return none
        _, tan = push(lambda *a: fn(x, *a), primals, [t for _, t in parts])
        if tan.is_zero:
            return none
        _, jacobian = block_jacobian(equations, x, probe=False)
        factors = Elimination(jacobian)
        moved = tan.map(lambda t: -factors.solve(t))
        return make(x, moved, level), *course, solved & torch.isfinite(moved.dense()).all(), on_track
