r"""The autograd bridge for functions that bring their own linearisation.

A `Linear` rule says how to get the value of a function, how directions move through it, :math:`\dot y = J \dot x`
(`push`), and how cotangents come back, :math:`g_x = J^T g_y` (`pull`). `linear` makes it an ordinary citizen:
``loss.backward()``, ``torch.func`` (grad, jvp, vmap), DualTensors of any level. Only arguments and values are kept.

Higher derivatives differentiate `push` and `pull` themselves, which must therefore be plain torch code. Where they are
not, they call a `Once`: any code, whose own derivative is a named error instead of a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dualnn.engine.bridge import floats, refuse_nested_jvp, save, saved
from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.errors import DualInputError, DualShapeError, StructureError, UnsupportedOpError
from dualnn.engine.tangents import Dense, PerSample, Tangent, Zero


class Linear(Protocol):
    """What the bridge needs of a function of tensors.

    Attributes:
        name: For messages.
        batched: Leading axes are batch axes: arguments broadcast there, and ``torch.func.vmap`` calls the function once
            (otherwise once for each sample).
    """

    name: str
    batched: bool

    def value(self, *args: Any) -> tuple[Tensor, ...]:
        """The outputs, by any code; runs under ``no_grad`` on plain tensors and must not change them."""

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> Sequence[Tensor | None]:
        """``(K, *output.shape)`` for every output, from ``(K, *shape)`` (None: no dependence) for every argument."""

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> Sequence[Tensor]:
        """The cotangents of the arguments ``wanted``, in their shapes, from those of the outputs."""


class Once:
    """Any code on tensors, with a named error in place of a derivative.

    Args:
        name: What it is, for the error.
        value: The code; returns a tuple of tensors.
        advice: What to do for a derivative.
        batched: See `Linear`.
    """

    def __init__(self, name: str, value: Callable[..., tuple[Tensor, ...]], advice: str, batched: bool) -> None:
        self.name, self.value, self.advice, self.batched = name, value, advice, batched

    def _refuse(self, *_: Any) -> Any:
        raise UnsupportedOpError(f"{self.name} has no derivative of its own: {self.advice}")

    push = pull = _refuse


def is_float(x: Any) -> bool:
    """Whether a value is a floating point tensor, which is what can be differentiated."""
    return isinstance(x, Tensor) and x.dtype.is_floating_point


def linear(rule: Linear, *args: Any) -> tuple[Tensor, ...]:
    """Apply a function with its own linearisation, differentiably in every mode.

    Args:
        rule: A `Linear` rule.
        *args: Its arguments; those that are not floating point tensors are constants.

    Returns:
        Its outputs: tensors with one node of graph, or DualTensors where an argument is one.

    Example:
        >>> import torch
        >>> class Double:
        ...     name, batched = "double", True
        ...     def value(self, x):
        ...         return (2 * x,)
        ...     def push(self, primals, tangents, out):
        ...         return (2 * tangents[0],)
        ...     def pull(self, primals, grads, out, wanted):
        ...         return (2 * grads[0],)
        >>> x = torch.ones(3, requires_grad=True)
        >>> linear(Double(), x)[0].sum().backward()
        >>> x.grad
        tensor([2., 2., 2.])
    """
    level = top_level(args)
    if not level:
        refuse_nested_jvp()
        return _LinearNode.apply(rule, *args)  # type: ignore[no-untyped-call]
    parts = [split(a, level) for a in args]
    primals = tuple(p for p, _ in parts)
    out = linear(rule, *primals)
    num = count(level, args)
    present = [t for _, t in parts if t is not None]
    pushed: Sequence[Tensor | None] = [None] * len(out)
    if present:
        pushed = checked_push(rule, primals, tuple(None if t is None else t.dense() for _, t in parts), out, num)
    return tuple(make(y, _like(present, t, num), level) if is_float(y) else y for y, t in zip(out, pushed, strict=True))


def _like(present: list[Tangent], pushed: Tensor | None, num: int) -> Tangent:
    """The tangent of an output; the samples of its arguments' tangents stay apart."""
    if pushed is None or not num:
        return Zero(num)
    apart = [t for t in present if isinstance(t, PerSample)]
    if not apart:
        return Dense(pushed)
    if len(apart) < len(present):
        raise StructureError(
            "a value reduced over the batch was combined with one that still depends on every sample, so the "
            "derivative per sample is not defined (samples mix before the loss). Use per_sample=False."
        )
    return PerSample(pushed, apart[0].batch)


def checked_push(rule: Linear, primals: tuple, tangents: tuple, out: tuple, num: int) -> list[Tensor | None]:
    """Push ``num`` directions, and check what comes back."""
    pushed = list(rule.push(primals, tangents, out))
    if len(pushed) != len(out):
        raise DualShapeError(f"the push rule of {rule.name} returned {len(pushed)} tangents for {len(out)} outputs")
    for i, (t, y) in enumerate(zip(pushed, out, strict=True)):
        if not is_float(y):
            pushed[i] = None
        elif t is not None and t.shape != (num, *y.shape):
            raise DualShapeError(
                f"the push rule of {rule.name} returned a tangent of shape {tuple(t.shape[1:])} for output {i}, whose "
                f"shape is {tuple(y.shape)}"
            )
    return pushed


def untouched(name: str, value: Callable[..., tuple[Tensor, ...]], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call ``value(*args)`` on plain tensors; what it returns shares no memory with them.

    Raises:
        DualInputError: It changed an argument.
    """
    before = _versions(args)
    out = value(*args)
    changed = [i for i, (a, b) in enumerate(zip(before, _versions(args), strict=True)) if a != b]
    if changed:
        raise DualInputError(
            f"{name} modified its argument {changed[0]} in place, so its derivative at the argument's value is lost: "
            "work on a copy (x = x.clone())"
        )
    # A value that shares memory with an argument would make autograd treat the node as a view or an in-place op.
    owned = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and a.numel()}
    return tuple(
        y.clone() if isinstance(y, Tensor) and y.numel() and y.untyped_storage().data_ptr() in owned else y for y in out
    )


def _versions(args: Sequence[Any]) -> list[int | None]:
    return [a._version if isinstance(a, Tensor) and not a.is_inference() else None for a in args]


class _LinearNode(torch.autograd.Function):
    """One node: saves arguments and values; pushes and pulls by the rule."""

    @staticmethod
    def forward(rule: Linear, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        with torch.no_grad():
            return untouched(rule.name, rule.value, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: D102
        rule, *args = inputs
        ctx.rule = rule
        ctx.mark_non_differentiable(*(y for y in output if not is_float(y)))
        save(ctx, args, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, values = saved(ctx)
        wanted = [i for i in floats(args) if ctx.needs_input_grad[i + 1]]
        out: list[Tensor | None] = [None] * len(args)
        pulled = ctx.rule.pull(tuple(args), grads, values, wanted)
        for i, g in zip(wanted, pulled, strict=True):
            if g.shape != args[i].shape:
                raise DualShapeError(
                    f"the vjp rule of {ctx.rule.name} returned shape {tuple(g.shape)} for argument {i}, whose shape is "
                    f"{tuple(args[i].shape)}"
                )
            out[i] = g.to(args[i].dtype)
        return None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, values = saved(ctx)
        seeds = tuple(None if t is None else t.unsqueeze(0) for t in tangents)
        pushed = checked_push(ctx.rule, tuple(args), seeds, values, 1)
        return tuple(
            t[0].to(y.dtype) if t is not None else torch.zeros_like(y) if is_float(y) else None
            for t, y in zip(pushed, values, strict=True)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, rule: Linear, *args: Any) -> tuple[tuple, tuple]:  # noqa: D102
        dims = in_dims[1:]
        if rule.batched:
            ndim = max(a.dim() - (d is not None) for a, d in zip(args, dims, strict=True) if isinstance(a, Tensor))
            moved = list(args)
            for i, (a, d) in enumerate(zip(args, dims, strict=True)):
                if d is not None:
                    a = a.movedim(d, 0)
                    moved[i] = a.reshape(a.shape[0], *(1,) * (ndim + 1 - a.dim()), *a.shape[1:])
            out = _LinearNode.apply(rule, *moved)  # type: ignore[no-untyped-call]
        else:
            rows = []
            for b in range(info.batch_size):
                one = [a if d is None else a.select(d, b) for a, d in zip(args, dims, strict=True)]
                rows.append(_LinearNode.apply(rule, *one))  # type: ignore[no-untyped-call]
            out = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return out, tuple(0 for _ in out)


__all__ = ["Linear", "Once", "is_float", "linear", "untouched"]
