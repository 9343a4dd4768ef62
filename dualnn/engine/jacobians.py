r"""Jacobians by forward mode, with as few directions as their structure allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.chunks import in_chunks
from dualnn.engine.concrete import concrete
from dualnn.engine.dual_tensor import checked_tangent, seed
from dualnn.engine.errors import DualInputError, StructureError, unknown_name
from dualnn.engine.sparsity import Sparsity, banded, detect
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import basis, dense_of, push

Structure = Literal["dense", "elementwise", "block", "banded", "sparse", "auto"]
STRUCTURES = ("dense", "elementwise", "block", "banded", "sparse", "auto")
_log = logging.getLogger("dualnn")


def jacobian(
    fn: Callable,
    x: Tensor,
    structure: Structure | Sparsity = "dense",
    chunk: int | None = None,
    bandwidth: tuple[int, int] | None = None,
    memory: int | None = None,
) -> Any:
    r"""Jacobian :math:`\partial f / \partial x` by forward mode.

    Every structure but ``"dense"`` is a claim, checked along one more direction each time.

    Args:
        fn: Function of one tensor.
        x: Where.
        structure: How many directions are pushed, and what comes back:

            - ``"dense"``: one for each input; ``(*out.shape, *x.shape)``, a tuple, list or dict of them for such
              outputs.
            - ``"elementwise"``: one, for output i depends on input i only; ``x.shape``.
            - ``"block"``: one for each entry of the last axis, for samples do not influence one another;
              ``(*batch, m, n)`` for ``fn: (*batch, n) -> (*batch, m)``.
            - ``"banded"``: lower + upper + 1 for a ``bandwidth=(lower, upper)``, which is looked for if not given;
              a sparse tensor ``(*out.shape, *x.shape)``.
            - ``"sparse"``: the pattern is looked for (`dualnn.engine.sparsity`), and its columns are coloured; a sparse
              tensor.
            - ``"auto"``: the same, and the logger ``dualnn`` is told what was found.
            - a `Sparsity` from an earlier `dualnn.engine.detect`: nothing is looked for again; a sparse tensor.
        chunk: Push at most this many directions at a time (dense).
        bandwidth: ``(lower, upper)`` diagonals, for ``"banded"``; inputs and outputs count flat.
        memory: Instead of ``chunk``, bytes: push as many directions at a time as keep the tensors that are alive
            during a pass within it (dense). The Jacobian itself comes on top. fn runs with one, two and four directions
            first, which is measured.

    Returns:
        The Jacobian; differentiable again.

    Raises:
        StructureError: The function has not the structure that was claimed.
        DualInputError: ``bandwidth``, ``chunk`` or ``memory`` where they mean nothing; too little ``memory`` for one
            direction.

    Example:
        >>> import torch, dualnn as dn
        >>> dn.jacobian(lambda x: x.flip(0) * x, torch.tensor([2.0, 3.0]))
        tensor([[3., 2.],
                [3., 2.]])
        >>> differences = lambda x: x[2:] - 2 * x[1:-1] + x[:-2]
        >>> dn.jacobian(differences, torch.rand(1000, dtype=torch.float64), "sparse").values().shape
        torch.Size([2994])
    """
    checked_tangent(x, x)
    if not isinstance(structure, Sparsity) and structure not in STRUCTURES:
        raise unknown_name("structure", structure, STRUCTURES)
    if bandwidth is not None and structure != "banded":
        raise DualInputError(f"bandwidth is for structure='banded', not {structure!r}")
    if chunk is not None and structure != "dense":
        raise DualInputError(f"chunk is for structure='dense', not {structure!r}")
    if memory is not None and structure != "dense":
        raise DualInputError(f"memory is for structure='dense', not {structure!r}")
    if structure == "dense":
        return _dense(fn, x, chunk, memory)
    if structure == "elementwise":
        return _elementwise(fn, x)
    if structure == "block":
        return _block(fn, x)
    if isinstance(structure, Sparsity):
        pattern = structure
        if pattern.in_shape != x.shape:
            raise StructureError(f"the pattern is for inputs {tuple(pattern.in_shape)}, x is {tuple(x.shape)}")
    elif bandwidth is not None:
        pattern = banded(bandwidth, x, _shape_of(fn, x))
    else:
        pattern = detect(fn, x)
        if structure == "banded":
            pattern = banded(pattern.bandwidth, x, pattern.out_shape)
        if structure == "auto":
            _log.info("jacobian: %s", pattern)
    return pattern.assembled(pattern.values(fn, x))


def _dense(fn: Callable, x: Tensor, chunk: int | None, memory: int | None) -> Any:
    spec: Any = None

    def columns_of(start: int, stop: int) -> list[Tensor | None]:
        nonlocal spec
        out, pushed = push(fn, (x,), [seed(basis(x, start, stop))])
        leaves, spec = pytree.tree_flatten(out)
        tans = pytree.tree_leaves(pushed, is_leaf=lambda t: t is None)
        return [dense_of(t, v) for t, v in zip(tans, leaves, strict=True)]

    pieces = in_chunks(columns_of, x.numel(), chunk, memory)
    columns = [None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True)]
    jacobians = [None if c is None else c.movedim(0, -1).reshape((*c.shape[1:], *x.shape)) for c in columns]
    return pytree.tree_unflatten(jacobians, spec)


def _elementwise(fn: Callable, x: Tensor) -> Tensor:
    # Rademacher from a generator of its own: a check must not move the caller's random stream.
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    signs = signs.to(device=x.device, dtype=x.dtype)
    out, tan = push(fn, (x,), [Dense(torch.stack([torch.ones_like(signs), signs]))])
    if not isinstance(out, Tensor) or out.shape != x.shape:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise StructureError(f"an elementwise function maps {tuple(x.shape)} to itself, this one returned {shape}")
    slope, probe = dense_of(tan, out)  # type: ignore[misc]
    if not torch.allclose(probe, slope * signs, rtol=1e-3, atol=0, equal_nan=True):
        worst = (probe - slope * signs).abs().max()
        raise StructureError(
            f"the function is not elementwise: along a random direction its derivative differs by {float(worst):.3g} "
            "from an elementwise one. Use structure='dense' or 'sparse'."
        )
    return slope


def _block(fn: Callable, x: Tensor) -> Tensor:
    if x.dim() < 2:
        raise StructureError(f"a block Jacobian needs (*batch, n), got x of shape {tuple(x.shape)}: use 'dense'")
    n, batch = x.shape[-1], x.shape[:-1]
    unit = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *(1,) * len(batch), n).expand(n, *x.shape)
    half = (torch.arange(batch.numel(), device=x.device) % 2 == 0).reshape(*batch, 1)
    out, tan = push(fn, (x,), [Dense(torch.cat([unit, half.to(x.dtype).expand(1, *x.shape)]))])
    if not isinstance(out, Tensor) or out.dim() != x.dim() or out.shape[:-1] != batch:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise StructureError(f"a block Jacobian needs outputs ({', '.join(map(str, batch))}, m), got {shape}")
    columns: Tensor = dense_of(tan, out)  # type: ignore[assignment]
    leak = concrete(torch.where(half, 0, columns[-1].abs()))
    if leak.numel() and float(leak.max()) > 1e-6 * float(concrete(columns).abs().max()):
        raise StructureError("the function mixes samples: use structure='dense' or 'sparse'")
    return columns[:-1].movedim(0, -1)


def _shape_of(fn: Callable, x: Tensor) -> torch.Size:
    with torch.no_grad():
        return fn(concrete(x)).shape
