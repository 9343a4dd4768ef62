"""Run a function or module on duals inside ordinary backprop: the common core of `Dual` and of swapped modules."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.engine.bridge import Opaque, elementwise
from dualnn.engine.bridge_columns import Layout, block
from dualnn.engine.bridge_random import estimated
from dualnn.engine.directions import Directions, mixed
from dualnn.engine.errors import DualInputError, StructureError, unknown_name
from dualnn.engine.parameters import swapped
from dualnn.engine.snapshot import Snapshot
from dualnn.layers.structure import block_layout, concrete, elementwise_layout

STRUCTURES = ("elementwise", "block", "dense", "random", "auto")
COLUMN_LIMIT = 4096


class EstimateWarning(UserWarning):
    """A random local estimate is weaker than the gradient it estimates."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is differentiated.

    Attributes:
        structure: One of `STRUCTURES` but ``"auto"``.
        views: Elementwise: the shape in which to view each tensor (None: as it is).
        layout: Otherwise: which tensors have batch axes.
        columns: Tangents that the exact Jacobian takes.
    """

    structure: str
    views: Sequence[tuple[int, ...] | None] = ()
    layout: Layout = Layout()
    columns: int = 0


class LocalCall:
    """Differentiates one callable by duals, with a structure that is claimed or found.

    Args:
        structure: One of `STRUCTURES`.
        tangents: K of ``"random"``; with ``"auto"`` it allows a random estimate where nothing exact fits.
        probe_every: Check the structure at the first call (for each rank of inputs, each training mode and each choice
            of flags among the arguments), then every so many calls.
        batch_dims: Leading batch axes of ``"block"`` (all but the last by default) and ``"random"``.
        seed: Of the random directions.
        max_relative_variance: Raise where a random estimate's predicted relative variance (n + 1)/K exceeds it.

    Attributes:
        plan: How the last call was differentiated.
    """

    def __init__(
        self,
        structure: str = "auto",
        tangents: int | None = None,
        probe_every: int = 1000,
        batch_dims: int | None = None,
        seed: int = 0,
        max_relative_variance: float | None = None,
    ) -> None:
        if structure not in STRUCTURES:
            raise unknown_name("structure", structure, STRUCTURES)
        if probe_every < 1:
            raise DualInputError(f"probe_every must be at least 1, got {probe_every}")
        if structure == "random" and tangents is None:
            raise DualInputError("structure='random' needs tangents=K, the number of random directions")
        if tangents is not None and (tangents < 1 or structure not in ("random", "auto")):
            raise DualInputError(
                f"tangents must be at least 1, for 'random' or 'auto': got {tangents} with {structure!r}"
            )
        if batch_dims is not None and batch_dims < 0:
            raise DualInputError(f"batch_dims must be at least 0, got {batch_dims}")
        self.structure, self.tangents, self.probe_every = structure, tangents, probe_every
        self.batch_dims, self.seed, self.max_relative_variance = batch_dims, seed, max_relative_variance
        self.plan: Plan | None = None
        self.calls = 0
        self._plans: dict[tuple, Plan] = {}
        self._warned = False

    @property
    def chosen(self) -> str | None:
        """The structure of the last call (what ``"auto"`` found)."""
        return None if self.plan is None else self.plan.structure

    # Probes, parameter swaps and duals do not trace: one clean graph break instead.
    @torch.compiler.disable
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
        # Flags and names choose between structures (numbers rarely do, and may differ at every call).
        settings = tuple((i, x) for i, x in enumerate(leaves) if x is None or isinstance(x, (bool, str)))
        self.plan = self._planned(flat, tensors, len(inputs), module, settings)
        return self._run(self.plan, flat, tensors)

    def _run(self, plan: Plan, flat: Callable, tensors: Sequence[Tensor]) -> Any:
        if plan.structure == "elementwise":
            viewed = [t if shape is None else t.reshape(shape) for t, shape in zip(tensors, plan.views, strict=True)]
            return elementwise(Opaque(flat), *viewed)
        if plan.structure == "random":
            directions = Directions("rademacher", self.tangents or 1, mixed(self.seed, self.calls))
            return estimated(flat, plan.layout, directions, *tensors)
        return block(flat, plan.layout, *tensors)

    def _planned(
        self, flat: Callable, tensors: Sequence[Tensor], inputs: int, module: nn.Module | None, settings: tuple
    ) -> Plan:
        modes = () if module is None else tuple(m.training for m in module.modules())
        key = (tuple(t.dim() for t in tensors), modes, settings)
        probing = key not in self._plans or self.calls % self.probe_every == 0
        self.calls += 1
        if probing:
            plain = [concrete(t) for t in tensors]
            before = Snapshot(module or nn.Module())

            def repeatable(*tensors: Tensor) -> Any:
                before.restore()  # the same dropout mask, the same buffers at every call
                return flat(*tensors)

            try:
                with torch.no_grad():
                    self._plans[key] = self._probed(repeatable, plain, inputs)
            finally:
                before.restore()
        return self._plans[key]

    def _probed(self, flat: Callable, tensors: Sequence[Tensor], inputs: int) -> Plan:
        """The claimed structure, checked; or the first that holds, the exact ones first."""
        if self.structure == "dense":
            return Plan("dense")
        if self.structure == "elementwise":
            return Plan("elementwise", elementwise_layout(flat, tensors, inputs))
        if self.structure == "block":
            return self._block(flat, tensors, inputs, self._batch(tensors, inputs))
        if self.structure == "random":
            return self._random(flat, tensors, inputs)
        reasons = []
        attempts: list[Callable[[], Plan]] = [lambda: Plan("elementwise", elementwise_layout(flat, tensors, inputs))]
        depths = {self._batch(tensors, inputs), 1} if self.batch_dims is None else {self.batch_dims}
        deepest = max((t.dim() for t in tensors[:inputs]), default=0)
        for batch in sorted((b for b in depths if 0 < b < deepest), reverse=True):
            attempts.append(lambda batch=batch: self._bounded(self._block(flat, tensors, inputs, batch)))  # type: ignore[misc]
        attempts.append(lambda: self._bounded(Plan("dense", columns=sum(t.numel() for t in tensors))))
        if self.tangents is not None:
            attempts.append(lambda: self._random(flat, tensors, inputs))
        for attempt in attempts:
            try:
                return attempt()
            except StructureError as reason:
                reasons.append(str(reason))
        raise StructureError(
            "no exact structure fits: "
            + "; ".join(dict.fromkeys(reasons))
            + ". Wrap a smaller part of it, insist with "
            "structure='dense', or accept an unbiased estimate with tangents=K (structure='random')."
        )

    def _batch(self, tensors: Sequence[Tensor], inputs: int) -> int:
        if self.batch_dims is not None:
            return self.batch_dims
        return max((t.dim() - 1 for t in tensors[:inputs]), default=0)

    def _block(self, flat: Callable, tensors: Sequence[Tensor], inputs: int, batch: int) -> Plan:
        layout = block_layout(flat, tensors, inputs, batch)
        return Plan("block", layout=layout, columns=sum(layout.columns(i, t) for i, t in enumerate(tensors)))

    def _bounded(self, plan: Plan) -> Plan:
        if plan.columns > COLUMN_LIMIT:
            raise StructureError(f"{plan.structure!r} would push {plan.columns} tangents (limit {COLUMN_LIMIT})")
        return plan

    def _random(self, flat: Callable, tensors: Sequence[Tensor], inputs: int) -> Plan:
        """Per sample where samples do not mix; exact where K would do for it anyway."""
        try:
            layout = block_layout(flat, tensors, inputs, 1 if self.batch_dims is None else self.batch_dims)
        except StructureError:
            if self.batch_dims is not None:
                raise
            layout = Layout()
        columns = sum(layout.columns(i, t) for i, t in enumerate(tensors))
        num = self.tangents or 1
        if num >= columns:
            return Plan("block" if layout.batch else "dense", layout=layout, columns=columns)
        variance = (columns + 1) / num
        if self.max_relative_variance is not None and variance > self.max_relative_variance:
            raise DualInputError(
                f"a random estimate with {num} tangents of {columns} inputs and parameters has relative variance "
                f"{variance:.3g}, over the limit {self.max_relative_variance:.3g}: raise tangents"
            )
        if variance > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"a random estimate with {num} tangents of {columns} inputs and parameters has relative variance about "
                f"{variance:.3g}: the noise is larger than the gradient. Use more tangents or a smaller module.",
                EstimateWarning,
                stacklevel=6,
            )
        return Plan("random", layout=layout, columns=columns)
