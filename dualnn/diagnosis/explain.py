"""Why a submodule fails, in plain words, with the operation and the line of source that are to blame."""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.diagnosis.replay import BackwardError, Replay
from dualnn.diagnosis.tracer import NOWHERE, Cut, Origin, Place, Tracer
from dualnn.diagnosis.verdict import Verdict

#: Of several cuts in a module the most deliberate is blamed: values are often read just to be logged.
RANK = ("inference_mode", "no_grad", "no derivative", "numpy", "detach", "copy", "item", "flat")
CUT_WORDS = {
    "inference_mode": "runs under torch.inference_mode, which records no graph",
    "no_grad": "runs under torch.no_grad, which records no graph",
    "no derivative": "has no derivative in torch and drops the graph without a word",
    "numpy": "leaves torch for numpy",
    "detach": "detaches the value from the graph",
    "copy": "copies the numbers into a new tensor without a graph",
    "item": "turns the tensor into a Python number",
    "flat": "returns a value without a derivative",
}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The cause in plain words, the op and the line to blame, and what cut the graph (for a cut)."""

    cause: str
    op: str = ""
    place: Place = Place()
    reason: str = ""


def explain(replay: Replay, which: Sequence[int], verdict: Verdict) -> Explanation:
    """Run a failing replay once more under watch."""
    tracer = Tracer(nodes=True)
    watch = Watch(tracer)
    error: Exception | None = None
    try:
        outputs = replay.run(inputs=which, around=tracer)
        tracer.claim(outputs)  # a custom Function makes its nodes unseen
        watch.hook()
        replay.backward(outputs, which)
    except BackwardError as raised:
        error = raised
    names = ", ".join(replay.leaves[k].name for k in verdict.leaves[:4]) + (", …" if len(verdict.leaves) > 4 else "")
    return _WORDS[verdict.kind](tracer, watch, verdict, names, error)


class Watch:
    """Hooks on the nodes of a traced graph: which ran last, and which was the first to make a non-finite number."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.last: Any = None
        self.broken: Any = None

    def hook(self) -> None:
        """Hook every node that the tracer knows."""
        for node in list(self.tracer.nodes):
            node.register_prehook(self._entered(node))
            node.register_hook(self._left(node))

    def _entered(self, node: Any) -> Callable:
        def prehook(_: Any) -> None:
            self.last = node

        return prehook

    def _left(self, node: Any) -> Callable:
        def hook(made: Sequence, given: Sequence) -> None:
            if self.broken is None and _finite(given) and not _finite(made):
                self.broken = node

        return hook

    def origin(self, node: Any) -> Origin:
        """The call that made a node."""
        return self.tracer.nodes.get(node, NOWHERE)


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or bool(torch.isfinite(t).all()) for t in tensors)


def _raises(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    cause = error.__cause__ if error is not None else verdict.error
    text = " ".join(str(cause).split())
    origin = watch.origin(watch.last)
    op, place = origin.op, origin.place
    if "modified by an inplace operation" in text:
        writes = [w for w in tracer.writes if w.storages & origin.storages and w.place.file]
        victim = f"{op} (line {place.line}) needs its numbers in backward" if place.file else f"{op} needs its numbers"
        if writes and writes[-1].place != place:
            write = writes[-1]
            return Explanation(
                f"{victim}, and {write.op} overwrites them in place{_shown(write.place)}", op, write.place, "inplace"
            )
        return Explanation(f"{op} overwrites in place what its own backward needs{_shown(place)}", op, place, "inplace")
    if found := re.search(r"derivative for '([^']+)' is not implemented", text):
        words = f"torch has no backward formula for {op or found[1]} ('{found[1]}'){_shown(place)}"
        return Explanation(words, op or found[1], place, "formula")
    short = text if len(text) < 160 else text[:157] + "…"
    return Explanation(f"backward of {op or 'an op'} raises {type(cause).__name__}: {short}", op, place, "error")


def _nonfinite(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    origin = watch.origin(watch.broken)
    what = f"backward of {origin.op}" if origin.op else "backward"
    return Explanation(
        f"{what} makes nan or inf here, though the derivative in {names} is finite{_shown(origin.place)}",
        origin.op,
        origin.place,
    )


def _cut(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    cut, op = blamed(tracer.cuts), _custom_functions(tracer)
    if op and (cut is None or cut.cause in ("item", "copy", "flat")):
        return Explanation(f"the backward of {op[0]} returns nothing for {names}", op[0], op[1], "function")
    if cut is None:
        return Explanation(f"no gradient reaches {names}, though the values depend on it")
    lost = f"{cut.op} {CUT_WORDS[cut.cause]}{_shown(cut.place)}: {names} gets no gradient"
    return Explanation(lost, cut.op, cut.place, cut.cause)


def _partial_cut(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    op = _custom_functions(tracer)
    cut = blamed([c for c in tracer.cuts if c.cause != "flat"])
    if cut is not None and not (op and cut.cause in ("item", "copy")):
        lost = f"{cut.op} {CUT_WORDS[cut.cause]}{_shown(cut.place)}: a part of the gradient in {names} is missing"
        return Explanation(lost, cut.op, cut.place, cut.cause)
    if op:
        words = f"the backward of {op[0]} is not the derivative of its forward (seen in {names})"
        return Explanation(words, op[0], op[1], "function")
    origins = {o.op: o for o in tracer.nodes.values()}
    ops = ", ".join(list(origins)[:3])
    first = next(iter(origins.values()), None)
    place = first.place if first is not None else Place()
    return Explanation(f"reverse mode and differences disagree in {names}; it calls {ops}", ops, place, "op")


def _flat(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    flat = [c for c in tracer.cuts if c.cause == "flat"]
    # Comparisons also choose branches of smooth functions: an op that makes numbers is the likelier one.
    flat.sort(key=lambda c: c.op in ("gt", "lt", "ge", "le", "eq", "ne", "__bool__"))
    if flat:
        words = f"{flat[0].op} is a step function{_shown(flat[0].place)}: its derivative is zero almost everywhere"
        return Explanation(f"{words}, there is none to recover in {names}", flat[0].op, flat[0].place)
    return Explanation(f"the values move with {names} only in jumps: the derivative is zero almost everywhere")


def _surrogate(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    cut = blamed(tracer.cuts)
    op = _custom_functions(tracer)
    place = op[1] if op else cut.place if cut is not None else Place()
    what = op[0] if op else "a straight-through estimator"
    return Explanation(
        f"{what} gives {names} another function's derivative on purpose; its own is zero almost everywhere",
        what if op else "",
        place,
    )


def _unexamined(tracer: Tracer, watch: Watch, verdict: Verdict, names: str, error: Exception | None) -> Explanation:
    return Explanation("two runs from the same state and seeds differ, so that its gradient cannot be judged")


_WORDS: dict[str, Callable[..., Explanation]] = {
    "raises": _raises,
    "nonfinite": _nonfinite,
    "cut": _cut,
    "wrong": _partial_cut,
    "flat": _flat,
    "surrogate": _surrogate,
    "unexamined": _unexamined,
}


def blamed(cuts: Sequence[Cut]) -> Cut | None:
    """The cut that most likely matters."""
    known = [c for c in cuts if c.place.file] or list(cuts)
    return min(known, key=lambda c: RANK.index(c.cause), default=None)


def _custom_functions(tracer: Tracer) -> tuple[str, Place] | None:
    """A custom autograd Function in the graph, and where its backward is written."""
    for node in tracer.nodes:
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None and not forward.__module__.startswith("torch."):
            try:
                file = inspect.getsourcefile(forward)
                lines, line = inspect.getsourcelines(inspect.unwrap(forward.backward))
                line += next((i for i, text in enumerate(lines) if text.lstrip().startswith("def ")), 0)
            except (TypeError, OSError):
                file, line = None, 0
            return forward.__name__, Place(file, line) if file else Place()
    return None


def _shown(place: Place) -> str:
    """The line itself, for the text."""
    code = linecache.getline(place.file, place.line).strip() if place.file else ""
    return f" in `{code if len(code) < 80 else code[:77] + '…'}`" if code else ""
