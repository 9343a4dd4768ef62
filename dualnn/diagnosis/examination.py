"""`doctor`: run a module once, then judge every part of it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.diagnosis.explain import Explanation, Watch, explain
from dualnn.diagnosis.memory import over_budget, readable, saved_bytes
from dualnn.diagnosis.planner import Plan, attribute, plan, swap_line, try_duals
from dualnn.diagnosis.recording import Call, Recording, parts, place_of, record
from dualnn.diagnosis.replay import Replay, covectors, quiet
from dualnn.diagnosis.report import Finding, Report
from dualnn.diagnosis.state import ModuleState, untouched
from dualnn.diagnosis.tracer import SAMPLERS, is_real
from dualnn.diagnosis.verdict import Judge, Verdict
from dualnn.engine.errors import DualInputError
from dualnn.layers.local_swap import swap_forward


def doctor(module: nn.Module, *inputs: Any, memory_budget: int | None = None, **kwargs: Any) -> Report:
    r"""Find the parts of a module on which backprop fails, say why, and what to use instead.

    The module runs once as it is. Then each part that runs code of its own (a layer, or the lines between layers) is
    replayed alone, on a float64 copy, from the same state and seeds, and reverse mode is held against differences
    by the adjoint test

    .. math:: \langle J^T g, v \rangle = \langle g, J v \rangle,

    g and v random, for each parameter and each input through which a gradient flows. Where they disagree the
    difference decides. A remedy by local duals is tried on the copy before it is printed.

    The module, its buffers, hooks, ``.grad``, training mode and the random generators are left as they were, also
    when something raises.

    Args:
        module: The module, on which the gradient of every parameter with ``requires_grad`` is examined. Inputs are
            examined where they require grad (all of them for a module without trainable parameters).
        *inputs: Its inputs, of the kind it is trained on. Small ones do.
        memory_budget: Bytes that one part may keep for backward; a further run measures it. None: not examined.
        **kwargs: Its keyword inputs.

    Returns:
        A `Report`; ``str()`` is a table, ``.ok`` says whether all is well. A forward pass that raises is a finding.

    Raises:
        DualInputError: Not a module, or one whose lazy parameters have no shape yet.

    Example:
        >>> import torch, dualnn as dn
        >>> class Loses(torch.nn.Module):
        ...     def forward(self, x):
        ...         with torch.no_grad():
        ...             return torch.tanh(x)
        >>> report = dn.doctor(torch.nn.Sequential(torch.nn.Linear(3, 3), Loses()), torch.randn(2, 3))
        >>> report.ok, report.findings[0].name, report.findings[0].kind
        (False, '1', 'cut')
        >>> report.findings[0].remedy
        "dn.layers.swap_forward(model, ['1'])"
    """
    return examine(module, inputs, kwargs, memory_budget=memory_budget)


def examine(
    module: nn.Module, args: tuple, kwargs: dict, method: str = "forward", memory_budget: int | None = None
) -> Report:
    """As `doctor`, on any method of the module: ``examine(model, (batch, 0), {}, method="training_step")``.

    Args:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        method: The name of what is called.
        memory_budget: As for `doctor`.
    """
    if not isinstance(module, nn.Module):
        raise DualInputError(f"doctor examines a torch.nn.Module, got {type(module).__name__}: wrap it in a module")
    if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
        raise DualInputError(f"{type(module).__name__} has lazy parameters without a shape: run it once first")
    with untouched(module), quiet(), torch.inference_mode(False), torch.enable_grad():
        # Compiled modules run as they are written: what fails is their code.
        with torch.compiler.set_stance("force_eager"):
            return _Examination(module, args, kwargs, method).report(memory_budget)


class _Examination:
    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, method: str) -> None:
        self.module, self.args, self.kwargs, self.method = module, args, kwargs, method
        asked = [x for x in pytree.tree_leaves((args, kwargs)) if is_real(x) and x.requires_grad]
        self.force = not asked and not any(p.requires_grad for p in module.parameters())
        self.parts = parts(module)
        self.start = ModuleState(module)
        self.findings: list[Finding] = []
        self.examined: list[str] = []
        self.finite: set[str] = set()
        self.integer: list[str] = []

    def report(self, memory_budget: int | None) -> Report:
        recording = self._record()
        gradients = _whole_gradient(self.module, recording)
        # Parts before what holds them: the failure of a part explains that of the whole.
        for path in sorted(self.parts, key=lambda p: (-_depth(p), list(self.parts).index(p))):
            if path in recording.calls and (path in recording.own or self._has_function(path)):
                self.examined.append(path)
                self._examine(path, recording)
        self._forward_error(recording)
        self._whole_run(recording, gradients)
        if memory_budget is not None and recording.error is None:
            self._memory(memory_budget, recording)
        order = {path: i for i, path in enumerate(self.parts)}
        self.findings.sort(key=lambda f: (f.information, order.get(f.path, 0)))
        return Report(self.findings, type(self.module).__name__, tuple(p for p in self.parts if p in self.examined))

    def _record(self, nodes: bool = False) -> Recording:
        self.start.restore()
        return record(self.module, self.method, self.args, self.kwargs, self.force, nodes)

    def _has_function(self, path: str) -> bool:
        """A module without parts always runs code of its own, seen or not (a custom autograd Function)."""
        return not any(p != path and (not path or p.startswith(path + ".")) for p in self.parts)

    def _below(self, path: str) -> list[Finding]:
        return [f for f in self.findings if f.path != path and (not path or f.path.startswith(path + "."))]

    def _examine(self, path: str, recording: Recording) -> None:
        below = self._below(path)
        if any(f.swap != "exact" for f in below):
            return  # what fails inside would be seen again here
        swapped = [f.path.removeprefix(path + ".") if path else f.path for f in below]
        for call in recording.calls[path]:
            if self._examine_call(path, call, swapped, recording):
                return

    def _examine_call(self, path: str, call: Call, swapped: list[str], recording: Recording) -> bool:
        sampler = bool(recording.own.get(path, set()) & SAMPLERS)
        reason: Exception | None = None
        for wide in (True, False):
            try:
                return self._judge(path, call, swapped, wide, sampler)
            except Exception as error:
                # Constants in single precision meet the float64 copy: once more as it is.
                reason = reason or error
        if recording.error is None:
            self._add(path, Verdict("unexamined", []), _not_replayed(reason), Plan("", ""), ())
        return True

    def _judge(self, path: str, call: Call, swapped: list[str], wide: bool, sampler: bool) -> bool:
        replay = Replay(self.parts[path], call, "forward" if path else self.method, wide)
        if swapped:
            swap_forward(replay.module, swapped)
            replay.state = ModuleState(replay.module, parameters=False)
        needed = [k for k, leaf in enumerate(replay.leaves) if leaf.needed]
        if self._decide(path, replay, needed, sampler, needed_here=True):
            return True
        others = [k for k, leaf in enumerate(replay.leaves) if leaf.index == 0 and not leaf.needed]
        if others and not any(call.needed) and path and self._has_function(path):
            return self._decide(path, replay, others, sampler, needed_here=False)
        return False

    def _decide(self, path: str, replay: Replay, which: list[int], sampler: bool, needed_here: bool) -> bool:
        if not which:
            return False
        judge = Judge(replay, which, sampler)
        try:
            verdict = judge.verdict()
        except Exception:
            if needed_here:
                raise
            return False  # reading the numbers of an input that needs no gradient is fine
        if judge.outputs == 0 and needed_here:
            self.integer.append(path)
        if verdict is None:
            if judge.finite:
                self.finite.add(path)
            return False
        why = explain(replay, which, verdict)
        names = tuple(replay.leaves[k].name for k in verdict.leaves)
        if not needed_here:
            if verdict.kind in ("surrogate", "unexamined"):
                return False
            text = f"{why.cause}. Nothing that is trained lies before it, so nothing is lost"
            self._add(path, Verdict("unneeded", []), dataclasses.replace(why, cause=text), Plan("", ""), names)
            return True
        if verdict.kind in ("wrong", "cut") and getattr(self.parts[path], "estimates", False):
            text = "its gradient is a random estimate on purpose, which differences cannot judge in a single draw"
            self._add(path, Verdict("unexamined", []), Explanation(text), Plan("", ""), names)
            return True
        if verdict.kind == "wrong" and why.reason in ("no_grad", "detach") and not why.place.file:
            return False  # torch's own module stops a part of the gradient on purpose (spectral_norm)
        chosen = plan(replay, which, verdict, why, path)
        if verdict.kind in ("wrong", "cut") and why.reason == "detach" and _reaches(replay, which, verdict):
            verdict = dataclasses.replace(verdict, kind="stop-gradient")
        self._add(path, verdict if verdict.kind != "wrong" else _cut_or_wrong(verdict, why), why, chosen, names)
        return True

    def _add(self, path: str, verdict: Verdict, why: Explanation, chosen: Plan, leaves: tuple[str, ...]) -> None:
        self.findings.append(
            Finding(
                name=".".join(part for part in path.split(".") if part != "_orig_mod"),
                kind=verdict.kind,
                cause=why.cause,
                line=str(why.place),
                remedy=chosen.remedy,
                cost=chosen.cost,
                swap=chosen.swap,
                tangents=chosen.tangents,
                path=path,
                op=why.op,
                leaves=leaves,
            )
        )

    def _forward_error(self, recording: Recording) -> None:
        error = recording.error
        if error is None:
            return
        if "nference tensor" in str(error) and any("inference_mode" in f.cause for f in self.findings):
            return  # the cut that was found is the reason
        text = " ".join(str(error).split())
        why = Explanation(f"the forward pass itself raises {type(error).__name__}: {text[:300]}", "", place_of(error))
        self._add(recording.error_path, Verdict("raises", []), why, Plan("", ""), ())

    def _whole_run(self, recording: Recording, gradients: dict[str, Tensor | None] | Exception) -> None:
        """What only the whole shows: a failure that no part shows alone."""
        if isinstance(gradients, Exception):
            if not any(f.kind == "raises" for f in self.findings):
                self._trace_whole(gradients)
            return
        broken = any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients.values())
        if broken and not any(f.kind == "nonfinite" for f in self.findings):
            self._trace_whole(None)
        lost = any(g is None for g in gradients.values())
        if lost and not any(not f.information for f in self.findings):
            self._integer_cut(recording)

    def _integer_cut(self, recording: Recording) -> None:
        """Gradients are lost and a part turns what is trained into integers: that is where."""
        for path in self.integer:
            cuts = [c for c in recording.tracer.cuts if c.module == path]
            if cuts:
                cut = cuts[-1]
                why = Explanation(
                    f"{cut.op} returns integers: nothing before it gets a gradient, and its own derivative is zero "
                    "almost everywhere",
                    cut.op,
                    cut.place,
                )
                text = f"# name a smooth function whose derivative stands in for {cut.op}"
                self._add(path, Verdict("flat", []), why, Plan(text, "a biased gradient", "surrogate"), ())
                return

    def _trace_whole(self, error: Exception | None) -> None:
        recording = self._record(nodes=True)
        watch = Watch(recording.tracer)
        watch.hook()
        _whole_gradient(self.module, recording)
        origin = watch.origin(watch.last if error is not None else watch.broken)
        if error is not None:
            text = " ".join(str(error).split())
            why = Explanation(f"backward of {origin.op} raises {type(error).__name__}: {text}", origin.op, origin.place)
            self._add(origin.module, Verdict("raises", []), why, Plan("", ""), ())
        elif origin.op and origin.module in self.finite:
            dtype = next((str(y.dtype) for y in recording.outputs), "its precision")
            why = Explanation(
                f"backward of {origin.op} overflows in {dtype}; in float64 it is finite", origin.op, origin.place
            )
            remedy = f"# {origin.place}: compute this line in float64, with .double() before and .float() after"
            self._add(origin.module, Verdict("nonfinite", []), why, Plan(remedy, "the line runs in float64"), ())

    def _memory(self, budget: int, recording: Recording) -> None:
        self.start.restore()
        sizes = saved_bytes(self.module, self.method, self.args, self.kwargs, self.force)
        for path in over_budget(sizes, budget):
            why = Explanation(f"backward keeps {readable(sizes[path])} for it, the budget is {readable(budget)}")
            self._add(path, Verdict("memory", []), why, self._lean(path, recording), ())

    def _lean(self, path: str, recording: Recording) -> Plan:
        """Local duals where few tangents do, else recomputation."""
        if path in recording.calls and not any(f.path == path for f in self.findings):
            replay = Replay(self.parts[path], recording.calls[path][0], "forward" if path else self.method)
            needed = [k for k, leaf in enumerate(replay.leaves) if leaf.needed]
            if sum(leaf.base.numel() for leaf in replay.leaves) <= FEW or not any(
                isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in replay.module.modules()
            ):
                trial = try_duals(replay, needed, Verdict("memory", needed, jittered=True), dense=FEW)
                if trial.structure:
                    return Plan(swap_line(path, trial), trial.cost, "exact")
        cost = "one more forward pass of it in each backward"
        if not path:
            return Plan("dn.signals.Backprop(checkpoint=True)", cost)
        name = attribute(f"model.{path}")
        call = f"functools.partial(torch.utils.checkpoint.checkpoint, {name}.forward, use_reentrant=False)"
        return Plan(f"{name}.forward = {call}", cost)


#: Numbers in inputs and parameters up to which a dense Jacobian is cheaper than what autograd keeps for a long loop.
FEW = 64


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _cut_or_wrong(verdict: Verdict, why: Explanation) -> Verdict:
    """A wrong gradient whose missing part left the graph is a cut."""
    if why.reason in ("inference_mode", "no_grad", "no derivative", "numpy", "detach", "copy", "item"):
        return dataclasses.replace(verdict, kind="cut")
    return verdict


def _reaches(replay: Replay, which: Sequence[int], verdict: Verdict) -> bool:
    """Whether some gradient still reaches each failing leaf, so that a ``detach`` looks meant."""
    grads = replay.reverse(which)
    return all(grads[k] is not None for k in verdict.leaves)


def _not_replayed(error: Exception | None) -> Explanation:
    text = " ".join(str(error).split())[:200]
    place = place_of(error) if error is not None else ""
    return Explanation(f"it could not be replayed alone: {type(error).__name__}: {text}", "", place)  # type: ignore[arg-type]


def _whole_gradient(module: nn.Module, recording: Recording) -> dict[str, Tensor | None] | Exception:
    """Gradients of everything trained in the recorded run itself, or what its backward raised."""
    sources = {n: p for n, p in module.named_parameters() if p.requires_grad} | recording.sources
    outputs = [y for y in recording.outputs if y.requires_grad]
    if not outputs or not sources:
        return dict.fromkeys(sources)
    try:
        grads: Iterable[Tensor | None] = torch.autograd.grad(
            outputs, list(sources.values()), covectors(outputs), allow_unused=True
        )
    except Exception as error:
        return error
    return dict(zip(sources, grads, strict=True))
