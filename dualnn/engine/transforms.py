r"""Transforms of functions: `jvp`, by pushing dual tensors through them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.chunks import in_chunks
from dualnn.engine.dual_tensor import DualTensor, checked_tangent, make, seed
from dualnn.engine.errors import DualShapeError, UnsupportedOpError
from dualnn.engine.levels import fresh_level
from dualnn.engine.scaled import lend, settled, take_back
from dualnn.engine.tangents import Tangent, Zero


def push(fn: Callable, primals: Sequence[Any], tangents: Sequence[Tangent | None]) -> tuple[Any, Any]:
    """Run ``fn`` on duals of a fresh level.

    Args:
        fn: The function.
        primals: Its positional arguments.
        tangents: A tangent for each, or None for a constant.

    Returns:
        ``(out, dout)`` in fn's own structure; the leaves of ``dout`` are `Tangent` objects (`Zero` where an output
        does not depend on the inputs), None for outputs that are not floating point tensors.
    """
    lent = lend(tangents)
    try:
        return _pushed(fn, primals, tangents)
    finally:
        if lent:
            take_back(lent)


def _pushed(fn: Callable, primals: Sequence[Any], tangents: Sequence[Tangent | None]) -> tuple[Any, Any]:
    with fresh_level() as level:
        duals = [p if t is None else make(p, t, level) for p, t in zip(primals, tangents, strict=True)]
        num = next(t.num for t in tangents if t is not None)
        out = fn(*duals)
        if isinstance(out, Tensor):  # nothing to flatten, which costs as much as several operations
            return _parted(out, level, num)
        leaves, spec = pytree.tree_flatten(out)
    parted = [_parted(leaf, level, num) for leaf in leaves]
    return pytree.tree_unflatten([v for v, _ in parted], spec), pytree.tree_unflatten([t for _, t in parted], spec)


def _parted(leaf: Any, level: int, num: int) -> tuple[Any, Tangent | None]:
    """Value and tangent of one result."""
    if isinstance(leaf, DualTensor) and leaf._level >= level:
        if leaf._level > level:
            raise UnsupportedOpError(
                "the function returned a DualTensor that it built itself from its arguments, which hides their "
                "tangents under its own. Return its .primal and .tangent."
            )
        return leaf._primal, settled(leaf._tan)
    return leaf, Zero(num) if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point else None


def dense_of(tan: Tangent | None, value: Any) -> Tensor | None:
    """A tangent as a tensor ``(K, *value.shape)``; zeros for a structural zero."""
    if tan is None:
        return None
    if tan.is_zero:
        return torch.zeros((tan.num, *value.shape), dtype=value.dtype, device=value.device)
    return tan.given()


def jvp(fn: Callable, primals: tuple, tangents: tuple, memory: int | None = None) -> tuple[Any, Any]:
    r"""Value and K directional derivatives, :math:`f(x)` and :math:`J_f(x)\,\dot x_k`, in one forward pass.

    Nothing is taped: memory does not depend on how many operations or iterations ``fn`` runs.

    Args:
        fn: A function of tensors; returns a tensor or any nesting of tuples, lists and dicts of them.
        primals: Its arguments.
        tangents: One for each primal: ``(K, *shape)``, or ``shape`` for one direction. All alike.
        memory: Bytes: run ``fn`` several times, with as many directions at a time as keep the tensors that are alive
            during a pass within it; the results come on top. What is random in ``fn`` differs from run to run.

    Returns:
        ``(out, dout)`` in the structure that ``fn`` returns. ``dout`` is ``(K, *out.shape)`` (without K if the
        tangents had none); zeros for a floating output that does not depend on the inputs, None for an integer one.

    Raises:
        DualShapeError: Tangents do not fit their primals or disagree on K.
        UnsupportedOpError: ``fn`` used an op that has no derivative rule.
        DualInputError: ``memory`` does not suffice for one direction.

    Example:
        >>> import torch, dualnn as dn
        >>> out, dout = dn.jvp(torch.sin, (torch.tensor(0.0),), (torch.tensor(2.0),))
        >>> float(out), float(dout)
        (0.0, 2.0)
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise DualShapeError("primals and tangents must be tuples: write jvp(fn, (x,), (v,))")
    if len(primals) != len(tangents) or not primals:
        raise DualShapeError(f"{len(primals)} primals need as many tangents, got {len(tangents)}")
    checked = [checked_tangent(p, t) for p, t in zip(primals, tangents, strict=True)]
    single = {t.dim() == p.dim() for p, t in zip(primals, checked, strict=True)}
    if len(single) > 1:
        raise DualShapeError("either all tangents have a leading K axis or none has")
    one = single.pop()
    seeds = [t.unsqueeze(0) if one else t for t in checked]
    if len({len(t) for t in seeds}) > 1:
        raise DualShapeError(f"tangents disagree on the number of directions: K = {[len(t) for t in seeds]}")
    if memory is not None:
        return _jvp_in_chunks(fn, primals, seeds, memory, one)
    out, pushed = push(fn, primals, [seed(t) for t in seeds])
    if isinstance(out, Tensor):
        slope = dense_of(pushed, out)
        return out, slope if slope is None or not one else slope[0]
    leaves, spec = pytree.tree_flatten(out)
    tans = pytree.tree_leaves(pushed, is_leaf=lambda x: x is None)
    dense = [dense_of(t, v) for t, v in zip(tans, leaves, strict=True)]
    return out, pytree.tree_unflatten([d if d is None or not one else d[0] for d in dense], spec)


def _jvp_in_chunks(fn: Callable, primals: tuple, seeds: list[Tensor], memory: int, one: bool) -> tuple[Any, Any]:
    found = in_chunks(lambda i, j: jvp(fn, primals, tuple(t[i:j] for t in seeds)), seeds[0].shape[0], None, memory)
    slopes = [pytree.tree_flatten(slope, is_leaf=lambda x: x is None) for _, slope in found]
    parts = zip(*(leaves for leaves, _ in slopes), strict=True)
    joined = [None if p[0] is None else p[0][0] if one else torch.cat(p) for p in parts]
    return found[0][0], pytree.tree_unflatten(joined, slopes[0][1])


def basis(x: Tensor, start: int, stop: int) -> Tensor:
    """Unit directions ``start … stop - 1`` of a tensor: ``(stop - start, *x.shape)``."""
    rows = torch.zeros((stop - start, x.numel()), dtype=x.dtype, device=x.device)
    rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
    return rows.reshape(stop - start, *x.shape)
