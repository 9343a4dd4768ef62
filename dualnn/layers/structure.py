r"""Probes for the structure of a Jacobian, on concrete numbers.

*Tangent probe*: along a random direction v, J v must equal what the claimed structure predicts; it catches softmax,
mean, flip, cumsum, sort. *Value probe*: change half of the entries; the others' outputs must not move; it catches
couplings through detached values (``x - x.mean().detach()``), which the tangents never see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.bridge_columns import Layout
from dualnn.engine.concrete import concrete
from dualnn.engine.errors import StructureError, TangentLostError
from dualnn.engine.tangents import Dense, Tangent
from dualnn.engine.transforms import dense_of, push

TOLERANCE = 1e-3  # relative to the largest effect: data-dependent stops move other entries by about their tolerance


def elementwise_layout(fn: Callable, tensors: Sequence[Tensor], inputs: int) -> list[tuple[int, ...] | None]:
    """How each tensor must be viewed so that ``fn`` is elementwise under broadcasting.

    Args:
        fn: Function of all tensors.
        tensors: ``inputs`` ordinary inputs, then parameters (which may be per channel, on dimension 1).
        inputs: Number of ordinary inputs.

    Returns:
        For each tensor the shape to view it in; None to leave it as it is.

    Raises:
        StructureError: ``fn`` is not elementwise.
        TangentLostError: ``fn`` does not depend on its inputs.
    """
    with torch.no_grad():
        y = fn(*tensors)
    if not isinstance(y, Tensor):
        raise StructureError(f"it returns {type(y).__name__}, not one tensor")
    layouts = [_views(t, y.shape, channel=i >= inputs) for i, t in enumerate(tensors)]
    if y.numel() == 0:
        return [views[0] for views in layouts]
    partials = _ones_partials(fn, tensors)
    chosen: list[tuple[int, ...] | None] = []
    for i, t in enumerate(tensors):
        v = (_scattered(t.shape) + 0.5).to(t)  # away from 0: a lucky zero would hide a coupling
        out, tan = push(fn, tensors, [Dense(v[None]) if j == i else None for j in range(len(tensors))])
        actual = dense_of(tan, out)[0]  # type: ignore[index]
        fits = [s for s in layouts[i] if close(actual, partials[i] * v.reshape(t.shape if s is None else s), actual)]
        if not fits:
            raise StructureError(
                f"the derivative along a random direction of tensor {i}, {tuple(t.shape)}, is not elementwise in the "
                f"output, {tuple(y.shape)}"
            )
        chosen.append(fits[0])
    _value_probe(fn, tensors[:inputs], tensors[inputs:], y)
    return chosen


def _scattered(shape: Sequence[int]) -> Tensor:
    """Numbers scattered over [0, 1), without a generator: ``torch.func.vmap`` forbids random ops."""
    x = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (torch.sin(x * 12.9898) * 43758.5453).remainder(1).reshape(shape)


def _views(t: Tensor, out: torch.Size, channel: bool) -> list[Any]:
    """Candidate views that broadcast to the output: as it is, or one entry per channel on dimension 1."""
    found: list[Any] = []
    if t.dim() <= len(out) and all(a in (1, b) for a, b in zip(reversed(t.shape), reversed(out), strict=False)):
        found.append(None)
    if channel and t.dim() == 1 and len(out) > 2 and t.shape[0] in (1, out[1]):
        found.append((t.shape[0], *(1,) * (len(out) - 2)))
    if not found:
        raise StructureError(f"a tensor of shape {tuple(t.shape)} does not broadcast to the output, {tuple(out)}")
    return found


def _ones_partials(fn: Callable, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives along all-ones directions, one tensor at a time."""
    ones = []
    lost = True
    for i, t in enumerate(tensors):
        out, tan = push(fn, tensors, [Dense(torch.ones_like(t)[None]) if j == i else None for j in range(len(tensors))])
        lost = lost and tan.is_zero
        ones.append(dense_of(tan, out)[0])  # type: ignore[index]
    if lost:
        raise TangentLostError(
            "the function's value does not depend on its inputs by differentiable operations (a constant, or cut by "
            ".detach(), .item() or .numpy())"
        )
    return ones


def _value_probe(fn: Callable, inputs: Sequence[Tensor], rest: Sequence[Tensor], y: Tensor) -> None:
    half = _scattered(y.shape).lt(0.5).to(y.device)
    for mask in (half, ~half):  # a coupling through the largest entry shows only in the half that holds it
        moved = []
        for x in inputs:
            size = x.abs().mean().clamp_min(torch.finfo(x.dtype).tiny) * 0.1
            moved.append(torch.where(mask, x + size, x) if x.shape == y.shape else x)
        if all(a is b for a, b in zip(moved, inputs, strict=True)) or mask.all() or not mask.any():
            return
        with torch.no_grad():
            change = (fn(*moved, *rest) - y).abs()
        still, effect = change[~mask], change[mask]
        finite = still[torch.isfinite(still)]
        reach = effect[torch.isfinite(effect)].max() if torch.isfinite(effect).any() else change.new_ones(())
        if len(finite) and float(finite.max()) > TOLERANCE * float(reach) and float(reach) > 0:
            raise StructureError(
                f"changing half of the inputs moved the outputs of the other half by {float(finite.max()):.3g}: "
                "entries are coupled through values that carry no derivative (.detach(), .item())"
            )


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not finite.any():
        return True
    size = float(scale[finite].abs().max())
    return bool(((a - b)[finite].abs() <= TOLERANCE * size + 1e-30).all())


def block_layout(fn: Callable, tensors: Sequence[Tensor], inputs: int, batch: int) -> Layout:
    """Check that samples do not mix under ``fn``, in tangents and in values.

    Args:
        fn: Function of all tensors; returns tensors that all keep the batch axes.
        tensors: ``inputs`` ordinary inputs, then parameters (never batched).
        inputs: Number of ordinary inputs.
        batch: Number of leading batch axes.

    Returns:
        Which tensors are batched: the inputs that have the output's batch axes.

    Raises:
        StructureError: There are no such axes, or samples influence one another.
    """
    with torch.no_grad():
        outputs = [y for y in pytree.tree_leaves(fn(*tensors)) if isinstance(y, Tensor) and y.dtype.is_floating_point]
    if batch < 1 or not outputs or any(y.dim() < batch for y in outputs):
        raise StructureError(f"the outputs do not all have {max(batch, 1)} batch axes")
    shape = outputs[0].shape[:batch]
    batched = [i for i in range(inputs) if tensors[i].dim() >= batch and tensors[i].shape[:batch] == shape]
    if not batched or any(y.shape[:batch] != shape for y in outputs):
        raise StructureError(f"no input and output share the batch axes {tuple(shape)}")
    size = math.prod(shape)
    # Scattered samples, and a first part: no permutation of the samples maps both of them to themselves.
    for mask in (_scattered(shape) < 0.5, (torch.arange(size) < (size + 1) // 3).reshape(shape)):
        chosen = mask.to(outputs[0].device)
        if outputs[0].numel() and bool(chosen.any()) and not bool(chosen.all()):
            _refuse_mixing(fn, tensors, batched, batch, chosen)
    return Layout(batch, frozenset(batched))


def _refuse_mixing(fn: Callable, tensors: Sequence[Tensor], batched: Sequence[int], batch: int, chosen: Tensor) -> None:
    """Move the chosen samples, in tangents and in values: the others must stay."""
    moved = list(tensors)
    seeds: list[Tangent | None] = [None] * len(tensors)
    for i in batched:
        x = tensors[i]
        v = (_scattered(x.shape) + 0.5).to(x) * chosen.reshape(*chosen.shape, *(1,) * (x.dim() - batch)).to(x.dtype)
        seeds[i] = Dense(v[None])
        moved[i] = x + v * 0.1 * x.abs().mean().clamp_min(torch.finfo(x.dtype).tiny)
    out, pushed = push(lambda *a: tuple(_float_leaves(fn(*a))), tensors, seeds)
    with torch.no_grad():
        after = _float_leaves(fn(*moved))
    for y, tan, new in zip(out, pushed, after, strict=True):
        for effect, what in ((dense_of(tan, y)[0], "derivatives"), (new - y, "values")):  # type: ignore[index]
            leak, reach = _largest(effect[~chosen]), _largest(effect[chosen])
            if leak > TOLERANCE * reach:
                raise StructureError(f"samples mix: moving some of them moved the others' {what} by {leak:.3g}")


def _float_leaves(result: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(result) if isinstance(y, Tensor) and y.dtype.is_floating_point]


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


__all__ = ["block_layout", "concrete", "elementwise_layout"]
