"""`gradcheck`: the derivatives of a user's function, in every mode, against finite differences of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dualnn.engine.differences import Difference
from dualnn.engine.errors import (
    DualInputError,
    DualnnError,
    DualShapeError,
    StructureError,
    TangentLostError,
    unknown_name,
)
from dualnn.engine.gradcheck_problem import Problem, WrongValueError

FIRST = ("forward", "reverse")
SECOND = ("forward over forward", "reverse over forward", "reverse over reverse")


class GradcheckError(DualnnError, RuntimeError):
    """A derivative disagrees with finite differences, or none could be judged; the message is the report."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one mode gives for one input.

    Attributes:
        name: The input or parameter.
        mode: One of `FIRST` or `SECOND`.
        status: ``"right"``, ``"wrong"``, ``"kink"`` (no derivative exists at the points tried) or ``"unsupported"``.
        deviation: The worst absolute deviation from the differences.
        where: Entry of the input, and of the output where there is one, at which it occurs.
        note: What else to know.
    """

    name: str
    mode: str
    status: str
    deviation: float = 0.0
    where: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All verdicts; true when none is wrong and at least one is right; ``str()`` is a table."""

    title: str
    verdicts: tuple[Verdict, ...]

    def __bool__(self) -> bool:
        statuses = {v.status for v in self.verdicts}
        return "wrong" not in statuses and "right" in statuses

    def __str__(self) -> str:
        wrong = sum(v.status == "wrong" for v in self.verdicts)
        summary = "right" if self else f"{wrong} wrong" if wrong else "nothing could be judged"
        rows = [("input", "mode", "verdict", "worst", "where", "")]
        for v in self.verdicts:
            rows.append((v.name, v.mode, v.status, f"{v.deviation:.1e}" if v.where else "", v.where, v.note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]]).rstrip() for row in rows]
        return "\n".join([f"gradcheck of {self.title}: {summary}", *lines])


def gradcheck(
    fn: Callable,
    inputs: Any,
    order: int = 2,
    *,
    modes: Sequence[str] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    step: float = 1e-3,
    entries: int = 16,
    raise_exception: bool = True,
) -> Report:
    r"""Compare the derivatives of a function or module with five-point differences of its values, in float64.

    Forward mode pushes dual tensors (ours, not torch's), reverse mode is ``torch.autograd``, second order is
    :math:`\partial_{x_j} (J v)` along a fixed direction v over all inputs. Points where differences settle on nothing
    are called a kink, not wrong; a mode that raises is called unsupported, not wrong; a derivative that was cut
    (``detach``, ``item``) is zero, and wrong where the differences are not.

    Args:
        fn: A deterministic function or module (a float64 copy of it is checked, its parameters too); returns tensors.
        inputs: Its argument, or a tuple of arguments; every floating point tensor in them is converted to float64 and
            differentiated.
        order: 1 or 2.
        modes: Some of ``"forward"``, ``"reverse"``, ``"forward over forward"``, ``"reverse over forward"``,
            ``"reverse over reverse"``. Default: the first two, and the third for ``order=2``.
        rtol: Allowed deviation, relative; loosen it for functions that are iterated to a tolerance.
        atol: Allowed deviation, absolute.
        step: First step of the differences, in the inputs' own unit; ten times it for second order. It is halved until
            the differences settle: take it smaller than what the function bends over.
        entries: At most so many entries of each input are checked, evenly spread.
        raise_exception: Raise where the report is not true (as `torch.autograd.gradcheck`).

    Returns:
        The report: true when right, ``str()`` says for each input and mode the worst deviation, and where.

    Raises:
        GradcheckError: A derivative is wrong, or nothing could be judged.
        DualInputError: Nothing to differentiate, values that are not finite or not float64, or a function that is not
            deterministic.

    Example:
        >>> import torch, dualnn as dn
        >>> bool(dn.gradcheck(torch.sin, torch.tensor([0.3, 1.0])))
        True
        >>> cut = lambda x: x * x.detach()
        >>> report = dn.gradcheck(cut, torch.tensor([0.5]), order=1, raise_exception=False)
        >>> bool(report), report.verdicts[0].note
        (False, 'got 0.5, differences 1')
    """
    chosen = _modes(order, modes)
    problem = Problem(fn, inputs, entries)
    wanted = 2 if any(m in SECOND for m in chosen) else 1
    verdicts: list[Verdict] = []
    for i, name in enumerate(problem.names):
        lines = {1: [problem.first(i, j, step, rtol, atol) for j in problem.entries[i]]}
        if wanted == 2:
            lines[2] = [problem.mixed(i, j, 10 * step, 10 * rtol, 10 * atol) for j in problem.entries[i]]
        for mode in chosen:
            factor = 10 if mode in SECOND else 1
            expected = lines[2 if mode in SECOND else 1]
            verdicts.append(_judge(problem, i, name, mode, expected, factor * rtol, factor * atol))
    report = Report(problem.title, tuple(verdicts))
    if raise_exception and not report:
        raise GradcheckError(str(report))
    return report


def _modes(order: int, modes: Sequence[str] | None) -> tuple[str, ...]:
    if order not in (1, 2):
        raise DualInputError(f"gradcheck knows order 1 and 2, got {order!r}")
    if modes is None:
        return FIRST if order == 1 else (*FIRST, SECOND[0])
    for mode in modes:
        if mode not in (*FIRST, *SECOND):
            raise unknown_name("mode", mode, (*FIRST, *SECOND))
    return tuple(modes)


def _judge(
    problem: Problem, i: int, name: str, mode: str, lines: list[Difference], rtol: float, atol: float
) -> Verdict:
    try:
        got = problem.derivative(mode, i)
    except WrongValueError as error:
        return Verdict(name, mode, "wrong", note=f"the value on duals differs by {error.args[0]:.1e}")
    except (TangentLostError, StructureError, DualShapeError) as error:
        return Verdict(name, mode, "wrong", note=f"{type(error).__name__}: {_first_line(error)}")
    except (DualnnError, RuntimeError) as error:  # RuntimeError: NotImplementedError and most of torch's errors
        # The value itself was fine: this mode cannot follow the function.
        return Verdict(name, mode, "unsupported", note=f"{type(error).__name__}: {_first_line(error)}")
    expected = torch.stack([d.value for d in lines])
    doubt = torch.stack([d.error for d in lines])
    kink = torch.stack([d.kink for d in lines])
    reverse = mode.startswith("reverse")
    if reverse:
        expected = (expected * problem.weights).sum(1, keepdim=True)
        doubt = (doubt * problem.weights.abs()).sum(1, keepdim=True)
        kink = kink.any(1, keepdim=True)
    if kink.all():
        return Verdict(name, mode, "kink", note="differences do not settle at any entry: no derivative to compare with")
    deviation = (got - expected).abs()
    allowed = atol + rtol * expected.abs() + 2 * doubt
    ratio = torch.where(kink, -1.0, torch.where(torch.isfinite(got), deviation / allowed, torch.inf))
    worst = int(ratio.argmax())
    row, column = divmod(worst, ratio.shape[1])
    where = problem.place(i, problem.entries[i][row], None if reverse else column)
    right = bool(ratio.max() <= 1)
    notes = []
    if not right:
        notes.append(f"got {float(got.view(-1)[worst]):.6g}, differences {float(expected.view(-1)[worst]):.6g}")
        if not got.any():
            notes.append("no derivative arrives at all: cut by .detach(), .item(), .numpy() or a comparison?")
    if kink.any():
        notes.append(f"{int(kink.sum())} of {kink.numel()} on a kink, not judged")
    total = problem.tensors[i].numel()
    if total > len(lines):
        notes.append(f"{len(lines)} of {total} entries")
    return Verdict(name, mode, "right" if right else "wrong", float(deviation.view(-1)[worst]), where, "; ".join(notes))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


__all__ = ["GradcheckError", "Report", "Verdict", "gradcheck"]
