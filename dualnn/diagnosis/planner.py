"""Which remedy a failure gets: tried on the copy before it is printed, with what it costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dualnn.diagnosis.estimate import TANGENTS, estimated_numbers
from dualnn.diagnosis.explain import Explanation
from dualnn.diagnosis.replay import Replay
from dualnn.diagnosis.report import Swap
from dualnn.diagnosis.rewriting import rewritten, source
from dualnn.diagnosis.stand_in import black_box, smoothed, surrogate
from dualnn.diagnosis.verdict import JITTER, Judge, Verdict, inner
from dualnn.engine.errors import StructureError
from dualnn.layers.local import LocalCall
from dualnn.layers.local_swap import LocalForward

#: Inputs and parameters up to which a dense Jacobian (one tangent for each number) is proposed.
DENSE = 1024
REWRITTEN = ("vander", "linspace")
CUTS_BY_HAND = ("detach", "item", "copy", "numpy")
NOTHING = "nothing: the line is as fast as before"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One line of code, what it costs, how local duals can take the module's place, and K of an estimate by them."""

    remedy: str
    cost: str
    swap: Swap | None = None
    tangents: int | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """How local duals did in the module's place: the structure that held, or why they cannot (too wide for one?)."""

    structure: str | None
    cost: str = ""
    reason: str = ""
    wide: bool = False


def plan(replay: Replay, which: Sequence[int], verdict: Verdict, why: Explanation, path: str) -> Plan:
    """The remedy for one failing submodule.

    Args:
        replay: The submodule alone.
        which: The leaves that training needs.
        verdict: What fails.
        why: The cause.
        path: The submodule's name as ``named_modules`` spells it; "" for the whole module.
    """
    if verdict.kind == "flat":
        return _for_flat(replay, path, why)
    if verdict.kind in ("surrogate", "unexamined"):
        return Plan("", "")
    code = rewritten(source(why.place)) if why.op in REWRITTEN or why.reason in CUTS_BY_HAND else ""
    trial = try_duals(replay, which, verdict)
    swap: Swap | None = "exact" if trial.structure else None
    if code:
        return Plan(code, f"{NOTHING} (write it at {why.place})", swap)
    if swap:
        return Plan(swap_line(path, trial), trial.cost, swap)
    if found := black_box(replay, path, lambda: _right(replay, which, verdict)):
        return Plan(found.code, found.cost)
    if trial.wide and (numbers := estimated_numbers(replay, which)):
        return _estimate(path, numbers)
    return Plan(_by_hand(verdict, why), f"none at run time; local duals cannot take this over: {trial.reason}")


def swap_line(path: str, trial: Trial) -> str:
    """The line that lets a submodule (or the whole module) run on duals inside backprop."""
    return _line(path, "" if trial.structure == "auto" else f", structure={trial.structure!r}")


def _line(path: str, options: str) -> str:
    if not path:
        return f"model = dn.layers.Dual(model{options})"
    return f"dn.layers.swap_forward(model, [{path!r}]{options})"


def _estimate(path: str, numbers: int) -> Plan:
    return Plan(
        _line(path, f", structure='random', tangents={TANGENTS}"),
        f"an unbiased estimate: one dual pass with K = {TANGENTS} random tangents, about {1 + TANGENTS} forward passes "
        f"of this module; its relative variance is about (n + 1) / K = {(numbers + 1) / TANGENTS:.3g}, with n = "
        f"{numbers} numbers in its parameters and inputs (of one sample, where samples do not mix). A smaller module, "
        "or one whose samples or entries do not mix, is exact",
        "estimate",
        TANGENTS,
    )


def try_duals(replay: Replay, which: Sequence[int], verdict: Verdict, dense: int = DENSE) -> Trial:
    """Let local duals take the place of the replayed module, and compare their gradient with differences."""
    if replay.method != "forward":
        return Trial(None, reason="only a module's forward can be taken over: move the code into a submodule")
    total = sum(leaf.base.numel() for leaf in replay.leaves)
    forward = LocalForward(replay.module, LocalCall("auto", dense_limit=dense))
    try:
        with replay.patched(forward):
            if not _right(replay, which, verdict):
                return Trial(None, reason="their gradient does not equal differences either")
    except Exception as error:
        text = " ".join(str(error).split()).split(". ")[0]
        wide = isinstance(error, StructureError) and total > dense
        return Trial(None, reason=f"{type(error).__name__}: {text}", wide=wide)
    found = forward.local.chosen or "auto"
    # Said where the probe has shown more than that auto would find it again at any size.
    return Trial("block" if found == "block" else "auto", _cost(found, replay, total))


def _right(replay: Replay, which: Sequence[int], verdict: Verdict) -> bool:
    here = replay.reverse(which)
    if not all(g is None or bool(torch.isfinite(g).all()) for g in here.values()):
        return False
    if not verdict.jittered:
        if verdict.kind != "nonfinite" and _equal_differences(replay, which, here):
            return True
    with replay.moved(1, JITTER):
        return _equal_differences(replay, which, replay.reverse(which))


def _equal_differences(replay: Replay, which: Sequence[int], grads: dict[int, Tensor | None]) -> bool:
    judge = Judge(replay, which)
    for k in which:
        v = replay.direction(k)
        found = inner(grads[k], v)
        if not any(replay.difference({k: v}, step).near(found, judge.tolerance) for step in judge.steps):
            return False
    return True


def _cost(structure: str, replay: Replay, total: int) -> str:
    if structure == "elementwise":
        count = len(replay.leaves)
        return (
            f"exact: one dual pass with K = {count} tangent{'s' * (count > 1)} (one for each input and parameter "
            f"tensor), about {1 + count} forward passes of this module; memory does not grow with its loops"
        )
    if structure == "block":
        return (
            "exact: one dual pass with a tangent for each number of one sample, "
            "some forward passes of this module for each; memory does not grow with its loops"
        )
    return (
        f"exact: one dual pass with K = {total} tangents (one for each number in inputs and parameters), up to "
        f"{1 + total} forward passes of this module; memory does not grow with its loops"
    )


def _for_flat(replay: Replay, path: str, why: Explanation) -> Plan:
    if found := surrogate(replay, path, why.op):
        return Plan(found.code, found.cost, "surrogate")
    if found := smoothed(replay, path):
        return Plan(found.code, found.cost, "estimate")
    at = f"{why.place}: " if why.place.file else ""
    text = f"# {at}name a smooth function for {why.op or 'the step'}: dn.layers.Surrogate(f, 'sigmoid')(x)"
    return Plan(text, "as fast as before; biased: the gradient is that of the smooth function", "surrogate")


def attribute(name: str) -> str:
    """A qualified name as Python spells it: ``model.net.0`` is ``model.net[0]``."""
    return re.sub(r"\.(\d+)", r"[\1]", name)


_SAFE = {
    "sqrt": "write |x| as x.abs() and a norm as torch.linalg.vector_norm(x, dim=-1): both have a subgradient at 0",
    "log": "mask the argument, not the result: torch.where(ok, torch.where(ok, x, 1).log(), 0)",
    "div": "mask the denominator, not the result: torch.where(ok, a / torch.where(ok, b, 1), 0)",
    "pow": "mask the base, not the result: torch.where(ok, torch.where(ok, x, 1) ** p, 0)",
}


def _by_hand(verdict: Verdict, why: Explanation) -> str:
    """What to change by hand, as a comment on the line to blame."""
    at = f"{why.place}: " if why.place.file else ""
    if verdict.kind == "nonfinite":
        op = next((k for k in _SAFE if k in why.op), "")
        return f"# {at}{_SAFE.get(op, 'keep the argument away from the point where its derivative is infinite')}"
    if verdict.kind == "raises" and why.reason == "inplace":
        return f"# {at}write into a copy, y = y.clone(), or use torch.where"
    if why.reason == "function":
        return f"# {at}correct backward; torch.autograd.gradcheck({why.op}.apply, inputs) checks it"
    if why.reason == "inference_mode":
        return f"# {at}take the code out of torch.inference_mode (under torch.no_grad local duals can take it over)"
    if why.reason == "no_grad":
        return f"# {at}move this code into a function f of few inputs and call dn.layers.Dual(f)"
    if why.reason in CUTS_BY_HAND:
        return f"# {at}keep the value a tensor from here on"
    return f"# {at}replace {why.op or 'the op'} by ops that have a derivative"
