"""What autograd keeps for backward, module by module: a run of its own whose gradient is never used.

Hooks on saved tensors switch off autograd's check for in-place changes, so nothing else may be learnt from this run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dualnn.diagnosis.recording import fresh, parts


def saved_bytes(module: nn.Module, method: str, args: tuple, kwargs: dict, force_inputs: bool) -> dict[str, int]:
    """Bytes that backward keeps for each module, its parts included; parameters and buffers do not count.

    Args:
        module: The module; hooks are added and removed again.
        method: What to call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        force_inputs: Let float inputs require grad.
    """
    stack = [""]
    owned = {_key(t) for t in [*module.parameters(), *module.buffers()]}
    seen: dict[str, dict[int, int]] = {"": {}}
    keep: list[Tensor] = []  # a freed storage would give its address to another
    handles = []

    def pack(t: Tensor) -> Tensor:
        key = _key(t)
        if key not in owned:
            keep.append(t.detach())
            for path in stack:
                seen.setdefault(path, {})[key] = t.untyped_storage().nbytes()
        return t

    def before(path: str) -> Callable:
        return lambda *_: stack.append(path)

    def after(path: str) -> Callable:
        def hook(*_: object) -> None:
            while len(stack) > 1 and stack.pop() != path:
                pass

        return hook

    for path, sub in parts(module).items():
        if path and not isinstance(sub, torch.jit.ScriptModule):
            handles.append(sub.register_forward_pre_hook(before(path), prepend=True))
            handles.append(sub.register_forward_hook(after(path), always_call=True))
    try:
        given, named = fresh(args, kwargs, force_inputs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = module(*given, **named) if method == "forward" else getattr(module, method)(*given, **named)
        del result
    finally:
        for handle in handles:
            handle.remove()
    return {path: sum(sizes.values()) for path, sizes in seen.items()}


def over_budget(sizes: dict[str, int], budget: int) -> list[str]:
    """The innermost modules that alone keep more than the budget."""
    over = [path for path, size in sizes.items() if size > budget]
    return [p for p in over if not any(q != p and (not p or q.startswith(p + ".")) for q in over)]


def _key(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors own none
        return id(t)


def readable(size: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    value, unit = float(size), "B"
    for bigger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.4g} {unit}"
