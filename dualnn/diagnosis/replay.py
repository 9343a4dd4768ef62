r"""A submodule alone: a copy in float64, run again and again from the same state, differentiated in two ways.

With a fixed random covector g and a direction v in one leaf (a parameter or an input), reverse mode gives
:math:`\langle J^T g, v\rangle` and central differences :math:`\langle g, Jv\rangle`. They must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.diagnosis.recording import Call
from dualnn.diagnosis.state import ModuleState, RandomStates
from dualnn.diagnosis.tracer import is_real, tensors_in

WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


@dataclasses.dataclass
class Leaf:
    """A tensor in which a submodule is differentiated.

    Attributes:
        name: ``weight``, ``input 0``.
        base: The point (a plain tensor, replaced when the replay moves to another point).
        parameter: The parameter of the copy, None for an input.
        index: Position among the call's leaves, -1 for a parameter.
        needed: Whether training needs this derivative.
        scale: The size of the numbers.
    """

    name: str
    base: Tensor
    parameter: nn.Parameter | None
    index: int
    needed: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """A central difference along a direction: <g, Jv>, its size |Jv|, the largest |output| beside it."""

    value: float
    size: float
    noise: float

    def near(self, other: float, tolerance: float) -> bool:
        """Whether another number for the same derivative agrees."""
        return abs(self.value - other) <= tolerance * max(self.size, abs(self.value)) + self.noise


class Replay:
    """Runs one call of one submodule in isolation.

    Args:
        module: The submodule (it is copied).
        call: Its arguments.
        method: What to call on it.
        method: What to call.
        wide: Compute in float64.
    """

    def __init__(self, module: nn.Module, call: Call, method: str = "forward", wide: bool = True) -> None:
        self.call, self.method, self.wide = call, method, wide
        self.module = copied(module)
        if wide:
            self.module = _widened(self.module)
        self.leaves_in = [self._convert(x) for x in call.leaves]
        self.state = ModuleState(self.module, parameters=False)
        self.dirty: set[int] = set()  # parameters that are not at their base
        self.random = RandomStates()
        self.leaves: list[Leaf] = []
        held, self.rows = _embeddings(self.module)
        for name, p in self.module.named_parameters():
            if p.requires_grad and is_real(p) and id(p) not in held:
                self.leaves.append(Leaf(name, p.detach().clone(), p, -1, True, _scale(p)))
        for i, x in enumerate(self.leaves_in):
            if is_real(x) and x.numel():
                self.leaves.append(Leaf(call.names[i], x, None, i, call.needed[i], _scale(x)))
        self.leaves = [leaf for leaf in self.leaves if leaf.base.numel()]
        self.covectors: list[Tensor] = []

    def _convert(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return _packed(x) if self.wide else x
        x = x.detach().clone()
        if self.wide and (x.dtype.is_floating_point or x.dtype in WIDE):
            return x.to(WIDE.get(x.dtype, torch.float64))
        return x

    def run(
        self, inputs: Sequence[int] = (), shift: dict[int, Tensor] | None = None, around: Any = None
    ) -> list[Tensor]:
        """One evaluation from the recorded state.

        Args:
            inputs: Leaves (by position) that must require grad, beside the parameters.
            shift: What to add to leaves.
            around: A context for the module's own run.

        Returns:
            The float tensors that come out.
        """
        shift = shift or {}
        self.state.restore()
        self.random.restore()
        filled = [x.clone() if isinstance(x, Tensor) else x for x in self.leaves_in]
        self.sources: dict[int, Tensor] = {}
        for k, leaf in enumerate(self.leaves):
            value = leaf.base + shift[k] if k in shift else leaf.base
            if leaf.parameter is not None:
                if k in shift or k in self.dirty:
                    leaf.parameter.data.copy_(value)
                    (self.dirty.add if k in shift else self.dirty.discard)(k)
                self.sources[k] = leaf.parameter
                continue
            given = value.detach().clone()
            if k in inputs:
                given.requires_grad_()
                self.sources[k] = given
                given = given * 1  # a module may overwrite its input, which no leaf allows
            filled[leaf.index] = given
        args, kwargs = pytree.tree_unflatten(filled, self.call.spec)
        with quiet(), torch.enable_grad(), torch.inference_mode(False):
            call = self.module if self.method == "forward" else getattr(self.module, self.method)
            with around or nullcontext():
                result = call(*args, **kwargs)
        return [t for t in tensors_in(result) if is_real(t)]

    @contextmanager
    def patched(self, forward: Callable) -> Iterator[None]:
        """Let the copy run another ``forward``."""
        attributes = self.state.modules[0][1]
        before = attributes.get("forward")
        attributes["forward"] = forward
        try:
            yield
        finally:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before
            self.state.restore()

    def close(self) -> None:
        """Leave the random generators as they were."""
        self.random.restore()

    def covector(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random numbers for the finite outputs, zeros for the others; the same at every call."""
        if [g.shape for g in self.covectors] != [y.shape for y in outputs]:
            self.covectors = covectors(outputs)
        return self.covectors

    def direction(self, k: int, seed: int = 0) -> Tensor:
        """A random direction in a leaf, of the size of its numbers; zero where they are not finite."""
        base = self.leaves[k].base
        generator = torch.Generator().manual_seed(1000 * seed + k)
        v = torch.randn(base.shape, generator=generator, dtype=base.dtype).to(base.device)
        v = v * self.leaves[k].scale
        if (row := self.rows.get(id(self.leaves[k].parameter))) is not None:
            v[row] = 0
        return v if bool(base.sum().isfinite()) else torch.where(torch.isfinite(base), v, 0)

    def reverse(self, which: Sequence[int]) -> dict[int, Tensor | None]:
        """Gradients of <g, y> by reverse mode, for some leaves."""
        return self.backward(self.run(inputs=which), which)

    def backward(self, outputs: Sequence[Tensor], which: Sequence[int]) -> dict[int, Tensor | None]:
        """The backward half of `reverse`."""
        found: dict[int, Tensor | None] = dict.fromkeys(which)
        covectors = self.covector(outputs)
        pairs = [(y, g) for y, g in zip(outputs, covectors, strict=True) if y.requires_grad]
        sources = {k: self.sources[k] for k in which}
        if pairs and sources:
            try:
                with quiet():
                    grads = torch.autograd.grad(
                        [y for y, _ in pairs], list(sources.values()), [g for _, g in pairs], allow_unused=True
                    )
            except Exception as error:
                raise BackwardError(str(error)) from error
            found |= dict(zip(sources, grads, strict=True))
        return found

    def difference(self, direction: dict[int, Tensor], step: float) -> Difference:
        """The central difference along a direction, at the present point."""
        ahead = self.values({k: v * step for k, v in direction.items()})
        behind = self.values({k: v * -step for k, v in direction.items()})
        value = square = largest = 0.0
        for a, b, g in zip(ahead, behind, self.covector(ahead), strict=True):
            slope = torch.where(g == 0, 0, (a - b) / (2 * step))
            value += float((slope * g).sum())
            square += float((slope * slope).sum())
            largest += float((torch.where(g == 0, 0, a) ** 2).sum())
        precision = max((torch.finfo(y.dtype).eps for y in ahead), default=0.0)
        return Difference(value, square**0.5, 1e3 * precision * largest**0.5 / step)

    def values(self, shift: dict[int, Tensor]) -> list[Tensor]:
        """Outputs at a shifted point, without a graph."""
        outputs = [y.detach() for y in self.run(shift=shift)]
        if self.covectors and [y.shape for y in outputs] != [g.shape for g in self.covectors]:
            raise ShapeChanged("the shapes of its results depend on the values")
        return outputs

    @contextmanager
    def moved(self, seed: int, size: float) -> Iterator[None]:
        """Go to a random point nearby: off ties and kinks."""
        before = [leaf.base for leaf in self.leaves]
        covectors = self.covectors
        try:
            for k, leaf in enumerate(self.leaves):
                leaf.base = leaf.base + size * self.direction(k, seed)
                self.dirty.add(k)
            self.covectors = []
            yield
        finally:
            for k, (leaf, base) in enumerate(zip(self.leaves, before, strict=True)):
                leaf.base = base
                self.dirty.add(k)
            self.covectors = covectors


def covectors(outputs: Sequence[Tensor]) -> list[Tensor]:
    """For each finite output a number in ±[0.5, 1.5), zero for the others (mere signs often cancel)."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for y in outputs:
        g = torch.rand(y.shape, generator=generator) + 0.5
        g = torch.where(torch.rand(y.shape, generator=generator) < 0.5, -g, g).to(y)
        found.append(torch.where(torch.isfinite(y.detach()), g, 0))
    return found


class BackwardError(Exception):
    """The backward pass of a replay raised (``__cause__`` says what)."""


class ShapeChanged(Exception):
    """A replay cannot be compared with another: the shapes of its results differ."""


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: the user's own run shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _scale(x: Tensor) -> float:
    x = x.detach()
    size = float(torch.linalg.vector_norm(x)) / max(x.numel(), 1) ** 0.5
    if not math.isfinite(size):
        finite = x[torch.isfinite(x)]
        size = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    return size if size > 0 else 1.0


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; results of earlier runs that the module keeps (which torch refuses to copy) are detached."""
    memo: dict[int, Any] = {}
    for sub in module.modules():
        for value in sub.__dict__.values():
            for t in tensors_in(value, 3):
                if not t.is_leaf:
                    memo[id(t)] = t.detach().clone()
    return copy.deepcopy(module, memo)


def _widened(module: nn.Module) -> nn.Module:
    """To float64, plain tensor attributes included."""
    module = module.double()
    for sub in module.modules():
        for name, value in list(sub.__dict__.items()):
            if is_real(value):
                sub.__dict__[name] = value.double()
            elif isinstance(value, (list, tuple)) and value and all(is_real(v) for v in value):
                if name != "_flat_weights":
                    sub.__dict__[name] = type(value)(v.double() for v in value)
    return module


def _embeddings(module: nn.Module) -> tuple[set[int], dict[int, int]]:
    """Embeddings have another gradient than the derivative, on purpose.

    Returns:
        Weights whose gradient is rescaled, or which are renormed in the forward pass; and the padding rows of others.
    """
    held: set[int] = set()
    rows: dict[int, int] = {}
    for sub in module.modules():
        if isinstance(sub, (nn.Embedding, nn.EmbeddingBag)):
            if sub.scale_grad_by_freq or sub.max_norm is not None:
                held.add(id(sub.weight))
            elif sub.padding_idx is not None:
                rows[id(sub.weight)] = sub.padding_idx
    return held, rows


def _packed(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, nn.utils.rnn.PackedSequence) else x


def attempt(run: Callable[[], Any]) -> Any:
    """The result, or the error that came instead."""
    try:
        return run()
    except Exception as error:
        return error
