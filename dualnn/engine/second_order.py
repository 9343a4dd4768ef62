r"""Second derivatives by duals over duals: `hessian`, `hvp` and `laplacian`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.chunks import in_chunks
from dualnn.engine.dual_tensor import DualTensor, checked_tangent
from dualnn.engine.errors import DualShapeError, UnsupportedOpError, unknown_name
from dualnn.engine.jacobians import jacobian
from dualnn.engine.jets import JetTensor, jet
from dualnn.engine.levels import fresh_level
from dualnn.engine.transforms import basis, jvp


def hessian(fn: Callable, x: Tensor, chunk: int | None = None, memory: int | None = None) -> Any:
    r"""Hessian :math:`\partial^2 f / \partial x^2`, forward over forward.

    Args:
        fn: Function of one tensor; any output shape, or a nesting of outputs.
        x: Where.
        chunk: Push at most this many directions at a time, at both levels.
        memory: Instead of it, bytes: push as many directions at a time at the outer level as keep the tensors that are
            alive during a pass within it; the Hessian comes on top (see `dualnn.jacobian`).

    Returns:
        ``(*out.shape, *x.shape, *x.shape)``, in the structure that ``fn`` returns.

    Raises:
        UnsupportedOpError: ``fn`` uses an op without a rule at second order.

    Example:
        >>> import torch, dualnn as dn
        >>> dn.hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 3.0]))
        tensor([[6., 2.],
                [2., 0.]])
    """
    return jacobian(lambda inner: jacobian(fn, inner, chunk=chunk), x, chunk=chunk, memory=memory)


def hvp(fn: Callable, x: Tensor, v: Tensor, method: Literal["forward", "reverse"] = "forward") -> Tensor:
    r"""Hessian times a vector, :math:`\nabla^2 f(x)\, v`, of a scalar function.

    ``"forward"`` differentiates the directional derivative :math:`f'(x) v` in all directions, one per input, and is
    right for any code that the engine runs. ``"reverse"`` differentiates it by autograd: a few evaluations however
    many inputs there are, but blind to what ``fn`` hides from autograd (``no_grad`` blocks).

    Args:
        fn: Function of one tensor that returns a scalar.
        x: Where.
        v: Vector, of x's shape.
        method: See above.
        memory: Instead of ``chunk``, bytes: as many directions at a time as keep the tensors that are alive during a
            pass within it.

    Returns:
        A tensor of x's shape.

    Raises:
        DualShapeError: ``fn`` is not scalar, or v does not have x's shape.

    Example:
        >>> import torch, dualnn as dn
        >>> dn.hvp(lambda x: (x ** 3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    if method not in ("forward", "reverse"):
        raise unknown_name("method", method, ("forward", "reverse"))
    checked_tangent(x, v)
    if v.shape != x.shape:
        raise DualShapeError(f"the vector must have the shape of x, {tuple(x.shape)}, got {tuple(v.shape)}")

    def slope(inner: Tensor) -> Tensor:
        out, pushed = jvp(fn, (inner,), (v,))
        if not isinstance(out, Tensor) or out.dim() > 0:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise DualShapeError(f"hvp needs a scalar function, this one returned {shape}")
        return pushed

    if method == "forward":
        return jacobian(slope, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        pushed = slope(leaf)
        if not pushed.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(pushed, leaf, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def laplacian(
    fn: Callable,
    x: Tensor,
    chunk: int | None = None,
    method: Literal["collapsed", "nested"] = "collapsed",
    memory: int | None = None,
) -> Any:
    r"""Laplacian :math:`\Delta f = \sum_i \partial^2 f / \partial x_i^2` over all entries of x.

    ``"collapsed"`` carries the value, K first derivatives and *one* second derivative, the mean over the directions,
    through the function (`jets`): K + 2 tensors for each live one. Reverse mode over it gives the gradient in
    parameters. ``"nested"`` carries all :math:`(K + 1)^2` parts of duals over duals; it is the slower, independent way,
    and follows what the collapsed one refuses (in-place writes to views, custom derivatives). For B points that fn
    treats one by one, differentiate in a common shift, ``laplacian(lambda z: fn(points + z), zeros)``: D directions,
    not B D.

    Args:
        fn: Function of one tensor; any output shape, or a nesting of outputs.
        x: Where.
        chunk: Push at most K = chunk directions at a time (None: all at once; 8 for ``"nested"``). fn runs once for
            each chunk.
        method: See above.
        memory: Instead of ``chunk``, bytes: as many directions at a time as keep the tensors that are alive during a
            pass within it.

    Returns:
        In the structure and shapes that ``fn`` returns; None for outputs that are not floating point tensors.

    Raises:
        DualShapeError: chunk is smaller than one.
        DualInputError: chunk and memory are both given, or too little memory for one direction.
        UnsupportedOpError: ``fn`` uses an op without a rule at second order, or one that cannot be collapsed.
        UnknownNameError: There is no such method.

    Reference:
        Li et al. 2023, arXiv 2307.08214 (forward Laplacian); Dangel et al. 2025, arXiv 2505.13644 (collapsing).

    Example:
        >>> import torch, dualnn as dn
        >>> dn.laplacian(lambda x: (x ** 2).sum(), torch.zeros(3))
        tensor(6.)
    """
    if method not in ("collapsed", "nested"):
        raise unknown_name("method", method, ("collapsed", "nested"))
    checked_tangent(x, x)
    if chunk is None and memory is None and method == "nested":
        chunk = 8
    summed = _collapsed if method == "collapsed" else _nested
    found = in_chunks(lambda i, j: summed(fn, x, basis(x, i, j)), x.numel(), chunk, memory)
    traces = zip(*(t for t, _ in found), strict=True)
    return pytree.tree_unflatten([None if t[0] is None else sum(t[1:], t[0]) for t in traces], found[0][1])


def _nested(fn: Callable, x: Tensor, unit: Tensor) -> tuple[list[Any], Any]:
    def slopes(inner: Tensor) -> Any:
        return jvp(fn, (inner,), (unit,))[1]

    _, curved = jvp(slopes, (x,), (unit,))
    leaves, spec = pytree.tree_flatten(curved, is_leaf=lambda c: c is None)
    # (outer direction, inner direction, *out): the diagonal holds the pure second derivatives.
    return [None if c is None else c.diagonal(0, 0, 1).sum(-1) for c in leaves], spec


def _collapsed(fn: Callable, x: Tensor, unit: Tensor) -> tuple[list[Any], Any]:
    num = unit.shape[0]
    with fresh_level() as level, fresh_level() as above:
        rows = torch.cat([unit, torch.zeros_like(unit[:1])]) if num else None
        leaves, spec = pytree.tree_flatten(fn(jet(x, rows, num, level, above)))
    out: list[Any] = []
    for y in leaves:
        if isinstance(y, JetTensor) and y._level == level:
            data = y._tan.data  # type: ignore[attr-defined]
            out.append(torch.zeros_like(y._primal) if data is None else num * data[-1])
        elif isinstance(y, DualTensor) and y._level >= level:
            raise UnsupportedOpError(
                "the function returned a DualTensor that it built itself, which hides the derivatives of its parts. "
                "Return its .primal and .tangent."
            )
        else:
            continuous = isinstance(y, Tensor) and y.dtype.is_floating_point
            out.append(torch.zeros_like(y) if continuous else None)
    return out, spec
