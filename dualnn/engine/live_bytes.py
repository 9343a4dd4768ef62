"""Bytes of live tensors: what a program holds at its peak, whatever the machine and its allocator."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class OpMode(TorchDispatchMode):
    """Run every operation, composite ones in their parts, and hand each to `record`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, FakeTensor) for t in types):  # a program is being recorded: nothing is computed
            return func(*args, **kwargs)
        with self:  # inference_mode delivers composite operations (linear, matmul) whole: see their parts
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        before = {storage._cdata for leaf in tree_leaves((args, kwargs)) for storage in storages(leaf)}
        out = func(*args, **kwargs)
        self.record(func, args, kwargs, out, before)
        return out

    def record(self, func: Any, args: Any, kwargs: Any, out: Any, before: set[int]) -> None:
        """Take note of one operation; `before`: the addresses of its inputs' storages."""
        raise NotImplementedError


class LiveBytes(OpMode):
    """Count the bytes of tensors that were made inside the context and are still alive.

    Storages are counted, each once by its size in bytes, so that views, aliases and in-place results add nothing;
    a storage leaves the count when its last tensor goes, saved for backward or not. Tensors that existed before,
    temporaries inside one operation, and memory outside torch are not counted.

    Attributes:
        current: bytes alive now (follows releases after the context's end too).
        peak: largest `current` seen.

    Example:
        >>> x = torch.zeros(1000)
        >>> with LiveBytes() as m:
        ...     y = (x + 1).view(10, 100)
        ...     z = y * 2
        ...     del y
        >>> m.peak, m.current
        (8000, 4000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._lock = threading.RLock()  # autograd's device threads release tensors too

    def record(self, func: Any, args: Any, kwargs: Any, out: Any, before: set[int]) -> None:
        """Count the result's new storages, and those of the inputs whose size has changed."""
        if func is aten.lift_fresh.default:  # torch.tensor, from_numpy: "input" and output are the new tensor
            before = set()
        with self._lock:
            for leaf in tree_leaves((args, kwargs, out)):
                for storage in storages(leaf):
                    key, size = storage._cdata, storage.nbytes()
                    if key in self._live:
                        old, alive = self._live[key]
                        if size != old:  # resize_, out=
                            self._live[key] = (size, alive)
                            self.current += size - old
                    elif key not in before:
                        self._live[key] = (size, weakref.ref(storage, partial(self._forget, key)))
                        self.current += size
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int, _: object) -> None:
        with self._lock:
            self.current -= self._live.pop(key)[0]


def storages(leaf: object) -> Iterator[torch.UntypedStorage]:
    """The storages with memory behind them of a tensor: none for meta and fake tensors, several for sparse ones."""
    if is_traceable_wrapper_subclass(leaf):
        for name in leaf.__tensor_flatten__()[0]:
            yield from storages(getattr(leaf, name))
    elif not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
        return
    elif leaf.layout is torch.sparse_coo:
        yield from storages(leaf._indices())
        yield from storages(leaf._values())
    elif leaf.layout is torch.strided:
        storage = leaf.untyped_storage()
        if storage.nbytes() and storage.data_ptr():
            yield storage
