"""One pass of a step with perturbed activities: what `ActivityPerturbation` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from dualnn.engine.directions import Directions, mixed
from dualnn.engine.dual_tensor import DualTensor, make
from dualnn.engine.errors import StructureError
from dualnn.engine.patching import patched_forwards
from dualnn.engine.per_sample import keep_samples
from dualnn.engine.tangents import Dense, PerSample
from dualnn.signals.outside import OutsideUse


@dataclasses.dataclass
class _Record:
    """One perturbed output: where its one-layer graph ends, its directions' block, parameters it may depend on.

    The output itself is not kept: most layers do not need it for their derivative.
    """

    edge: GradientEdge | None
    shape: torch.Size
    like: Tensor
    index: int
    offset: int
    parameters: list[nn.Parameter]


def _owners(module: nn.Module) -> list[nn.Module]:
    """The modules to perturb: those that own trainable parameters, and those that run their submodules as one layer."""
    found: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for m in module.modules():
        if m in inner:
            continue
        if getattr(m.__dict__.get("forward", m), "one_layer", False):
            inner.update(m.modules())
            own = list(m.parameters())
        else:
            own = [p for p in m._parameters.values() if p is not None]
        if any(p.requires_grad for p in own):
            found.append(m)
    return found


class PerturbedRun:
    """One pass with perturbed outputs, and the gradients that follow from the loss's derivatives along them."""

    def __init__(
        self, directions: Directions, level: int, per_sample: bool, probing: bool, outside: OutsideUse | None
    ) -> None:
        self.directions, self.level = directions, level
        self.per_sample, self.probing, self.outside = per_sample, probing, outside
        self.records: list[_Record] = []
        self.offset = 0
        self.batch = 0
        self.chosen = torch.zeros(0, dtype=torch.bool)
        self._keeping: Any = None
        self._enclosing: dict[nn.Parameter, None] = {}

    @contextmanager
    def perturbing(self, module: nn.Module) -> Iterator[None]:
        """Patch ``forward`` of every module that owns trainable parameters."""
        try:
            with patched_forwards({m: self._perturbed(m, m.forward) for m in _owners(module)}):
                yield
        finally:
            if self._keeping is not None:
                self._keeping.__exit__(None, None, None)

    def _perturbed(self, module: nn.Module, forward: Callable) -> Callable:
        own = dict.fromkeys(p for p in module.parameters() if p.requires_grad)

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self._enclosing
            self._enclosing = before | own
            try:
                with self.outside.inside() if self.outside else nullcontext():
                    # The graph of this one layer: its inputs are cut off, but for parameters that the module around
                    # it has put on the way since the last perturbed output (a class token, a table of positions).
                    with torch.enable_grad():
                        output = forward(*args, **kwargs)
                    return pytree.tree_map_only(Tensor, lambda z: self._perturb(z, list(before | own)), output)
            finally:
                self._enclosing = before

        return run

    def _perturb(self, z: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        value = z._primal if isinstance(z, DualTensor) and z._level == self.level else z
        if not value.dtype.is_floating_point:
            return z
        if self.per_sample:
            self._see_batch(value)
        edge = get_gradient_edge(value) if value.requires_grad else None
        record = _Record(edge, value.shape, value.new_empty(0), len(self.records), self.offset, parameters)
        self.records.append(record)
        self.offset += self._perturbed_shape(value.shape).numel()
        u = self._directions(record)
        if self.probing:
            rows = self.chosen.repeat_interleave(len(value) // self.batch).reshape(-1, *(1,) * (value.dim() - 1))
            u = torch.cat([u, u[:1] * rows.to(u.dtype), u[:1] * (~rows).to(u.dtype)])
        if value is not z and not z._tan.is_zero:  # type: ignore[attr-defined]
            u = u + z._tan.dense().detach()  # type: ignore[attr-defined]
        return make(value.detach(), Dense(u), self.level)

    def _see_batch(self, value: Tensor) -> None:
        """The first perturbed output tells the batch size; later ones must be whole multiples of it."""
        if not self.batch:
            if value.dim() == 0:
                raise StructureError("a perturbed output is a scalar: there is no sample axis. Use per_sample=False.")
            self.batch = len(value)
            generator = torch.Generator().manual_seed(mixed(self.directions.key, -1))
            self.chosen = torch.rand(self.batch, generator=generator).argsort() < (self.batch + 1) // 2
            self.chosen = self.chosen.to(value.device)
            self._keeping = keep_samples(self.level, self.batch)
            self._keeping.__enter__()
        if value.dim() == 0 or len(value) % self.batch:
            raise StructureError(
                f"a perturbed output has shape {tuple(value.shape)}, but the batch has {self.batch} samples: its first "
                "axis is not the batch. Use per_sample=False."
            )

    def _perturbed_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the perturbed entries: those of one sample, or of the whole output."""
        if not self.per_sample:
            return shape
        return torch.Size((shape[0] // self.batch if self.batch else 0, *shape[1:]))

    def _directions(self, record: _Record) -> Tensor:
        """Directions ``(K, *output.shape)``: independent for every sample, or unit vectors shared by all samples."""
        shape = record.shape
        if self.per_sample and self.directions.sampler == "basis":
            one = self.directions.draw(record.index, record.offset, tuple(self._perturbed_shape(shape)), record.like)
            return one.unsqueeze(1).expand(-1, self.batch, *one.shape[1:]).reshape(-1, *shape)
        return self.directions.draw(record.index, record.offset, tuple(shape), record.like)

    def slopes(self, loss: DualTensor) -> Tensor:
        """Derivatives of the loss: ``(K,)``, or ``(K, B)`` per sample."""
        tan = loss._tan
        if not self.per_sample:
            return tan.dense().reshape(-1)
        if not isinstance(tan, PerSample):
            raise StructureError(
                "the loss lost the batch axis by an operation that does not keep samples apart (only sums, means and "
                "torch's losses do). Use per_sample=False."
            )
        return tan.samples().reshape(-1, tan.batch)

    def gradients(self, slopes: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
        """Each layer's vector-Jacobian product with its estimated output gradient, one layer at a time."""
        wanted = set(parameters)
        sums: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)
        while self.records:
            record = self.records.pop()
            if record.edge is None:
                continue
            u = self._directions(record)
            weights = slopes.to(u.dtype)
            if self.per_sample:
                weights = weights.repeat_interleave(record.shape[0] // self.batch, 1)
                estimate = torch.einsum("kb,kb...->b...", weights, u)
            else:
                estimate = torch.tensordot(weights, u, dims=1)
            own = [p for p in record.parameters if p in wanted]
            # Other outputs of the same call share the graph; it goes with the last record of them.
            found = torch.autograd.grad(record.edge, own, estimate, retain_graph=True, allow_unused=True)
            for p, g in zip(own, found, strict=True):
                if g is not None:
                    seen = sums[p]
                    sums[p] = g if seen is None else seen + g
        return sums
