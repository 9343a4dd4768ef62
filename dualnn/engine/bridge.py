r"""The autograd bridge: functions differentiated by duals, inside ordinary backprop.

A *local function* says how to get its value and its own partial derivatives; nothing it does in between is taped.
`elementwise` then makes it an ordinary citizen: ``loss.backward()``, double backward, ``torch.func``
(grad, jvp, vmap), DualTensors of any level.

================  ====================================================================================================
`ClosedForm`      y and its partials are given as formulas
`Equation`        y solves F(y, x, …) = 0 by any code; dy/dx = -F_x / F_y (implicit function theorem), from a single
                  dual evaluation of F at the solution: the number of iterations does not matter
`Opaque`          any elementwise Python code, loops and ``no_grad`` included: it is run on duals
================  ====================================================================================================

Higher derivatives never differentiate through the solver. For formulas and equations the partials are plain code on
(y, x, …), which autograd or a further level differentiates; the partials of opaque code are opaque functions
themselves, evaluated one dual level up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.errors import StructureError, TangentLostError, UnsupportedOpError
from dualnn.engine.tangents import Separate, Tangent, Zero
from dualnn.engine.transforms import push


class Local(Protocol):
    """What the bridge needs of a local function of broadcasting arguments."""

    def evaluate(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Value, and whatever `kept_partials` wants to keep; runs under ``no_grad`` on plain tensors."""

    def kept_partials(self, y: Tensor, kept: tuple[Tensor, ...], *args: Any) -> Sequence[Tensor]:
        """First-order partials dy/darg_i of the float tensors among ``args``, in order."""

    def partials(self, y: Tensor, *args: Any) -> Sequence[Tensor]:
        """The same, differentiable again (by autograd and by duals)."""


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """A function given by formulas.

    Attributes:
        value: ``value(*args) -> y``.
        derivatives: ``derivatives(y, *args)`` returns dy/darg for every float argument, in plain torch code.
    """

    value: Callable[..., Tensor]
    derivatives: Callable[..., Sequence[Tensor]]

    def evaluate(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value; nothing is kept."""
        return self.value(*args), ()

    def kept_partials(self, y: Tensor, kept: tuple[Tensor, ...], *args: Any) -> Sequence[Tensor]:
        """The formulas."""
        return self.derivatives(y, *args)

    def partials(self, y: Tensor, *args: Any) -> Sequence[Tensor]:
        """The formulas."""
        return self.derivatives(y, *args)


@dataclasses.dataclass(frozen=True)
class Equation:
    r"""A function defined by an equation, :math:`F(y, x_1, …) = 0` for each entry.

    .. math:: \frac{\partial y}{\partial x_i} = -\frac{\partial F / \partial x_i}{\partial F / \partial y}

    Attributes:
        solve: ``solve(*args) -> y`` by any means.
        residual: ``residual(y, *args)``, elementwise plain torch code that vanishes at the solution.
    """

    solve: Callable[..., Tensor]
    residual: Callable[..., Tensor]

    def evaluate(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Solve; nothing is kept."""
        return self.solve(*args), ()

    def kept_partials(self, y: Tensor, kept: tuple[Tensor, ...], *args: Any) -> Sequence[Tensor]:
        """One dual evaluation of the residual at the solution."""
        return self.partials(y, *args)

    def partials(self, y: Tensor, *args: Any) -> Sequence[Tensor]:
        """One dual evaluation of the residual at the solution."""
        _, (slope, *rest) = slopes(self.residual, (y, *args))
        return [-f / slope for f in rest]


@dataclasses.dataclass(frozen=True)
class Opaque:
    """Any elementwise Python code: run on duals, one direction per argument.

    Attributes:
        fn: The function.
        strict: Raise if its result does not depend on its arguments (the usual sign of a cut).
    """

    fn: Callable[..., Tensor]
    strict: bool = True

    def evaluate(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Value and partials from one dual pass."""
        y, partials = slopes(self.fn, args, strict=self.strict)
        return y, tuple(partials)

    def kept_partials(self, y: Tensor, kept: tuple[Tensor, ...], *args: Any) -> Sequence[Tensor]:
        """The partials of the forward pass."""
        return kept

    def partials(self, y: Tensor, *args: Any) -> Sequence[Tensor]:
        """Each partial as an opaque function of its own, one dual level up."""
        return [elementwise(Opaque(_Partial(self.fn, i), strict=False), *args) for i in range(len(floats(args)))]


@dataclasses.dataclass(frozen=True)
class _Partial:
    """The i-th partial derivative of ``fn`` as a function."""

    fn: Callable[..., Tensor]
    index: int

    def __call__(self, *args: Any) -> Tensor:
        return slopes(self.fn, args, only=self.index)[1][0]


def floats(args: Sequence[Any]) -> list[int]:
    """Positions of the arguments that are differentiated: floating point tensors."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype.is_floating_point]


def slopes(
    fn: Callable[..., Tensor], args: Sequence[Any], only: int | None = None, strict: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Value and elementwise partials of ``fn``, from one pass on duals with a direction per argument.

    Raises:
        StructureError: The result's shape is not the broadcast shape of the arguments.
        TangentLostError: ``strict``, and the result depends on none of the arguments.
    """
    where = floats(args)
    if only is not None:
        where = [where[only]]
    # Arguments that are not asked about are duals too (structural zeros): the function may write into their copies.
    tangents: list[Tangent | None] = [Zero(len(where)) if i in floats(args) else None for i in range(len(args))]
    for k, i in enumerate(where):
        zero = torch.zeros((), dtype=args[i].dtype, device=args[i].device)
        tangents[i] = Separate(len(where), {k: 1.0}, args[i].shape, zero)
    y, tan = push(fn, args, tangents)
    shape = torch.broadcast_shapes(*(args[i].shape for i in floats(args)))
    if not isinstance(y, Tensor) or y.shape != shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise StructureError(
            f"an elementwise function of these arguments must return shape {tuple(shape)}, got {got}: if outputs "
            "depend on several inputs, use structure='dense'"
        )
    if tan is None or tan.is_zero:
        if strict:
            raise TangentLostError(
                f"{getattr(fn, '__name__', fn)!r} returned a value that does not depend on its inputs by "
                "differentiable operations (a constant, or cut by .detach(), .item() or .numpy())"
            )
        return y, [torch.zeros_like(y) for _ in where]
    if isinstance(tan, Separate):
        return y, [tan.part(k) for k in range(len(where))]
    return y, list(tan.dense().unbind(0))


def elementwise(local: Local, *args: Any) -> Tensor:
    """Apply a local function to broadcasting arguments, differentiably in every mode.

    Args:
        local: A `ClosedForm`, `Equation` or `Opaque` function.
        *args: Its arguments; those that are not floating point tensors are constants.

    Returns:
        The value: a tensor with a one-node graph, or a DualTensor where an argument is one.

    Example:
        >>> import torch
        >>> root = Equation(solve=lambda x: x ** (1 / 3), residual=lambda y, x: y**3 - x)
        >>> x = torch.tensor([8.0], requires_grad=True)
        >>> elementwise(root, x).backward()
        >>> round(float(x.grad), 6)  # 1 / (3 * 2**2)
        0.083333
    """
    level = top_level(args)
    if level:
        return _on_duals(local, args, level)
    refuse_nested_jvp()
    return _Elementwise.apply(local, *args)[0]  # type: ignore[no-untyped-call]


def refuse_nested_jvp() -> None:
    """torch.func.jvp of jvp through any custom Function is wrong in torch itself: raise instead."""
    stack = get_interpreter_stack() or []
    if sum(i.key() == TransformType.Jvp for i in stack) > 1:
        raise UnsupportedOpError(
            "torch.func.jvp of torch.func.jvp through a custom autograd function returns wrong numbers in torch. "
            "Use dualnn.jvp, which nests, or torch.func.jvp of torch.func.grad."
        )


def _on_duals(local: Local, args: Sequence[Any], level: int) -> Tensor:
    parts = [split(a, level) for a in args]
    primals = [p for p, _ in parts]
    y = elementwise(local, *primals)
    tan: Tangent | None = None
    if any(t is not None for _, t in parts):
        partials = dict(zip(floats(primals), local.partials(y, *primals), strict=True))
        for i, (_, t) in enumerate(parts):
            if t is not None:
                term = t.scale(partials[i], y.shape)
                tan = term if tan is None else tan.plus(term)
    return make(y, tan or Zero(count(level, args)), level)


class _Elementwise(torch.autograd.Function):
    """One node: saves arguments, value and what the local function keeps; multiplies by partials in backward."""

    @staticmethod
    def forward(local: Local, *args: Any) -> tuple[Tensor, ...]:  # noqa: D102
        with torch.no_grad():
            y, kept = local.evaluate(*args)
        # A value that is an argument itself would make autograd treat the node as an in-place one.
        return (y.clone() if any(y is a for a in args) else y, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: D102
        ctx.local, *args = inputs
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, args, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, (y, *kept) = saved(ctx)
        # Grad mode is on exactly when this backward is differentiated again (create_graph, torch.func).
        higher = torch.is_grad_enabled()
        partials = ctx.local.partials(y, *args) if higher else ctx.local.kept_partials(y, tuple(kept), *args)
        out: list[Tensor | None] = [None] * len(args)
        for i, p in zip(floats(args), partials, strict=True):
            if ctx.needs_input_grad[i + 1]:
                out[i] = (grad * p).sum_to_size(args[i].shape).to(args[i].dtype)
        return None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        args, (y, *kept) = saved(ctx)
        partials = dict(zip(floats(args), ctx.local.partials(y, *args), strict=True))
        terms = [partials[i] * t for i, t in enumerate(tangents) if t is not None and i in partials]
        return sum(terms[1:], terms[0]).expand(y.shape), *[None] * len(kept)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, local: Local, *args: Any) -> tuple[tuple, tuple]:  # noqa: D102
        ndim = max(a.dim() - (d is not None) for a, d in zip(args, in_dims[1:], strict=True) if isinstance(a, Tensor))
        moved = []
        for a, d in zip(args, in_dims[1:], strict=True):
            if d is not None:
                a = a.movedim(d, 0)
                a = a.reshape(a.shape[0], *(1,) * (ndim + 1 - a.dim()), *a.shape[1:])
            moved.append(a)
        out = _Elementwise.apply(local, *moved)  # type: ignore[no-untyped-call]
        return out, tuple(0 for _ in out)


def save(ctx: Any, args: Sequence[Any], *more: Tensor) -> None:
    """Keep a custom Function's arguments (tensors and others) and further tensors, for backward and jvp."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
    ctx.save_for_backward(*tensors, *more)
    ctx.save_for_forward(*tensors, *more)


def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """What `save` kept: the arguments in their places, and the further tensors."""
    tensors = iter(ctx.saved_tensors)
    args = [next(tensors) if c is None else c[0] for c in ctx.constants]
    return args, tuple(tensors)


__all__ = ["ClosedForm", "Equation", "Local", "Opaque", "elementwise", "floats", "save", "saved", "slopes"]
