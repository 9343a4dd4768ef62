"""Run a function or module on duals inside ordinary backprop: the common core of `Dual` and of swapped modules."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.utils import _pytree as pytree

from dualnn.engine.autocast import as_now
from dualnn.engine.bridge import Opaque, elementwise
from dualnn.engine.bridge_columns import Layout, block
from dualnn.engine.bridge_random import estimated, keys_before
from dualnn.engine.directions import Directions, mixed
from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import DualInputError, StructureError, TangentLostError, unknown_name
from dualnn.engine.parameters import Places
from dualnn.engine.snapshot import Snapshot
from dualnn.layers.structure import block_layout, concrete, elementwise_layout
from dualnn.layers.vectorised import Rows, stacks

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
        stacks: Elementwise: the function takes inputs with one more leading axis, as ``torch.func.vmap`` brings it.
    """

    structure: str
    views: Sequence[tuple[int, ...] | None] = ()
    layout: Layout = Layout()
    columns: int = 0
    stacks: bool = False


@dataclasses.dataclass(eq=False)
class LocalCall:
    """Differentiates one callable by duals, with a structure that is claimed or found.

    Args:
        structure: One of `STRUCTURES`; this and the others as for `dualnn.layers.Dual`.
        tangents: K of ``"random"``; with ``"auto"`` it allows a random estimate where nothing exact fits.
        probe_every: Check the structure at the first call (for each rank of inputs, each training mode and each choice
            of flags among the arguments), then every so many calls.
        batch_dims: Leading batch axes of ``"block"`` (all but the last by default) and ``"random"``.
        seed: Of the random directions.
        max_relative_variance: Raise where a random estimate's predicted relative variance (n + 1)/K exceeds it.
        dense_limit: Tangents that ``"auto"`` spends on a dense Jacobian at most.

    Attributes:
        plan: How the last call was differentiated.
        calls: How often it was called: the random directions follow from it.
    """

    structure: str = "auto"
    tangents: int | None = None
    probe_every: int = 1000
    batch_dims: int | None = None
    seed: int = 0
    max_relative_variance: float | None = None
    dense_limit: int = COLUMN_LIMIT
    plan: Plan | None = dataclasses.field(default=None, init=False)
    calls: int = dataclasses.field(default=0, init=False)
    _plans: dict[tuple, Plan] = dataclasses.field(default_factory=dict, init=False)
    _warned: bool = dataclasses.field(default=False, init=False)
    _stream: int | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise unknown_name("structure", self.structure, STRUCTURES)
        if self.probe_every < 1:
            raise DualInputError(f"probe_every must be at least 1, got {self.probe_every}")
        if self.structure == "random" and self.tangents is None:
            raise DualInputError("structure='random' needs tangents=K, the number of random directions")
        if self.tangents is not None and (self.tangents < 1 or self.structure not in ("random", "auto")):
            raise DualInputError(
                f"tangents must be at least 1, for 'random' or 'auto': got {self.tangents} with {self.structure!r}"
            )
        if self.batch_dims is not None and self.batch_dims < 0:
            raise DualInputError(f"batch_dims must be at least 0, got {self.batch_dims}")

    @property
    def chosen(self) -> str | None:
        """The structure of the last call (what ``"auto"`` found)."""
        return None if self.plan is None else self.plan.structure

    @property
    def relative_variance(self) -> float:
        """The predicted squared error of the last call's gradient over its squared norm; 0 where it is exact."""
        return self._variance(self.plan.columns) if self.chosen == "random" and self.plan else 0.0

    def _variance(self, columns: int) -> float:
        return (columns + 1) / (self.tangents or 1)

    # Probes, parameter swaps and duals do not trace: one clean graph break instead.
    @torch.compiler.disable
    def __call__(self, run: Callable, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call ``run(*args, **kwargs)``; ``module`` owns the parameters that it uses."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        inputs = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype.is_floating_point]
        places = Places(module)
        for x in (*leaves, *places.parameters):
            if isinstance(x, Tensor) and x.is_complex() and (isinstance(x, DualTensor) or _recorded(x)):
                raise DualInputError(
                    "a complex input or parameter is differentiated, its derivative would be lost: pass its real and "
                    "imaginary parts (torch.view_as_real) and join them inside"
                )

        def flat(*tensors: Tensor) -> Any:
            filled = list(leaves)
            for i, t in zip(inputs, tensors, strict=False):
                filled[i] = t
            call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
            if module is None:
                return run(*call_args, **call_kwargs)
            given = zip(shapes, tensors[len(inputs) :], strict=True)
            with places.swapped([t if t.shape == shape else t.reshape(shape) for shape, t in given]):
                return run(*call_args, **call_kwargs)

        shapes = [p.shape for p in places.parameters]
        tensors = [*[leaves[i] for i in inputs], *places.parameters]
        if not tensors:
            raise DualInputError("nothing to differentiate: no floating point tensor among the inputs and parameters")
        same = as_now(flat, tensors[0].device.type)
        # Flags and names choose between structures (numbers rarely do, and may differ at every call).
        settings = tuple((i, x) for i, x in enumerate(leaves) if x is None or isinstance(x, (bool, str)))
        self.plan = self._planned(flat, tensors, len(inputs), module, settings)
        return self._run(self.plan, same, tensors)

    def _run(self, plan: Plan, flat: Callable, tensors: Sequence[Tensor]) -> Any:
        if plan.structure == "elementwise":
            viewed = [t if shape is None else t.reshape(shape) for t, shape in zip(tensors, plan.views, strict=True)]
            return elementwise(Opaque(Rows(flat, [t.shape for t in viewed], plan.stacks)), *viewed)
        if plan.structure == "random":
            return estimated(flat, plan.layout, self._directions(tensors), *tensors)
        return block(flat, plan.layout, *tensors)

    def _directions(self, tensors: Sequence[Tensor]) -> Directions:
        """This call's own, and not those of an estimate before it: the product of the two would be biased."""
        # Processes draw apart, so that the mean over them is the better estimate.
        first = mixed(mixed(self.seed, self.calls), _process())
        if self._stream is None and any(t.grad_fn is not None for t in tensors):
            taken = keys_before(tensors)
            self._stream = next(i for i in itertools.count() if (mixed(first, i) if i else first) not in taken)
        key = mixed(first, self._stream) if self._stream else first
        return Directions("rademacher", self.tangents or 1, key)

    def _planned(
        self, flat: Callable, tensors: Sequence[Tensor], inputs: int, module: nn.Module | None, settings: tuple
    ) -> Plan:
        modes = () if module is None else tuple(m.training for m in module.modules())
        vectorised = any(i.key() == TransformType.Vmap for i in get_interpreter_stack() or [])
        key = (tuple(t.dim() for t in tensors), modes, settings, vectorised)
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
                    plan = self._probed(repeatable, plain, inputs)
                    if plan.structure == "elementwise" and vectorised:
                        plan = dataclasses.replace(plan, stacks=stacks(repeatable, plain, inputs))
                    self._plans[key] = plan
            finally:
                before.restore()
        return self._plans[key]

    def _probed(self, flat: Callable, tensors: Sequence[Tensor], inputs: int) -> Plan:
        """The claimed structure, checked; or the first that holds, the exact ones first."""
        self._refuse(flat(*tensors))
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
            attempts.append(lambda batch=batch: _bounded(self._block(flat, tensors, inputs, batch), COLUMN_LIMIT))  # type: ignore[misc]
        whole = Plan("dense", columns=sum(t.numel() for t in tensors))
        attempts.append(lambda: _bounded(whole, self.dense_limit))
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

    def _refuse(self, result: Any) -> None:
        """Results that have no derivative, or on which no probe can see one."""
        leaves = pytree.tree_leaves(result)
        found = [y for y in leaves if isinstance(y, Tensor) and y.dtype.is_floating_point]
        if not found:
            got = ", ".join(str(y.dtype) if isinstance(y, Tensor) else type(y).__name__ for y in leaves) or "nothing"
            raise TangentLostError(
                f"the function returned {got}, no floating point tensor: there is nothing to differentiate (a "
                "constant, or a value cut by .item() or .numpy())"
            )
        numbers = [y for y in found if y.numel()]
        if self.structure != "dense" and numbers and not any(bool(torch.isfinite(y).any()) for y in numbers):
            raise DualInputError(
                f"all outputs are nan or inf, so the structure ({self.structure!r}) cannot be seen: give inputs at "
                "which the function is finite, or structure='dense', which claims nothing"
            )

    def _batch(self, tensors: Sequence[Tensor], inputs: int) -> int:
        if self.batch_dims is not None:
            return self.batch_dims
        return max((t.dim() - 1 for t in tensors[:inputs]), default=0)

    def _block(self, flat: Callable, tensors: Sequence[Tensor], inputs: int, batch: int) -> Plan:
        layout = block_layout(flat, tensors, inputs, batch)
        return Plan("block", layout=layout, columns=sum(layout.columns(i, t) for i, t in enumerate(tensors)))

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
        variance = self._variance(columns)
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


def _bounded(plan: Plan, limit: int) -> Plan:
    if plan.columns > limit:
        raise StructureError(f"{plan.structure!r} would push {plan.columns} tangents (limit {limit})")
    return plan


def _process() -> int:
    """The rank of this process in a distributed run, else 0."""
    found = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if found else 0


def _recorded(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
