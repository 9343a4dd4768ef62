r"""The autograd bridge by columns: a whole Jacobian, or one block per sample, in one dual pass.

Any Python code of any outputs. *Shared* arguments (``dense``; the parameters of a block) get one direction per number.
*Batched* arguments get one direction per number of a sample, shared by all samples: direction j perturbs entry j of
every sample at once, which is exact as long as samples do not mix. The forward pass keeps the pushed columns
:math:`J = \partial y / \partial x`; backward multiplies, :math:`g_x = J^T g_y`. The Jacobian is a function of the same
kind, so higher derivatives are exact as well, one dual level up each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.bridge import floats, refuse_nested_jvp, save, saved
from dualnn.engine.dual_tensor import count, make, seed, split, top_level
from dualnn.engine.errors import StructureError, TangentLostError
from dualnn.engine.tangents import Tangent, Zero
from dualnn.engine.transforms import basis, dense_of, push


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arguments and outputs are laid out.

    Attributes:
        batch: Number of leading batch dimensions, common to all batched arguments and all outputs.
        batched: Positions of the arguments that have them; all others are shared.
    """

    batch: int = 0
    batched: frozenset[int] = frozenset()

    def columns(self, i: int, x: Tensor) -> int:
        """Number of directions of argument ``i``."""
        return x[(0,) * self.batch].numel() if i in self.batched and x.numel() else x.numel()

    def directions(self, i: int, x: Tensor) -> Tensor:
        """Unit directions of argument ``i``: ``(columns, *x.shape)``."""
        if i not in self.batched:
            return basis(x, 0, x.numel())
        sample = x[(0,) * self.batch] if x.numel() else x.reshape(-1)
        unit = basis(sample, 0, sample.numel())
        return unit.reshape(len(unit), *(1,) * self.batch, *sample.shape).expand(len(unit), *x.shape)

    def pull(self, i: int, x: Tensor, columns: Tensor, grad: Tensor) -> Tensor:
        """``J^T g`` for argument ``i``; ``columns: (*batch, c, *out)``, ``grad: (*batch, *out)``."""
        product = columns * grad.unsqueeze(self.batch)
        product = product.flatten(self.batch + 1).sum(-1) if product.dim() > self.batch + 1 else product
        if i not in self.batched and self.batch:
            product = product.flatten(0, self.batch - 1).sum(0)
        return product.reshape(x.shape)

    def push(self, i: int, tangent: Tensor, columns: Tensor) -> Tensor:
        """``J v`` for directions ``tangent: (K, *x.shape)`` of argument ``i``: ``(K, *batch, *out)``."""
        lead = self.batch if i in self.batched else 0
        flat = tangent.flatten(1 + lead) if tangent.dim() > 1 + lead else tangent.unsqueeze(-1)
        out = columns.dim() - self.batch - 1
        flat = flat.reshape(*flat.shape[:-1], *(1,) * (self.batch - lead), flat.shape[-1], *(1,) * out)
        return (flat * columns).sum(1 + self.batch)


class Flat:
    """A function whose result is flattened to a tuple of float tensors; the rest is remembered."""

    def __init__(self, fn: Callable) -> None:
        self.fn = fn
        self.spec: Any = None
        self.others: list[Any] = []

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """The float tensors of the result."""
        leaves, self.spec = pytree.tree_flatten(self.fn(*args))
        self.others = [None if _is_float(x) else (x,) for x in leaves]
        return tuple(x for x in leaves if _is_float(x))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The function's own structure around new tensors."""
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if o is None else o[0] for o in self.others], self.spec)


@dataclasses.dataclass(frozen=True)
class _Jacobian:
    """All columns of a flat function, ``(*batch, columns, *out)`` for each of its outputs: again such a function."""

    fn: Callable
    layout: Layout

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        return _value_and_columns(self.fn, self.layout, args)[1]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point


def _value_and_columns(
    fn: Callable, layout: Layout, args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], bool]:
    """Outputs, their columns, and whether no operation connects them (columns of zeros may be a flat spot)."""
    where = floats(args)
    widths = [layout.columns(i, args[i]) for i in where]
    total = sum(widths)
    tangents: list[Tangent | None] = [None] * len(args)
    start = 0
    for i, width in zip(where, widths, strict=True):
        rows = torch.zeros((total, *args[i].shape), dtype=args[i].dtype, device=args[i].device)
        rows[start : start + width] = layout.directions(i, args[i])
        tangents[i] = seed(rows)
        start += width
    out, pushed = push(fn, args, tangents)
    if layout.batch:
        shape = args[min(layout.batched)].shape[: layout.batch]
        for y in out:
            if y.shape[: layout.batch] != shape:
                raise StructureError(
                    f"a block function must keep the batch axes {tuple(shape)}, it returned {tuple(y.shape)}"
                )
    columns = [dense_of(t, y) for t, y in zip(pushed, out, strict=True)]
    lost = all(t is None or t.is_zero for t in pushed)
    return out, tuple(c.movedim(0, layout.batch) for c in columns), lost  # type: ignore[union-attr]


def dense(fn: Callable, *args: Any) -> Any:
    """Apply ``fn`` with its whole Jacobian kept for backward.

    Args:
        fn: Any Python code on tensors; returns a tensor or nested tuples, lists, dicts of them.
        *args: Its arguments; every floating point tensor is differentiated: one tangent per number in them.

    Returns:
        The result of ``fn``, differentiable by backward, ``torch.func`` and duals.

    Raises:
        TangentLostError: No output depends on the inputs.

    Example:
        >>> import torch
        >>> def spring(k):  # a loop, in place, under no_grad: autograd sees nothing of it
        ...     with torch.no_grad():
        ...         x = torch.ones_like(k)
        ...         for _ in range(3):
        ...             x = x - 0.1 * k * x
        ...     return x
        >>> k = torch.tensor([1.0], requires_grad=True)
        >>> dense(spring, k).sum().backward()
        >>> round(float(k.grad), 4)  # d/dk (1 - 0.1 k)^3
        -0.243
    """
    return block(fn, Layout(), *args)


def block(fn: Callable, layout: Layout, *args: Any) -> Any:
    """Apply ``fn`` with one Jacobian block per sample kept for backward.

    Args:
        fn: As for `dense`; every output keeps the leading batch axes, and samples do not influence one another.
        layout: Which arguments are batched, and by how many axes.
        *args: Its arguments.

    Returns:
        The result of ``fn``, differentiable in every mode.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3, requires_grad=True)  # 3 tangents, not 300
        >>> y = block(lambda x: torch.softmax(x, -1), Layout(1, frozenset([0])), x)
        >>> y[:, 0].sum().backward()
        >>> x.grad.shape
        torch.Size([100, 3])
    """
    flat = Flat(fn)
    return flat.rebuild(_apply(flat, layout, args, strict=True))


def _apply(flat: Callable, layout: Layout, args: Sequence[Any], strict: bool = False) -> tuple[Tensor, ...]:
    level = top_level(args)
    if not level:
        refuse_nested_jvp()
        out = _Columns.apply(flat, layout, strict, *args)  # type: ignore[no-untyped-call]
        return out[: len(out) // 2]
    parts = [split(a, level) for a in args]
    primals = [p for p, _ in parts]
    values = _apply(flat, layout, primals, strict)
    num = count(level, args)
    columns = _apply(_Jacobian(flat, layout), layout, primals)
    tangents = [t.dense() if t is not None else None for _, t in parts]
    pushed = _pushed(layout, primals, tangents, columns)
    return tuple(make(v, Zero(num) if p is None else seed(p), level) for v, p in zip(values, pushed, strict=True))


def _pushed(
    layout: Layout, args: Sequence[Any], tangents: Sequence[Tensor | None], columns: Sequence[Tensor]
) -> list[Tensor | None]:
    """``J v`` of every output, for directions ``(K, *arg.shape)``."""
    out: list[Tensor | None] = [None] * len(columns)
    start = 0
    for i in floats(args):
        stop = start + layout.columns(i, args[i])
        t = tangents[i]
        if t is not None:
            for j, c in enumerate(columns):
                term = layout.push(i, t, c.narrow(layout.batch, start, stop - start))
                before = out[j]
                out[j] = term if before is None else before + term
        start = stop
    return out


class _Columns(torch.autograd.Function):
    """One node that keeps the Jacobian's columns."""

    @staticmethod
    def forward(flat: Callable, layout: Layout, strict: bool, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        with torch.no_grad():
            values, columns, lost = _value_and_columns(flat, layout, args)
        if strict and lost and any(c.numel() for c in columns):
            raise TangentLostError(
                "the function's outputs do not depend on its inputs by differentiable operations (a constant, or cut "
                "by .detach(), .item() or .numpy())"
            )
        return (*(v.clone() if any(v is a for a in args) else v for v in values), *columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: D102
        flat, layout, _, *args = inputs
        half = len(output) // 2
        ctx.flat, ctx.layout = flat, layout
        ctx.mark_non_differentiable(*output[half:])
        save(ctx, args, *output[half:])

    @staticmethod
    def _pieces(ctx: Any, higher: bool) -> tuple[list[Any], Sequence[Tensor]]:
        args, kept = saved(ctx)
        return args, _apply(_Jacobian(ctx.flat, ctx.layout), ctx.layout, args) if higher else kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        layout: Layout = ctx.layout
        args, columns = _Columns._pieces(ctx, torch.is_grad_enabled())
        out: list[Tensor | None] = [None] * len(args)
        start = 0
        for i in floats(args):
            stop = start + layout.columns(i, args[i])
            if ctx.needs_input_grad[i + 3]:
                total: Any = 0
                for g, c in zip(grads, columns, strict=False):
                    total = total + layout.pull(i, args[i], c.narrow(layout.batch, start, stop - start), g)
                out[i] = total.to(args[i].dtype)
            start = stop
        return None, None, None, *out

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, columns = _Columns._pieces(ctx, True)
        seeds = [None if t is None else t.unsqueeze(0) for t in tangents[3:]]
        pushed = _pushed(ctx.layout, args, seeds, columns)
        return *[None if p is None else p[0] for p in pushed], *[None] * len(columns)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, flat: Callable, layout: Layout, strict: bool, *args: Any) -> Any:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims[3:], strict=True)]
            rows.append(_Columns.apply(flat, layout, strict, *one))  # type: ignore[no-untyped-call]
        out = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return out, tuple(0 for _ in out)
