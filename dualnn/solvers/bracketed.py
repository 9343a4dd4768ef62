r"""Roots between two ends, entry by entry: no derivative is needed to find them, and none can be missed.

Where :math:`f` is continuous and has opposite signs at the ends of a bracket, a root lies in it. Each step evaluates f
once inside the bracket and keeps the part whose ends differ in sign; a method is the choice of where (`TRIALS`).

An infinite end is replaced by the first of the points :math:`1, 4, 16, …` times :math:`\max(1, |anchor|)` away from the
other end (from ``x0`` or 0 where both are infinite) at which the sign differs.

Reference:
    Chandrupatla, "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function without using
    derivatives", Adv. Eng. Software 28, 1997 (in the class of Brent's method, and simpler; also scipy's
    `optimize.elementwise.find_root`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, SingularMatrixError, StructureError, UnsupportedOpError
from dualnn.engine.jacobians import jacobian
from dualnn.solvers.factors import same_shape
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.stats import OnFailure, Stats, Status, settle

INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
INTEGERS[torch.bfloat16] = torch.int16
PATIENCE = 32  # steps of a method after which the bracket is halved in the ordered floats, which ends in 64 more


class Bracket(NamedTuple):
    """Two ends with opposite signs (1 is the latest point) and the point discarded last."""

    x1: Tensor
    f1: Tensor
    x2: Tensor
    f2: Tensor
    x3: Tensor
    f3: Tensor

    def best(self) -> tuple[Tensor, Tensor]:
        """The end with the smaller value."""
        first = self.f1.abs() <= self.f2.abs()
        return torch.where(first, self.x1, self.x2), torch.where(first, self.f1, self.f2)


def halved(bracket: Bracket, least: Tensor) -> Tensor:
    """The float in the middle of the floats between the ends: 64 steps end any bracket, also at tiny roots."""
    a, b = (_ordered(x.view(INTEGERS[x.dtype])) for x in (bracket.x1, bracket.x2))
    return _ordered((a >> 1) + (b >> 1) + (a & b & 1)).view(bracket.x1.dtype)


def _ordered(i: Tensor) -> Tensor:
    """Bits of floats as integers in the same order, and back."""
    return torch.where(i < 0, torch.iinfo(i.dtype).min - i, i)


def chandrupatla(bracket: Bracket, least: Tensor) -> Tensor:
    """Inverse quadratic interpolation where it is monotone, else the middle; at least ``least`` off the ends."""
    x1, f1, x2, f2, x3, f3 = bracket
    xi, phi, alpha = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2), (x3 - x1) / (x2 - x1)
    quadratic = (1 - torch.sqrt(1 - xi) < phi) & (phi < torch.sqrt(xi))
    t = f1 / (f1 - f2) * (f3 / (f3 - f2)) - alpha * (f1 / (f3 - f1)) * (f2 / (f2 - f3))
    t = torch.where(quadratic & torch.isfinite(t), t, 0.5)
    edge = (least / (x2 - x1).abs()).clamp_max(0.5)
    t = torch.minimum(torch.maximum(t, edge), 1 - edge)
    return x1 + t * (x2 - x1)


TRIALS: dict[str, Callable[[Bracket, Tensor], Tensor]] = {"bisect": halved, "chandrupatla": chandrupatla}


class Elementwise:
    """A diagonal Jacobian: systems are solved by division by the slope.

    Args:
        slope: The diagonal, of x's shape.
        x: Where it was taken.
        strict: Raise where the slope is zero or nan at a finite x.

    Raises:
        SingularMatrixError: Such entries, listed.
    """

    def __init__(self, slope: Tensor, x: Tensor, strict: bool = True) -> None:
        self.slope = slope
        lost = ((slope == 0) | slope.isnan()) & x.isfinite()
        if strict and bool(lost.any()):
            raise SingularMatrixError(
                f"the root has no derivative at {_entries(lost)}: the slope of the function is 0 (or nan) there, as at "
                "a double root. on_failure='nan' or 'last' returns the other entries' derivatives."
            )

    def solve(self, rhs: Tensor) -> Tensor:
        """The quotient, for ``(*lead, *shape)``."""
        return rhs / self.slope

    solve_transposed = solve


def bracketed_root(
    fn: Callable[..., Tensor],
    x0: Tensor | None,
    args: Sequence[Any],
    method: str,
    bracket: Any,
    tol: float | None,
    max_steps: int,
    differentiate: str,
    on_failure: OnFailure,
) -> tuple[Tensor, Stats]:
    """`root` for the methods of this file."""
    if differentiate == "unroll":
        raise UnsupportedOpError(f"method={method!r} has no derivative of its own to unroll: use 'implicit'")
    low, high, first = _ends(fn, x0, args, bracket, method)
    report: list[Stats] = []
    limit = 0.0 if tol is None else tol

    def solve(low: Tensor, high: Tensor, first: Tensor, *rest: Any) -> tuple[Tensor, None]:
        def equation(x: Tensor) -> Tensor:
            return fn(x, *rest)

        _check_order(low, high)
        same_shape(equation(low), low)
        x, stats = shrink(equation, low, high, first, limit, max_steps, TRIALS[method])
        report[:] = [stats]
        return settle(x, stats, on_failure, f"root by {method}", limit), None

    def linearise(x: Tensor, low: Tensor, high: Tensor, first: Tensor, *rest: Any) -> Elementwise:
        try:
            slope = jacobian(lambda u: fn(u, *rest), x, structure="elementwise")
        except StructureError as error:
            raise StructureError(f"method={method!r} needs an elementwise fn; for a system use 'newton'") from error
        return Elementwise(slope, x, strict=on_failure == "raise")

    problem = Problem(lambda x, low, high, first, *rest: fn(x, *rest), solve, linearise)
    return implicit(problem, low, high, first, *args), report[0]


def shrink(
    fn: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    first: Tensor,
    limit: float,
    max_steps: int,
    trial: Callable[[Bracket, Tensor], Tensor],
) -> tuple[Tensor, Stats]:
    """Narrow brackets down to the root.

    Args:
        fn: Elementwise.
        low: Lower ends, maybe infinite.
        high: Upper ends.
        first: The first trial point, where it lies inside.
        limit: Largest value that counts as zero.
        max_steps: At most.
        trial: Where to evaluate next, from the bracket and the least distance from its ends.
    """
    low, f_low, high, f_high, evaluations = _finite(fn, low, high, first)
    info = torch.finfo(low.dtype)
    _check_elementwise(fn, low, f_low, high, f_high)
    bracket = Bracket(high, f_high, low, f_low, low, f_low)
    status = torch.where(torch.sign(f_low) * torch.sign(f_high) <= 0, Status.RUNNING, Status.NO_BRACKET)
    status = torch.where(f_low.isnan() | f_high.isnan(), Status.NONFINITE, status)
    iterations = torch.zeros_like(status)
    x, value = bracket.best()
    middle = low / 2 + high / 2
    point = torch.where((first > low) & (first < high), first, middle)
    for step in range(max_steps + 1):
        least = info.eps * (x.abs() + info.tiny)
        arrived = (value.abs() <= limit) | ((bracket.x1 - bracket.x2).abs() <= 2 * least)
        status = torch.where((status == Status.RUNNING) & arrived, Status.CONVERGED, status)
        running = status == Status.RUNNING
        if step == max_steps or not bool(running.any()):
            break
        if step:
            point = (trial if step < PATIENCE else halved)(bracket, least)
        point = torch.where(running, point, x)
        f = fn(point)
        evaluations += 1
        same = torch.sign(f) == torch.sign(bracket.f1)
        x1, f1, x2, f2, _, _ = bracket
        new = Bracket(
            point, f, torch.where(same, x2, x1), torch.where(same, f2, f1), torch.where(same, x1, x2),
            torch.where(same, f1, f2),
        )  # fmt: skip
        bracket = Bracket(*(torch.where(running, a, b) for a, b in zip(new, bracket, strict=True)))
        status = torch.where(running & f.isnan(), Status.NONFINITE, status)
        iterations = iterations + running
        x, value = bracket.best()
    status = torch.where(status == Status.RUNNING, Status.MAX_STEPS, status)
    doubtful = (status == Status.CONVERGED) & (value.abs() > limit)
    if bool(doubtful.any()):
        status = torch.where(doubtful & _jumps(fn, x, value, low, f_low, high, f_high), Status.JUMP, status)
        evaluations += 2
    return x, Stats(iterations, value.abs(), status, evaluations + 1, 0)


def _check_elementwise(
    fn: Callable[[Tensor], Tensor], low: Tensor, f_low: Tensor, high: Tensor, f_high: Tensor
) -> None:
    """Some entries at one end and some at the other: each must have the value that it has there."""
    chosen = torch.rand(low.numel(), generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[:1], chosen[1:][-1:] = True, False
    up = chosen.reshape(low.shape).to(low.device)
    found, expected = fn(torch.where(up, high, low)), torch.where(up, f_high, f_low)
    slack = torch.finfo(low.dtype).eps ** 0.5
    mixed = ~torch.isclose(found, expected, rtol=slack, atol=slack * _scale(f_low, f_high), equal_nan=True)
    if bool(mixed.any()):
        raise StructureError(
            f"the value at {_entries(mixed)} depends on the other entries of x: a bracketed root needs an elementwise "
            "fn; for a system use method='newton'"
        )


def _jumps(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    value: Tensor,
    low: Tensor,
    f_low: Tensor,
    high: Tensor,
    f_high: Tensor,
) -> Tensor:
    """Tell jumps and poles from roots: a root's value is rounding, far below those a little way off."""
    root_eps = torch.finfo(x.dtype).eps ** 0.5
    step = root_eps * torch.maximum(x.abs(), (high - low) * root_eps)
    near = torch.maximum(*(fn(torch.minimum(torch.maximum(x + s, low), high)).abs() for s in (-step, step)))
    # Where rounding hides a flat root's neighbours as well, the value is still small beside those at the ends.
    small = value.abs() <= root_eps * torch.maximum(*(f.abs().nan_to_num(0.0, 0.0, 0.0) for f in (f_low, f_high)))
    return ~small & (value.abs() > 0.1 * near)


def _scale(*values: Tensor) -> float:
    """The largest finite entry."""
    return max((float(v.abs().nan_to_num(0.0, 0.0, 0.0).max()) for v in values if v.numel()), default=0.0)


def _finite(
    fn: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Finite ends, their values, and the evaluations: walk from a finite point until the sign changes."""
    open_low, open_high = low.isinf(), high.isinf()
    if not bool((open_low | open_high).any()):
        return low, fn(low), high, fn(high), 2
    anchor = torch.where(open_low & open_high, torch.where(first.isfinite(), first, 0.0), low)
    anchor = torch.where(open_low & ~open_high, high, anchor)
    low, high = torch.where(open_low, anchor, low), torch.where(open_high, anchor, high)
    f_low, f_high, evaluations = fn(low), fn(high), 2
    stride = anchor.abs().clamp_min(1.0)
    most = torch.finfo(low.dtype).max
    while True:
        going = (torch.sign(f_low) * torch.sign(f_high) > 0) & (open_low | open_high) & (stride < most)
        if not bool(going.any()):
            return low, f_low, high, f_high, evaluations
        down = torch.where(going & open_low, (anchor - stride).clamp_min(-most), low)
        up = torch.where(going & open_high, (anchor + stride).clamp_max(most), high)
        f_down, f_up = fn(down), fn(up)
        evaluations += 2
        # The sign was one throughout so far: a change lies in the last stretch of one side.
        turned_up = going & open_high & (torch.sign(f_up) != torch.sign(f_high))
        turned_down = going & open_low & ~turned_up & (torch.sign(f_down) != torch.sign(f_low))
        old_low, old_high, f_old_low, f_old_high = low, high, f_low, f_high
        low, f_low = torch.where(turned_up, old_high, down), torch.where(turned_up, f_old_high, f_down)
        high, f_high = torch.where(turned_down, old_low, up), torch.where(turned_down, f_old_low, f_up)
        stride = torch.where(going, stride * 4, stride)


def _ends(
    fn: Callable, x0: Tensor | None, args: Sequence[Any], bracket: Any, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper ends and the first trial point, as plain tensors of the result's shape."""
    if not isinstance(bracket, (tuple, list)) or len(bracket) != 2:
        raise DualInputError(f"method={method!r} needs bracket=(lo, hi), numbers or tensors, got {bracket!r}")
    tensors = [primal_of(t) for t in (x0, *bracket, *args) if isinstance(t, Tensor)]
    like = next((t for t in tensors if t.dtype.is_floating_point), torch.zeros(()))
    ends = [torch.as_tensor(primal_of(b), dtype=like.dtype, device=like.device).detach() for b in bracket]
    start = torch.full((), torch.nan).to(like) if x0 is None else primal_of(x0).detach()
    try:
        low, high, first = torch.broadcast_tensors(*ends, start)
    except RuntimeError as error:
        shapes = [tuple(t.shape) for t in (*ends, start)]
        raise StructureError(f"lo, hi and x0 of shapes {shapes} do not broadcast to one shape") from error
    with torch.no_grad():
        value = fn(low, *map(primal_of, args))
    if isinstance(value, Tensor) and value.dim() >= low.dim():  # arguments may broadcast the bracket
        low, high, first = (t.expand(value.shape).contiguous() for t in (low, high, first))
    return low, high, first


def _check_order(low: Tensor, high: Tensor) -> None:
    wrong = ~(low <= high) | (low == torch.inf) | (high == -torch.inf)
    if bool(wrong.any()):
        raise DualInputError(f"bracket=(lo, hi) must have lo <= hi: not so (or nan) at {_entries(wrong)}")


def _entries(mask: Tensor) -> str:
    where = torch.nonzero(mask.reshape(-1)).flatten().tolist()
    return f"{len(where)} of {mask.numel()} entries (first: {where[:8]})"
