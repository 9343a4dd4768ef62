"""One run of the user's module, watched: which submodule was called with what, and which runs code of its own."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.diagnosis.tracer import _HERE, _TORCH, Place, Tracer, is_real, tensors_in

#: Calls of one module that are kept: the first ones and the last.
CALLS = 3


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, as they were before it: tensors are copies.

    Attributes:
        leaves: Flattened arguments.
        spec: How they nest.
        needed: For each leaf whether a gradient flows back through it to something that is trained.
        names: What each leaf is called: ``input 0``, ``input mask``.
    """

    leaves: tuple[Any, ...]
    spec: Any
    needed: tuple[bool, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Call:
        """Copy the arguments of a call."""
        keyed, spec = pytree.tree_flatten_with_path((args, kwargs))
        leaves = [x for _, x in keyed]
        names = tuple("input " + ".".join(_key(k) for k in path[1:]) for path, _ in keyed)
        return cls(tuple(map(_copied, leaves)), spec, tuple(is_real(x) and x.requires_grad for x in leaves), names)


def _key(entry: Any) -> str:
    """One step of a path into nested arguments."""
    return str(next((getattr(entry, a) for a in ("idx", "key", "name") if hasattr(entry, a)), entry))


@dataclasses.dataclass
class Recording:
    """What one run showed.

    Attributes:
        calls: For each module's path, in the order in which they were first called, up to `CALLS` calls.
        own: The torch ops that each module's own code calls.
        tracer: Cuts, and the nodes of the graph.
        sources: What was differentiated: the inputs that require grad, by name.
        outputs: The float tensors that came out.
        error: What the forward pass itself raised.
        error_path: The innermost module that was running then.
    """

    calls: dict[str, list[Call]]
    tracer: Tracer
    outputs: list[Tensor]
    sources: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    error: Exception | None = None
    error_path: str = ""

    @property
    def own(self) -> dict[str, set[str]]:
        """Torch ops by the module whose own code calls them."""
        return self.tracer.ops


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules by path, each once, without those inside a layer that differentiates what it holds by itself."""
    found: dict[str, nn.Module] = {}
    closed: list[str] = []
    for path, sub in module.named_modules():
        if any(not c or path.startswith(c + ".") for c in closed):
            continue
        found[path] = sub
        if getattr(sub, "one_layer", False) or getattr(sub.__dict__.get("forward"), "one_layer", False):
            closed.append(path)
    return found


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    with torch._C.DisableTorchFunction():  # our copies are not the module's own code
        return x.detach().clone()


def record(
    module: nn.Module, method: str, args: tuple, kwargs: dict, force_inputs: bool, nodes: bool = False
) -> Recording:
    """Run ``module`` once under watch.

    Args:
        module: The module; hooks are added and removed again.
        method: What to call: ``"forward"``, ``"training_step"``, …
        args: Positional arguments.
        kwargs: Keyword arguments.
        force_inputs: Let float inputs require grad although nobody asked for it (a module without parameters).
        nodes: Follow the graph's nodes.
    """
    stack = [""]
    calls: dict[str, list[Call]] = {}
    tracer = Tracer(lambda: stack[-1], nodes)
    recording = Recording(calls, tracer, [])
    handles = []

    def before(path: str) -> Callable:
        def hook(_: nn.Module, given: tuple, named: dict) -> None:
            stack.append(path)
            _keep(calls.setdefault(path, []), Call.of(given, named))

        return hook

    def after(path: str) -> Callable:
        def hook(*_: Any) -> None:
            while len(stack) > 1 and stack.pop() != path:
                pass

        return hook

    paths = {sub: path for path, sub in parts(module).items()}
    for sub, path in paths.items():
        if path and not isinstance(sub, torch.jit.ScriptModule):
            # Before the user's own hooks: a replay runs those again.
            handles.append(sub.register_forward_pre_hook(before(path), prepend=True, with_kwargs=True))
            handles.append(sub.register_forward_hook(after(path), with_kwargs=True, always_call=True))
    try:
        given, named = fresh(args, kwargs, force_inputs)
        calls[""] = [Call.of(given, named)]
        flat = pytree.tree_leaves((given, named))
        recording.sources = {calls[""][0].names[i]: flat[i] for i, n in enumerate(calls[""][0].needed) if n}
        try:
            with tracer:
                result = module(*given, **named) if method == "forward" else getattr(module, method)(*given, **named)
            recording.outputs = [t for t in tensors_in(result) if is_real(t)]
        except Exception as error:
            recording.error, recording.error_path = error, _running(error, paths)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _running(error: BaseException, paths: dict[nn.Module, str]) -> str:
    """The innermost module whose code raised."""
    path, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            path = paths.get(owner, path)
        trace = trace.tb_next
    return path


def _keep(kept: list[Call], call: Call) -> None:
    if len(kept) == CALLS:
        kept.pop()
    kept.append(call)


def fresh(args: tuple, kwargs: dict, force: bool) -> tuple[tuple, dict]:
    """Copies of the arguments that a module may overwrite; not leaves of the graph, as inside a network."""

    def renew(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        copy = x.detach().clone()
        if is_real(x) and (x.requires_grad or force):
            copy = copy.requires_grad_() * 1
        return copy

    return pytree.tree_map(renew, args), pytree.tree_map(renew, kwargs)


def place_of(error: BaseException) -> Place:
    """The innermost line of the user's source in a traceback."""
    place = Place()
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith((_TORCH, _HERE, "<frozen")):
            place = Place(frame.filename, frame.lineno or 0)
    return place
