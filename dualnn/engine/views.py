r"""Views: duals that show one memory, so that a write to any of them is seen by all, as in torch.

A dual's parts are never overwritten: results of earlier operations and autograd's graph may hold them. What torch does
by storage is done by value here. `Memory` stands for the storage that a dual and its views share; each member is a
`Layout` of it (size, strides, offset), read off the member's own value, which torch made a real view. Views of views,
``unbind``, ``.T``, ``as_strided``, ``x.real`` need no code of their own, and a ``reshape`` that copied shows another
storage. With :math:`m` the memory as one vector, :math:`P` the layout written and :math:`v` the new value

.. math:: m' = m - P P^T m + P v, \qquad \dot m_k' = \dot m_k - P P^T \dot m_k + P \dot v_k,

a new vector by a linear map, hence differentiable by autograd and at every level. All members then are *stale*: each
takes its value :math:`P_i^T m'` when it is next looked at, so that writing to n rows in turn costs n copies of the
memory, not n updates of n rows. A stale dual is one without its parts whose class is `StaleDual`, which fetches them:
duals that are not stale pay nothing for this.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_alias_of  # type: ignore[attr-defined]
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.by_parts import linear, with_graph_of
from dualnn.engine.dual_tensor import DualTensor, make, primal_of
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.layout import Layout, plain
from dualnn.engine.tangents import Tangent


def link_view(base: DualTensor, view: DualTensor) -> None:
    """Note that ``view`` shows ``base``'s memory (decided by storage: a reshape may have copied)."""
    a, b = primal_of(base), primal_of(view)
    # The storage of tensors inside torch.func cannot be asked for: there a view op is taken at its word.
    if not (_is_alias_of(a, b) or is_functorch_wrapped_tensor(a) or is_functorch_wrapped_tensor(b)) or not a.numel():
        return
    memory = base._memory
    if memory is None:
        memory = base._memory = Memory(base)
    memory.add(view)
    view._memory = memory


class Memory:
    """What a dual and its views share: one vector, as a dual, once something was written; and who is looking."""

    __slots__ = ("_fresh", "_pruned", "_source", "flat", "length", "members", "origin")

    def __init__(self, base: DualTensor) -> None:
        # Not the base itself, which would keep it alive: two views may outlive it.
        self._source: tuple[Any, Tangent, int] | None = (base._primal, base._tan, base._level)
        self.flat: DualTensor | None = None
        self.length = self.origin = 0
        self.members = [weakref.ref(base)]
        self._fresh = list(self.members)  # those that are not stale: only they are visited at a write
        self._pruned = 8

    def add(self, view: DualTensor) -> None:
        """Note a new view, and from time to time forget those that are gone."""
        ref = weakref.ref(view)
        self.members.append(ref)
        self._fresh.append(ref)
        if len(self.members) > self._pruned:
            self.members = [ref for ref in self.members if ref() is not None]
            self._fresh = [ref for ref in self._fresh if ref() is not None]
            self._pruned = 2 * len(self.members) + 8

    def refreshed(self, view: DualTensor) -> None:
        """Note that a stale member fetched its value."""
        self._fresh.append(weakref.ref(view))

    def others(self, member: DualTensor) -> bool:
        """Whether anyone but ``member`` is looking."""
        return any(m is not None and m is not member for m in (ref() for ref in self.members))

    def write(self, target: DualTensor, value: Any, name: str) -> None:
        """Put ``value`` where ``target`` looks; every member fetches its new value when it needs it."""
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(True):  # the entries that are not written keep their graph
            flat = self._vector(name)
        layout = Layout.of(primal_of(target), self.origin)
        if layout.offset < 0 or layout.offset + layout.extent() > self.length:
            raise UnsupportedOpError(f"{name} writes through a view that shows memory outside of the dual it views")
        if layout.overlaps_itself():
            raise _overlap(name)
        new = linear(lambda lead, f, v: layout.written(lead, v, f, self.length), (), flat, value)
        if not grad:
            new = with_graph_of(flat, new)
        for m in (ref() for ref in self._fresh):
            if m is not None and type(m) is not StaleDual:
                make_stale(m, Layout.of(primal_of(m), self.origin))
        self._fresh = []
        self.flat, self._source, self.origin = new, None, primal_of(new).storage_offset()

    def _vector(self, name: str) -> DualTensor:
        """The memory; at the first write it is laid out from the dual whose views the members are."""
        if self.flat is None:
            assert self._source is not None
            primal, tan, level = self._source
            start = Layout.of(plain(primal_of(primal)))
            whole = start._replace(offset=0)
            if whole.overlaps_itself():
                raise _overlap(name)
            length = whole.extent()
            lay = lambda lead, v: whole.written(lead, v, None, length)  # noqa: E731
            flat = make(linear(lay, (), primal), tan.map(lambda d: linear(lay, (d.shape[0],), d)), level)
            self.length, self.origin = length, start.offset
            return flat
        return self.flat


class StaleDual(DualTensor):
    """A dual whose memory was written to, until it is looked at again."""

    _layout: Layout

    def __getattr__(self, name: str) -> Any:  # noqa: D105
        if name not in ("_primal", "_tan"):
            raise AttributeError(f"DualTensor has no attribute {name!r}")
        assert self._memory is not None and self._memory.flat is not None
        flat, layout = self._memory.flat, self._layout
        with torch.set_grad_enabled(True):  # whether a graph goes on was decided when it was written
            primal = linear(layout.shown, (), flat._primal)
            tan = flat._tan.map(lambda d: linear(layout.shown, (d.shape[0],), d))
        self.__class__ = DualTensor  # type: ignore[assignment]
        self._primal, self._tan = primal, tan
        self._memory.refreshed(self)
        return self.__dict__[name]


def make_stale(x: DualTensor, layout: Layout) -> None:
    """Drop the parts of a dual: it will fetch them from its memory."""
    del x._primal, x._tan
    x.__class__ = StaleDual  # type: ignore[assignment]
    x._layout = layout  # type: ignore[attr-defined]


def _known_layout(x: DualTensor, origin: int) -> Layout:
    return x._layout if isinstance(x, StaleDual) else Layout.of(primal_of(x), origin)


def shows(x: DualTensor, index: tuple, view: Any) -> bool:
    """Whether ``view`` is the view ``x[index]``: the same entries of the same memory."""
    memory = x._memory
    if memory is None or not isinstance(view, DualTensor) or view._memory is not memory:
        return False
    if any(isinstance(i, (Tensor, list)) for i in index):
        return False  # copies
    return Layout.of(primal_of(x)[index], memory.origin) == _known_layout(view, memory.origin)


def keeps_strides(target: DualTensor, value: Any) -> bool:
    """Whether ``value`` can replace a dual that has no views (or is not laid out densely: then its strides go)."""
    old, new = primal_of(target), primal_of(value)
    if old.stride() == new.stride() or (old.is_contiguous() and new.is_contiguous()):
        return True
    if is_functorch_wrapped_tensor(old) or is_functorch_wrapped_tensor(new):
        return True
    return Layout.of(old)._replace(offset=0).extent() != old.numel() * (2 if old.is_complex() else 1)


def _overlap(name: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"{name} writes to a tensor that shows one entry at several places (expand, overlapping unfold), or to a view "
        "of one: call .clone() on it before writing."
    )
