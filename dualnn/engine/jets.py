r"""Collapsed second derivatives: K directions and the mean of their K second derivatives, carried through a program.

Along directions :math:`v_1, …, v_K` an intermediate z(x) has first derivatives :math:`z_k = D z[v_k]` and second ones
:math:`D^2 z[v_k, v_k]`. Only their mean :math:`\bar z` is wanted in the end, and it obeys a chain rule of its own: for
:math:`y = f(z)`

.. math:: y_k = Df(z)[z_k], \qquad \bar y = Df(z)[\bar z] + \frac1K \sum_k D^2 f(z)[z_k, z_k].

So one tensor ``(K + 1, *shape)`` holds all that later operations need, where duals over duals carry ``K * K``.

No op has a rule for this: :math:`y_k` and both terms of :math:`\bar y` are read off its ordinary rule, applied to a
dual over a dual (one direction at each level, all K at once by `torch.func.vmap`). Where f is known to be linear its
rule takes the K + 1 rows as directions. Ops that vmap cannot run keep K * K tangents while they run, and collapse
after. An op that reads tangents itself, and a write to memory that a view shows, raise: never a derivative less.

Reference:
    Li et al. 2023, "A computational framework for neural network-based variational Monte Carlo with forward
    Laplacian", arXiv 2307.08214; Dangel et al. 2025, "Collapsing Taylor mode automatic differentiation", arXiv
    2505.13644.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.dual_tensor import DualTensor, make, primal_of, split, top_level
from dualnn.engine.errors import DualShapeError, UnsupportedOpError
from dualnn.engine.registry import op_name, rule_for
from dualnn.engine.tangents import Dense, Tangent, Zero

# Linear (or affine, or linear between kinks) in all their tensors together: second derivatives do not arise.
LINEAR = frozenset(
    "add sub subtract neg negative positive rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ sum mean "
    "cumsum reshape view flatten unflatten permute transpose t movedim moveaxis swapaxes squeeze unsqueeze expand "
    "expand_as broadcast_to view_as reshape_as cat concat concatenate stack __getitem__ select narrow index_select "
    "gather chunk split split_with_sizes tensor_split unbind where flip roll clone contiguous diagonal diag_embed "
    "diag tril triu repeat tile masked_fill relu leaky_relu detach to float double zeros_like ones_like "
    "__setitem__".split()
)
# Linear in each tensor: second derivatives arise where two of them move.
MULTILINEAR = frozenset(
    "mul multiply __mul__ __rmul__ __imul__ matmul __matmul__ __rmatmul__ mm bmm mv dot outer linear bilinear einsum "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d addmm baddbmm addmv addr".split()
)


class Jet(Tangent):
    """K directions and the mean second derivative along them: ``(K + 1, *shape)``, the mean last; None for zero."""

    __slots__ = ("data",)

    def __init__(self, num: int, data: Tensor | None) -> None:
        super().__init__(num)
        self.data = data

    @property
    def is_zero(self) -> bool:  # type: ignore[override]
        """Whether the value does not depend on the directions."""
        return self.data is None

    @property
    def requires_grad(self) -> bool:
        """Whether autograd tracks the derivatives."""
        return self.data is not None and self.data.requires_grad

    def dense(self) -> Tensor:
        """Raise: whoever takes the rows for directions would lose the second derivative."""
        raise UnsupportedOpError(
            "an operation that reads tangents itself (a custom derivative, or .tangent in the function) met the "
            "collapsed pass of dualnn.laplacian. Use laplacian(..., method='nested')."
        )


class JetTensor(DualTensor):
    """A value with a `Jet`; every operation arrives in `through`."""

    _above: int  # the level of the outer of two duals, above ``_level``
    _relatives: list[weakref.ref]  # this tensor, its base and its views

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Send one torch call through its rule for duals over duals."""
        return through(func, args, kwargs or {})

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether autograd tracks the value or its derivatives."""
        return self._primal.requires_grad or self._tan.requires_grad


def jet(primal: Tensor, data: Tensor | None, num: int, level: int, above: int) -> JetTensor:
    """Put a value and its jet together."""
    shell = Tensor._make_wrapper_subclass(JetTensor, primal.shape, dtype=primal.dtype, device=primal.device)  # type: ignore[attr-defined]
    shell._primal, shell._tan, shell._level = primal, Jet(num, data), level
    shell._above, shell._relatives = above, [weakref.ref(shell)]
    return shell


def through(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Apply an op to jets (and to anything beside them)."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    rule = rule_for(func)
    level = top_level(leaves)
    own = {id(x): x for x in leaves if isinstance(x, JetTensor) and x._level == level}
    if not own or getattr(rule, "on_parts", False):  # a dual of a higher level; a body whose parts arrive one by one
        return rule(func, args, kwargs)
    return _Op(func, rule, leaves, spec, list(own.values())).run()


class _Op:
    """One call of an op on jets."""

    def __init__(self, func: Callable, rule: Callable, leaves: list, spec: Any, jets: list[JetTensor]) -> None:
        self.func, self.rule, self.leaves, self.spec, self.jets = func, rule, leaves, spec, jets
        self.level, self.above, self.num = jets[0]._level, jets[0]._above, jets[0]._tan.num
        if any(j._tan.num != self.num for j in jets):
            raise DualShapeError(f"{op_name(func)} met jets with different numbers of directions")
        self.shape: Any = None  # of the result's nesting
        self.plan: list[tuple[str, Any]] = []  # a leaf of the result: "plain" itself, the "same" jet, a "new" one
        self.written: list[int] = []  # jets that the op wrote to

    def run(self) -> Any:
        """The op's result, jets for duals."""
        moving = [j for j in self.jets if not j._tan.is_zero]
        if not moving or self._linear():
            found = self._together()
        elif self.rule is reverse_rule:
            found = self._in_turn()
        elif any(isinstance(x, DualTensor) for x in (*self._constants(), *(j._primal for j in self.jets))) or any(
            isinstance(j._tan.data, DualTensor)  # type: ignore[attr-defined]
            for j in self.jets
        ):
            found = self._squared()
        else:
            try:
                found = self._mapped()
            except (RuntimeError, ValueError):  # vmap cannot run it: control flow on values, no batching rule, …
                found = self._squared()
        return self._result(found)

    def _constants(self) -> list[Any]:
        return [x for x in self.leaves if not any(x is j for j in self.jets)]

    def _linear(self) -> bool:
        name = getattr(self.func, "__name__", "")
        if not name.startswith("__"):
            name = name.rstrip("_")  # in place
        if name in LINEAR:
            return True
        moving = [x for x in self.leaves if isinstance(x, JetTensor) and x._level == self.level and not x._tan.is_zero]
        if name in MULTILINEAR:
            return len(moving) == 1
        quotient = name in ("div", "divide", "true_divide", "__truediv__", "__itruediv__")
        return quotient and len(moving) == 1 and moving[0] is self.leaves[0]

    def _call(self, duals: list[DualTensor]) -> list[DualTensor]:
        """Apply the rule to duals in place of the jets; the duals among its results, then the written operands."""
        before = [(d._primal, d._tan) for d in duals]
        place = {id(j): d for j, d in zip(self.jets, duals, strict=True)}
        args, kwargs = pytree.tree_unflatten([place.get(id(x), x) for x in self.leaves], self.spec)
        out, self.shape = pytree.tree_flatten(self.rule(self.func, args, kwargs))
        self.plan, found = [], []
        for x in out:
            which = [n for n, d in enumerate(duals) if d is x]
            if which:
                self.plan.append(("same", which[0]))
            elif isinstance(x, DualTensor) and x._level in (self.level, self.above):
                self.plan.append(("new", None))
                found.append(x)
            else:
                self.plan.append(("plain", x))
        after = [(d._primal, d._tan) for d in duals]
        pairs = enumerate(zip(before, after, strict=True))
        self.written = [n for n, ((p, t), (q, u)) in pairs if p is not q or t is not u]
        return found + [duals[n] for n in self.written]

    def _together(self) -> list[tuple[Tensor, Tensor | None]]:
        """A linear op takes the K directions and the mean alike."""
        size = self.num + 1
        duals = []
        for j in self.jets:
            data = j._tan.data  # type: ignore[attr-defined]
            duals.append(make(j._primal, Zero(size) if data is None else Dense(data), self.level))
        parts = [split(d, self.level) for d in self._call(duals)]
        return [(value, None if tan is None else tan.dense()) for value, tan in parts]

    def _nested(self, first: Sequence[Tensor | None], size: int) -> list[DualTensor]:
        """Duals over duals with ``size`` directions at both levels, the mean being the derivative of each direction."""
        duals = []
        for j, t in zip(self.jets, first, strict=True):
            inner, outer = make(j._primal, Zero(size), self.level), cast(Tangent, Zero(size))
            if t is not None:
                mean = j._tan.data[-1].expand(size, size, *j.shape)  # type: ignore[attr-defined]
                inner, outer = make(j._primal, Dense(t), self.level), Dense(make(t, Dense(mean), self.level))
            duals.append(make(inner, outer, self.above))
        return duals

    def _parts(self, y: DualTensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Value, first and second derivatives ``(size, *shape)`` and ``(size, size, *shape)`` of a result."""
        inner, outer = split(y, self.above)
        value, _ = split(inner, self.level)
        if outer is None:
            return value, None, None
        first, second = split(outer.dense(), self.level)
        return value, first, None if second is None else second.dense()

    def _joined(self, value: Tensor, first: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if first is None:
            return value, None
        mean = torch.zeros_like(first[:1]) if mean is None else mean.unsqueeze(0)
        return value, torch.cat([first, mean])

    def _first(self) -> list[Tensor | None]:
        return [None if j._tan.is_zero else j._tan.data[:-1] for j in self.jets]  # type: ignore[attr-defined]

    def _squared(self) -> list[tuple[Tensor, Tensor | None]]:
        """Uncollapsed: all pairs of directions, of which the diagonal is kept."""
        found = []
        for y in self._call(self._nested(self._first(), self.num)):
            value, first, second = self._parts(y)
            found.append(self._joined(value, first, None if second is None else second.diagonal(0, 0, 1).mean(-1)))
        return found

    def _in_turn(self) -> list[tuple[Tensor, Tensor | None]]:
        """One direction after the other, for ops that torch's reverse mode serves."""
        each = []
        for k in range(self.num):
            one = [None if t is None else t[k : k + 1] for t in self._first()]
            each.append([self._parts(y) for y in self._call(self._nested(one, 1))])
        found = []
        for runs in zip(*each, strict=True):
            firsts = [f for _, f, _ in runs]
            seconds = [s[0, 0] for _, _, s in runs if s is not None]
            first = None if firsts[0] is None else torch.cat(firsts)
            mean = sum(seconds[1:], seconds[0]) / self.num if seconds else None
            found.append(self._joined(runs[0][0], first, mean))
        return found

    def _mapped(self) -> list[tuple[Tensor, Tensor | None]]:
        """One direction, mapped over all K: what does not depend on the direction is computed once."""
        moving = [n for n, j in enumerate(self.jets) if not j._tan.is_zero]
        parts: list[list[Any]] = []
        batched: list[tuple[int, int]] = []

        def one(*directions: Tensor) -> tuple[Tensor, ...]:
            first: list[Tensor | None] = [None] * len(self.jets)
            for n, t in zip(moving, directions, strict=True):
                first[n] = t.unsqueeze(0)
            parts[:] = [list(self._parts(y)) for y in self._call(self._nested(first, 1))]
            batched[:] = [(i, k) for i, p in enumerate(parts) for k, x in enumerate(p) if _is_mapped(x)]
            return tuple(parts[i][k] for i, k in batched) or directions[:1]

        rows = self._first()
        with _no_fallback_warnings():
            every = torch.func.vmap(one, randomness="same")(*[cast(Tensor, rows[n]) for n in moving])
        if any(k == 0 for _, k in batched) or any(_is_mapped(x) for _, x in self.plan):
            raise RuntimeError("a value that depends on the direction")
        for (i, k), x in zip(batched, every, strict=False):
            parts[i][k] = x.squeeze(1) if k == 1 else x.mean(0)[0, 0]
        found = []
        for i, (value, first, second) in enumerate(parts):
            if first is not None and (i, 1) not in batched:
                first = first.expand(self.num, *value.shape)
            if second is not None and (i, 2) not in batched:
                second = second[0, 0]
            found.append(self._joined(value, first, second))
        return found

    def _result(self, found: list[tuple[Tensor, Tensor | None]]) -> Any:
        made = [jet(*parts, self.num, self.level, self.above) for parts in found[: len(found) - len(self.written)]]
        for n, parts in zip(self.written, found[len(made) :], strict=True):
            self._write(self.jets[n], *parts)
        for y in made:
            self._relate(y)
        new = iter(made)
        out = [x if kind == "plain" else self.jets[x] if kind == "same" else next(new) for kind, x in self.plan]
        return pytree.tree_unflatten(out, self.shape)

    def _write(self, target: JetTensor, value: Tensor, data: Tensor | None) -> None:
        if any(other is not None and other is not target for other in (ref() for ref in target._relatives)):
            raise UnsupportedOpError(
                f"{op_name(self.func)} writes in place to a tensor that shares memory with a view (or is one), which "
                "the collapsed pass of dualnn.laplacian does not follow. Write out of place, or use "
                "laplacian(..., method='nested')."
            )
        target._primal, target._tan = value, Jet(self.num, data)
        target._relatives = [weakref.ref(target)]

    def _relate(self, y: JetTensor) -> None:
        """Note whose memory a result shows."""
        for j in self.jets:
            if _share(primal_of(y), primal_of(j)):
                if len(j._relatives) % 64 == 0:  # forget those that are gone
                    j._relatives[:] = [ref for ref in j._relatives if ref() is not None]
                y._relatives = j._relatives
                j._relatives.append(weakref.ref(y))
                return


def _is_mapped(x: Any) -> bool:
    """Whether the innermost vmap has a dimension in ``x``."""
    return (
        isinstance(x, Tensor)
        and _functorch.is_batchedtensor(x)
        and _functorch.maybe_get_level(x) == _functorch.maybe_current_level()
    )


@contextmanager
def _no_fallback_warnings() -> Iterator[None]:
    """That vmap maps some op by a loop is no news to a user of `laplacian`."""
    warned = torch._C._debug_only_are_vmap_fallback_warnings_enabled()  # type: ignore[attr-defined]
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(warned)  # type: ignore[attr-defined]


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two values may show one memory (under a transform of torch.func it cannot be asked for)."""
    if _functorch.is_functorch_wrapped_tensor(a) or _functorch.is_functorch_wrapped_tensor(b):
        return True
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _operator(name: str) -> Callable:
    method = getattr(Tensor, name)
    return lambda self, other: through(method, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "pow"):
    # DualTensor's own skip __torch_function__.
    setattr(JetTensor, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(JetTensor, f"__r{_name}__", _operator(f"__r{_name}__"))
