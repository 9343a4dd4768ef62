"""Everything that running a module changes besides its result: kept, and put back bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.snapshot import RandomStates
from dualnn.layers.local import LocalCall
from dualnn.layers.local_swap import LocalForward

_CONTAINERS = (dict, list, set, deque)


class ModuleState:
    """Attributes (counters, caches, hooks, training mode), buffers, parameters and ``.grad`` of a module and its parts.

    Containers among the attributes are kept one level deep, and so is what a local dual counts. A tensor is written
    back only if its numbers changed, so that an untouched one keeps its version counter.

    Args:
        module: The module.
        parameters: Keep the numbers of parameters too.
    """

    def __init__(self, module: nn.Module, parameters: bool = True) -> None:
        self.modules = [(sub, dict(sub.__dict__)) for sub in module.modules()]
        held = [value for _, attributes in self.modules for value in attributes.values()]
        calls = [value.local if isinstance(value, LocalForward) else value for value in held]
        self.calls = [
            (call, {**vars(call), "_plans": dict(call._plans)}) for call in calls if isinstance(call, LocalCall)
        ]
        self.containers: dict[int, tuple[Any, Any]] = {}
        tensors: dict[int, Tensor] = {}
        for _, attributes in self.modules:
            for value in attributes.values():
                if isinstance(value, _CONTAINERS):
                    self.containers[id(value)] = (value, type(value)() if isinstance(value, set) else None)
                    inner = value.values() if isinstance(value, dict) else value
                    tensors |= {id(t): t for t in inner if isinstance(t, Tensor)}
                elif isinstance(value, Tensor):
                    tensors[id(value)] = value
        self.containers = {k: (value, _shallow(value)) for k, (value, _) in self.containers.items()}
        grads = {id(t): t.grad for t in tensors.values() if t.is_leaf}
        tensors |= {id(g): g for g in grads.values() if g is not None}
        self.grads = [(t, grads[id(t)]) for t in list(tensors.values()) if id(t) in grads]
        kept = [t for t in tensors.values() if parameters or not isinstance(t, nn.Parameter)]
        self.tensors = [(t, t.detach().clone(), t.requires_grad) for t in kept]

    def restore(self) -> None:
        """Put everything back."""
        for sub, attributes in self.modules:
            if sub.__dict__.keys() != attributes.keys() or any(sub.__dict__[k] is not v for k, v in attributes.items()):
                sub.__dict__.clear()
                sub.__dict__.update(attributes)
        for call, counted in self.calls:
            vars(call).clear()
            vars(call).update({**counted, "_plans": dict(counted["_plans"])})
        for value, before in self.containers.values():
            _refill(value, before)
        with torch.no_grad():
            for tensor, before, requires_grad in self.tensors:
                if tensor.shape != before.shape or tensor.dtype != before.dtype:
                    tensor.data = before
                elif not torch.equal(tensor, before):
                    tensor.data.copy_(before)
                if tensor.is_leaf and tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
            for tensor, grad in self.grads:
                if tensor.grad is not grad:
                    tensor.grad = grad


def _shallow(value: Any) -> list:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _refill(value: Any, before: list) -> None:
    now = _shallow(value)
    if len(now) == len(before) and all(_same(a, b) for a, b in zip(now, before, strict=True)):
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(before)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == 2 == len(b):  # the items of a dict
        return a[0] is b[0] and a[1] is b[1]
    return a is b


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Leave the module and the random generators as they were, whatever happens inside."""
    random_states, state = RandomStates(), ModuleState(module)
    try:
        yield
    finally:
        state.restore()
        random_states.restore()


__all__ = ["ModuleState", "RandomStates", "untouched"]
