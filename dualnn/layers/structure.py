r"""Probes for the structure of a Jacobian, on concrete numbers.

*Tangent probe*: along a random direction v, J v must equal what the claimed structure predicts; it catches softmax,
mean, flip, cumsum, sort. *Value probe*: change half of the entries; the others' outputs must not move; it catches
couplings through detached values (``x - x.mean().detach()``), which the tangents never see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import StructureError, TangentLostError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push

TOLERANCE = 1e-3  # relative to the largest effect: data-dependent stops move other entries by about their tolerance


def concrete(x: Tensor) -> Tensor:
    """The plain numbers under duals and functorch wrappers (the first entry of a vmapped batch)."""
    x = primal_of(x)
    while _functorch.is_functorch_wrapped_tensor(x):
        dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else -1
        x = _functorch.get_unwrapped(x)
        if dim >= 0:
            x = x.select(dim, 0)
    return x.detach()


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
    generator = torch.Generator().manual_seed(0)
    partials = _ones_partials(fn, tensors)
    chosen: list[tuple[int, ...] | None] = []
    for i, t in enumerate(tensors):
        v = (torch.rand(t.shape, generator=generator) + 0.5).to(t)  # away from 0: a lucky zero would hide a coupling
        out, tan = push(fn, tensors, [Dense(v[None]) if j == i else None for j in range(len(tensors))])
        actual = dense_of(tan, out)[0]  # type: ignore[index]
        fits = [s for s in layouts[i] if _close(actual, partials[i] * v.reshape(t.shape if s is None else s), actual)]
        if not fits:
            raise StructureError(
                f"the derivative along a random direction of tensor {i}, {tuple(t.shape)}, is not elementwise in the "
                f"output, {tuple(y.shape)}"
            )
        chosen.append(fits[0])
    _value_probe(fn, tensors[:inputs], tensors[inputs:], y, generator)
    return chosen


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


def _value_probe(fn: Callable, inputs: Sequence[Tensor], rest: Sequence[Tensor], y: Tensor, generator: Any) -> None:
    mask = torch.rand(y.shape, generator=generator).lt(0.5).to(y.device)
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
            f"changing half of the inputs moved the outputs of the other half by {float(finite.max()):.3g}: entries "
            "are coupled through values that carry no derivative (.detach(), .item())"
        )


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    finite = torch.isfinite(a) & torch.isfinite(b)
    if not finite.any():
        return True
    size = float(scale[finite].abs().max())
    return bool(((a - b)[finite].abs() <= TOLERANCE * size + 1e-30).all())
