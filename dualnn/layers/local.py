"""Run a function or module on duals inside ordinary backprop: the common core of `Dual` and of swapped modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.engine.bridge import Opaque, elementwise
from dualnn.engine.bridge_dense import dense
from dualnn.engine.errors import DualInputError, StructureError, unknown_name
from dualnn.engine.parameters import swapped
from dualnn.engine.snapshot import Snapshot
from dualnn.layers.structure import concrete, elementwise_layout

STRUCTURES = ("elementwise", "dense", "auto")
DENSE_LIMIT = 4096


class LocalCall:
    """Differentiates one callable by duals, with a structure that is claimed or found.

    Args:
        structure: ``"elementwise"``, ``"dense"`` or ``"auto"``.
        probe_every: Check the structure at the first call (for each rank of inputs), then every so many calls.

    Attributes:
        chosen: What ``"auto"`` found at the last probe.
    """

    def __init__(self, structure: str = "auto", probe_every: int = 1000) -> None:
        if structure not in STRUCTURES:
            raise unknown_name("structure", structure, STRUCTURES)
        if probe_every < 1:
            raise DualInputError(f"probe_every must be at least 1, got {probe_every}")
        self.structure, self.probe_every = structure, probe_every
        self.chosen: str | None = None if structure == "auto" else structure
        self._layouts: dict[tuple, Any] = {}
        self._calls = 0

    def __call__(self, run: Callable, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call ``run(*args, **kwargs)``; ``module`` owns the parameters that it uses."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        inputs = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype.is_floating_point]
        parameters = [] if module is None else list(module.parameters())

        def flat(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for i, t in zip(inputs, tensors, strict=False):
                filled[i] = t
            call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
            if module is None:
                return run(*call_args, **call_kwargs)
            given = zip(parameters, tensors[len(inputs) :], strict=True)
            with swapped(module, {p: t.reshape(p.shape) for p, t in given}):
                return run(*call_args, **call_kwargs)

        tensors = [*[leaves[i] for i in inputs], *parameters]
        if not tensors:
            raise DualInputError("nothing to differentiate: no floating point tensor among the inputs and parameters")
        structure, layout = self._structure(flat, tensors, len(inputs), module)
        if structure == "dense":
            return dense(flat, *tensors)
        viewed = [t if shape is None else t.reshape(shape) for t, shape in zip(tensors, layout, strict=True)]
        return elementwise(Opaque(flat), *viewed)

    def _structure(
        self, flat: Callable, tensors: Sequence[Tensor], inputs: int, module: nn.Module | None
    ) -> tuple[str, Any]:
        if self.structure == "dense":
            return "dense", None
        key = tuple(t.dim() for t in tensors)
        probing = key not in self._layouts or self._calls % self.probe_every == 0
        self._calls += 1
        if probing:
            self._layouts[key] = self._probe(flat, tensors, inputs, module)
        layout = self._layouts[key]
        self.chosen = "dense" if layout is None else "elementwise"
        return self.chosen, layout

    def _probe(self, flat: Callable, tensors: Sequence[Tensor], inputs: int, module: nn.Module | None) -> Any:
        """The elementwise layout, or None for dense; leaves random states and buffers as they were."""
        plain = [concrete(t) for t in tensors]
        before = Snapshot(module or nn.Module())
        try:
            with torch.no_grad():
                return elementwise_layout(flat, plain, inputs)
        except StructureError as reason:
            total = sum(t.numel() for t in plain)
            if self.structure == "elementwise":
                raise
            if total > DENSE_LIMIT:
                raise StructureError(
                    f"this function is not elementwise ({reason}), and a dense Jacobian would push {total} tangents, "
                    f"one per input and parameter (limit {DENSE_LIMIT}). Wrap a smaller part of it, or say "
                    "structure='dense' to insist."
                ) from reason
            return None
        finally:
            before.restore()
