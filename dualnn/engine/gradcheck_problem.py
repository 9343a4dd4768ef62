"""What `gradcheck` checks: a function of named float64 tensors, its differences, and its derivatives in every mode."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.engine.bridge_linear import is_float
from dualnn.engine.differences import Difference, line_derivative
from dualnn.engine.errors import DualInputError
from dualnn.engine.parameters import swapped
from dualnn.engine.tangents import Dense, Tangent
from dualnn.engine.transforms import dense_of, push


class Problem:
    """A function of named float64 tensors that returns one vector, and its derivatives in every way."""

    def __init__(self, fn: Callable, inputs: Any, entries: int) -> None:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        leaves, self.spec = pytree.tree_flatten(args)
        self.title = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", type(fn).__name__)
        self.module = copy.deepcopy(fn).double() if isinstance(fn, nn.Module) else None
        self.fn = self.module or fn
        self.leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self.where = [i for i, x in enumerate(leaves) if is_float(x) and x.numel()]
        self.parameters = [p for p in self.module.parameters() if is_float(p)] if self.module is not None else []
        owned = {p: n for n, p in self.module.named_parameters()} if self.module is not None else {}
        floats = [self.leaves[i].to(torch.float64) for i in self.where]
        self.tensors = [*floats, *(p.detach().clone() for p in self.parameters)]
        self.names = [*(f"input {i}" for i in self.where), *(owned[p] for p in self.parameters)]
        if not self.tensors:
            raise DualInputError(
                "gradcheck found no floating point tensor with entries among the inputs and parameters"
            )
        for name, t in zip(self.names, self.tensors, strict=True):
            if not torch.isfinite(t).all():
                raise DualInputError(f"gradcheck needs finite numbers, {name} holds {_count_bad(t)} that are not")
        # A generator of its own: a check must not move the caller's random stream.
        generator = torch.Generator().manual_seed(0)
        self.entries = [_spread(t.numel(), entries) for t in self.tensors]
        self.direction = [_away_from_zero(t, generator) for t in self.tensors]
        self.shapes: list[torch.Size] = []
        value = self(*self.tensors).detach()
        if not torch.isfinite(value).all():
            raise DualInputError(
                f"{self.title} returns {_count_bad(value)} numbers that are not finite: move the inputs"
            )
        if not torch.equal(value, self(*self.tensors).detach()):
            raise DualInputError(
                f"{self.title} is not deterministic: two calls differ (dropout? use .eval(), or fix its random numbers)"
            )
        self.value = value
        self.weights = _away_from_zero(value, generator)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """All floating point outputs in one vector."""
        filled = list(self.leaves)
        for i, t in zip(self.where, tensors, strict=False):
            filled[i] = t * 1  # functions that work in place work on a result, as they may inside a network
        args = pytree.tree_unflatten(filled, self.spec)
        if self.module is None:
            out = self.fn(*args)
        else:
            given = dict(zip(self.parameters, tensors[len(self.where) :], strict=True))
            with swapped(self.module, given), _own_buffers(self.module):  # type: ignore[arg-type]
                out = self.fn(*args)
        results = [y for y in pytree.tree_leaves(out) if is_float(y)]
        if not results:
            raise DualInputError(f"{self.title} returns no floating point tensor: there is nothing to differentiate")
        self.shapes = [y.shape for y in results]
        for y in results:
            if y.dtype != torch.float64:
                raise DualInputError(
                    f"{self.title} returns {y.dtype} for inputs in float64: differences cannot see through its "
                    "rounding. Let it follow its inputs' dtype."
                )
        return torch.cat([y.reshape(-1) for y in results])

    def first(self, i: int, j: int, step: float, rtol: float, atol: float) -> Difference:
        """Difference of all outputs in entry j of tensor i."""
        unit = [torch.zeros_like(t) for t in self.tensors]
        unit[i].view(-1)[j] = 1
        return line_derivative(functools.partial(self._along, unit), 1, step, rtol, atol)

    def mixed(self, i: int, j: int, step: float, rtol: float, atol: float) -> Difference:
        r"""Second difference along e_j and v, by polarisation: :math:`[D^2_{v+e} - D^2_{v-e}] / 4`."""
        lines = []
        for sign in (1, -1):
            unit = [v.clone() for v in self.direction]
            unit[i].view(-1)[j] += sign
            lines.append(line_derivative(functools.partial(self._along, unit), 2, step, rtol, atol))
        plus, minus = lines
        return Difference((plus.value - minus.value) / 4, (plus.error + minus.error) / 4, plus.kink | minus.kink)

    def _along(self, unit: list[Tensor], h: float) -> Tensor:
        return self(*[t + h * u for t, u in zip(self.tensors, unit, strict=True)]).detach()

    def _basis(self, i: int) -> list[Tangent | None]:
        x, chosen = self.tensors[i], self.entries[i]
        rows = x.new_zeros((len(chosen), x.numel()))
        rows[torch.arange(len(chosen)), torch.tensor(chosen)] = 1
        return [Dense(rows.reshape(-1, *x.shape)) if k == i else None for k in range(len(self.tensors))]

    def _along_v(self, *tensors: Tensor) -> Tensor:
        """J v."""
        out, tan = push(self, tensors, [Dense(v[None]) for v in self.direction])
        return dense_of(tan, out)[0]  # type: ignore[index]

    def derivative(self, mode: str, i: int) -> Tensor:
        """``(entries, outputs)`` in forward modes; ``(entries, 1)``, contracted with weights, in reverse ones."""
        if mode in ("forward", "forward over forward"):
            out, tan = push(self if mode == "forward" else self._along_v, self.tensors, self._basis(i))
            if mode == "forward" and not torch.allclose(out.detach(), self.value, rtol=1e-9, atol=1e-12):
                raise WrongValueError(float((out.detach() - self.value).abs().max()))
            return dense_of(tan, out).detach()  # type: ignore[union-attr]
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in self.tensors]
            out = self._along_v(*leaves) if mode == "reverse over forward" else self(*leaves)
            total = (self.weights * out).sum()
            if mode == "reverse over reverse":
                grads = _grad(total, leaves, create_graph=True)
                total = sum(((g * v).sum() for g, v in zip(grads, self.direction, strict=True)), torch.zeros(()))
            grad = _grad(total, leaves)[i].reshape(-1)
        return grad[torch.tensor(self.entries[i], device=grad.device)].unsqueeze(1)

    def place(self, i: int, entry: int, output: int | None) -> str:
        """Where an entry stands, in words."""
        text = f"[{_index(self.tensors[i].shape, entry)}]"
        if output is None:
            return text
        for k, shape in enumerate(self.shapes):
            if output < shape.numel():
                return f"{text} -> out{k if len(self.shapes) > 1 else ''}[{_index(shape, output)}]"
            output -= shape.numel()
        return text


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Give a call copies of the buffers: a running mean moved by one evaluation must not reach the next.

    Writing the old numbers back would do for values, but autograd refuses a saved buffer that was written to.
    """
    before = [(sub, name, b) for sub in module.modules() for name, b in sub._buffers.items() if b is not None]
    try:
        for sub, name, buffer in before:
            sub._buffers[name] = buffer.clone()
        yield
    finally:
        for sub, name, buffer in before:
            sub._buffers[name] = buffer


class WrongValueError(Exception):
    """The value under duals is another one than without."""


def _grad(total: Tensor, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zeros for what the graph does not reach."""
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def _count_bad(t: Tensor) -> str:
    return f"{int((~torch.isfinite(t)).sum())} of {t.numel()}"


def _spread(total: int, most: int) -> list[int]:
    """At most ``most`` indices below ``total``, evenly spread."""
    if total <= most:
        return list(range(total))
    return sorted({(2 * k + 1) * total // (2 * most) for k in range(most)})


def _away_from_zero(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of both signs, of size 0.5 to 1.5: no entry is lost by a lucky zero."""
    x = torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (x + 0.5 * torch.where(x < 0, -1.0, 1.0)).to(like.device)


def _index(shape: Sequence[int], flat: int) -> str:
    found = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        found.append(str(rest))
    return ", ".join(reversed(found))
