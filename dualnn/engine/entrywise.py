"""A recorded program on small tensors, taken apart into its entries.

Compilers of tensor programs make a loop for every tensor. Where tensors have three or nine entries for each of many
samples, loops over the entries are all overhead: no vector is full, every `stack` is a chain of selections. Taken
apart, picking entries and putting them together costs nothing, and what remains is arithmetic on numbers, one for each
sample: `written` makes a C++ function of it, in seconds.

Entries that are 0 by construction (the seeds of a Jacobian) are structural zeros, as in `Zero`: their products are not
computed. Equal operations are one. What has no rule here, or is large, is for a compiler of tensor programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dualnn.engine.entries import LARGEST, Entries, Entry, WholeError, shape_of
from dualnn.engine.entrywise_rules import RULES, numbers
from dualnn.engine.written import Op, Written, written

aten = torch.ops.aten
MOST = 50_000  # operations


def entrywise(graph: fx.GraphModule, batched: Sequence[bool]) -> Written | None:
    """The program as one C++ function, for CPUs; None where it is not one of few entries and known operations.

    Args:
        graph: Of aten operations with metadata, as `make_fx` records it.
        batched: For each input, whether its last axis is the batch. (Only a hint: what it means is read off the graph.)
    """
    program = _Program(graph, batched)
    try:
        program.run()
    except WholeError:
        return None
    outputs = [([*value.data.reshape(-1)], like) for value, like in program.outputs]
    return written(program.inputs, batched, outputs, program.ops, program.size)


class _Program:
    def __init__(self, graph: fx.GraphModule, batched: Sequence[bool]) -> None:
        self.graph, self.batched = graph, batched
        self.size = 0  # of the batch
        self.inputs: list[Tensor] = []
        self.outputs: list[tuple[Entries, Tensor]] = []
        self.ops: list[Op] = []
        self._env: dict[fx.Node, Any] = {}
        self._known: dict[Any, Op] = {}

    def run(self) -> None:
        places = [node.meta["val"] for node in self.graph.graph.nodes if node.op == "placeholder"]
        for like, batched in zip(places, self.batched, strict=True):
            if batched:
                self.size = like.shape[-1]
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self._env[node] = self._taken_apart(node.meta["val"])
            elif node.op == "call_function":
                self._env[node] = self._call(node)
            elif node.op == "output":
                self.outputs = [(self._settled(self._env[n], n.meta["val"]), n.meta["val"]) for n in node.args[0]]
            else:  # a tensor that was captured: as it is now
                self._env[node] = numbers(getattr(self.graph, str(node.target)))

    def emit(self, target: str, dtype: torch.dtype, *args: Any) -> Op:
        """An operation, or the same one if it is there already."""
        key = target, dtype, tuple((type(a), a) for a in args)  # 1, 1.0 and True are equal
        op = self._known.get(key)
        if op is None:
            if len(self.ops) >= MOST:
                raise WholeError
            op = self._known[key] = Op(target, args, dtype, any(isinstance(a, Op) and a.varies for a in args))
            self.ops.append(op)
        return op

    def pair(self, target: Any, dtype: torch.dtype, a: Entry, b: Entry) -> Entry:
        """An operation of two entries of one dtype."""
        simple = _simplified(target, [a, b], [dtype, dtype], dtype)
        if simple is not None:
            return simple[0]
        if isinstance(a, Op) or isinstance(b, Op):
            return self.emit(_name(target), dtype, a, b)
        return target(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)).item()

    def aligned(self, values: Sequence[Entries], dim: int) -> tuple[list[Any], int | None]:
        """Arrays of ``dim`` axes that broadcast, and the batch's axis."""
        axes = {dim - v.data.ndim + v.batch for v in values if v.batch is not None}  # from the end, as in broadcasting
        if len(axes) > 1:
            raise WholeError
        batch = axes.pop() if axes else None
        arrays = []
        for v in values:
            data = v.data[(None,) * (dim - v.data.ndim) + (...,)]
            if batch is not None and v.batch is None and data.shape[batch] > 1:
                if data.strides[batch] != 0:  # one number for each sample, which no input said
                    raise WholeError
                data = data[(slice(None),) * batch + (slice(0, 1),)]
            arrays.append(data)
        return arrays, batch

    def _taken_apart(self, like: Tensor) -> Entries:
        batched = self.batched[len(self.inputs)]
        shape = [*like.shape[:-1], 1] if batched else list(like.shape)
        if np.prod(shape) > LARGEST:
            raise WholeError
        step = self.size if batched else 1
        data: Any = np.empty(shape, dtype=object)
        for i, index in enumerate(np.ndindex(*shape)):
            op = data[index] = Op("load", (len(self.inputs), i * step), like.dtype, batched)
            self.ops.append(op)
        self.inputs.append(like)
        return Entries(data, like.dim() - 1 if batched else None, like.dtype)

    def _settled(self, value: Any, like: Tensor) -> Entries:
        """A result, whose batch is its last axis."""
        if not isinstance(value, Entries) or value.batch not in (None, like.dim() - 1):
            raise WholeError
        if self.size and value.batch is None:
            if like.dim() == 0 or like.shape[-1] != self.size or value.data.strides[-1] != 0:
                raise WholeError
            value = Entries(value.data[..., :1], like.dim() - 1, value.dtype)
        return value

    def _call(self, node: fx.Node) -> Any:
        rule, out = RULES.get(node.target), node.meta["val"]
        if rule is not None:
            args = [self._arg(a) for a in node.args]
            return rule(self, out, *args, **{k: self._arg(a) for k, a in node.kwargs.items()})
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or node.kwargs:
            raise WholeError
        return self._pointwise(node.target, [self._arg(a) for a in node.args], out)

    def _arg(self, a: Any) -> Any:
        if isinstance(a, fx.Node):
            return self._env[a]
        return [self._arg(x) for x in a] if isinstance(a, (list, tuple)) else a

    def _pointwise(self, target: Any, args: list[Any], out: Tensor) -> Entries:
        places = [i for i, a in enumerate(args) if isinstance(a, Entries)]
        operands, batch = self.aligned([args[i] for i in places], out.dim())
        dtypes = [args[i].dtype for i in places]
        if len({t for t in dtypes if t.is_floating_point}) > 1:
            raise WholeError  # what is promoted to what depends on the number of axes
        shape = shape_of(out, batch)
        # An axis along which nothing varies is done once.
        once = [all(x.shape[d] == 1 or x.strides[d] == 0 for x in operands) for d in range(len(shape))]
        cut = tuple(slice(0, 1) if o else slice(None) for o in once)
        small = [1 if o else n for o, n in zip(once, shape, strict=True)]
        if np.prod(small) > LARGEST:
            raise WholeError
        operands = [np.broadcast_to(x[(*cut, ...)], small) for x in operands]
        data: Any = np.empty(small, dtype=object)
        for index in np.ndindex(*small):
            entries = [x[index] for x in operands]
            data[index] = self._entry(target, args, places, entries, dtypes, out.dtype)
        return Entries(np.broadcast_to(data, shape), batch, out.dtype)

    def _entry(
        self, target: Any, args: list[Any], places: list[int], entries: list[Entry], dtypes: list[torch.dtype], out: Any
    ) -> Entry:
        if len(places) == 1 and len(args) == 2 and isinstance(args[1], (int, float)):
            simple = _simplified(target, [*entries, args[1]], [*dtypes, out], out)
        else:
            simple = _simplified(target, entries, dtypes, out) if len(places) == len(args) else None
        if simple is not None:
            return simple[0]
        called = list(args)
        known = not any(isinstance(e, Op) for e in entries)
        for i, e, dtype in zip(places, entries, dtypes, strict=True):
            called[i] = torch.tensor(e, dtype=dtype) if known else e
        return target(*called).item() if known else self.emit(_name(target), out, *called)


def _name(target: Any) -> str:
    return str(target).removeprefix("aten.")


def _simplified(target: Any, entries: list[Entry], dtypes: list[torch.dtype], out: torch.dtype) -> list[Entry] | None:
    """The result of an operation with a structural 0 or a 1, which needs no computing."""
    if target is aten.where.self:
        mask, a, b = entries
        if not isinstance(mask, Op):
            return [a if mask else b]
        return [a] if a is b else None
    if target not in NEUTRAL or len(entries) != 2:
        return None
    neutral, absorbing, both = NEUTRAL[target]
    for i in (1, 0) if both else (1,):
        if not isinstance(entries[i], Op) and entries[i] == neutral and dtypes[1 - i] == out:
            return [entries[1 - i]]
    for i in (0, 1) if both else (0,):
        if absorbing is not None and not isinstance(entries[i], Op) and entries[i] == absorbing:
            return [torch.tensor(absorbing, dtype=out).item()]
    return None


# What leaves the other operand as it is, what the result is whatever the other one is, and whether from both sides.
NEUTRAL: dict[Any, tuple[Any, Any, bool]] = {
    aten.mul.Tensor: (1, 0, True),
    aten.add.Tensor: (0, None, True),
    aten.sub.Tensor: (0, None, False),
    aten.div.Tensor: (1, 0, False),
    aten.bitwise_and.Tensor: (True, False, True),
    aten.bitwise_or.Tensor: (False, True, True),
}
