r"""The gradient of a sample-by-sample objective as a function like any other.

`gradient` maps :math:`(x, p) \mapsto \nabla_x f(x, p)` and may itself be differentiated: x and the arguments may be
DualTensors of any level, be recorded by autograd, or sit inside ``torch.func``.

=============  =======================================================================================================
``"forward"``  n unit directions at a fresh level: n + 1 evaluations' work; right for code that cuts autograd graphs
``"reverse"``  reverse over dual: f is run on what is given, and every part of the result (the value, each tangent,
               each tangent's tangent) is pulled back to the plain value under all of x's levels. The pulled-back value
               is the gradient, the pulled-back tangents are the gradient's tangents, since
               :math:`\nabla_x (f_x \dot x + f_p \dot p) = f_{xx} \dot x + f_{xp} \dot p` with :math:`\dot x, \dot p`
               held: a few evaluations' work for each part, whatever n is
=============  =======================================================================================================

Reference:
    Griewank, Walther, "Evaluating Derivatives", 2008, chapter 5 (reverse over forward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack, unwrap_if_dead

from dualnn.engine.dual_tensor import DualTensor, make, primal_of
from dualnn.engine.errors import StructureError, TangentLostError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push

Mode = Literal["forward", "reverse"]
FORWARD_LIMIT = 32  # unknowns up to which n directions are no dearer than a backward pass and its graph


def gradient(fn: Callable[..., Tensor], x: Tensor, args: Sequence[Any], mode: Mode) -> tuple[Tensor, Tensor]:
    """Value and gradient in x of each sample.

    Args:
        fn: ``fn(x, *args)``: ``(*batch, n) -> batch``, sample by sample.
        x: Where.
        args: Further arguments.
        mode: See above.

    Returns:
        ``(f, g)`` of shapes ``batch`` and ``(*batch, n)``: dual at every level at which x or an argument is.

    Raises:
        StructureError: fn returned another shape or dtype.
        TangentLostError: In reverse, fn has cut the graph.
    """
    return _forward(fn, x, args) if mode == "forward" else _reverse(fn, x, args)


def columns(fn: Callable[..., Tensor], x: Tensor, args: Sequence[Any]) -> tuple[Any, Tensor]:
    """``fn(x, *args)`` and its derivative in each of the n unknowns, stacked in front: ``(n, *out)``."""
    n, lead = x.shape[-1], x.dim() - 1
    unit = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *(1,) * lead, n).expand(n, *x.shape)
    y, tan = push(fn, (x, *args), [Dense(unit), *(None for _ in args)])
    if not isinstance(y, Tensor):
        raise StructureError(f"fn must return a tensor, got {type(y).__name__}")
    if tan is None:
        raise StructureError(f"fn must return {x.dtype}, got {y.dtype}")
    return y, dense_of(tan, y)  # type: ignore[return-value]


def _forward(fn: Callable[..., Tensor], x: Tensor, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    y, slopes = columns(fn, x, args)
    check_objective(y, x)
    # Contiguous: a sum over the unknowns then runs in one order, whatever the batch.
    return y, slopes.movedim(0, -1).contiguous()


def _reverse(fn: Callable[..., Tensor], x: Tensor, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    bottom = primal_of(x)
    result: list[Tensor] = []

    def parts_of(leaf: Tensor) -> list[Tensor]:
        y = fn(_on(x, leaf), *args)
        check_objective(y, x)
        result[:] = [y]
        parts: list[Tensor] = []
        _each(y, lambda part: parts.append(part) or part)  # type: ignore[func-returns-value]
        return parts

    if get_interpreter_stack():  # torch.func's own levels: requires_grad_ has no meaning inside them
        parts, pull, *_ = torch.func.vjp(parts_of, unwrap_if_dead(bottom))

        def back(i: int, seed: Tensor) -> Tensor:
            return pull([seed if j == i else torch.zeros_like(p) for j, p in enumerate(parts)])[0]
    else:
        create = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (x, *args))
        with torch.enable_grad():
            # A fresh node: whatever else depends on x (an argument, a tangent) counts as a constant here.
            leaf = bottom.view_as(bottom) if create and bottom.requires_grad else bottom.detach().requires_grad_()
            parts = parts_of(leaf)
        if not parts[0].requires_grad:
            raise TangentLostError(
                "fn carries no graph to backpropagate through: it runs under no_grad, detaches what it computes, or "
                "does not use x. Use gradient='forward', which needs no graph."
            )

        def back(i: int, seed: Tensor) -> Tensor:
            if not parts[i].requires_grad:
                return torch.zeros_like(leaf)
            (found,) = torch.autograd.grad(
                parts[i], leaf, seed, retain_graph=True, create_graph=create, allow_unused=True
            )
            return torch.zeros_like(leaf) if found is None else found

    pulled = iter([_rows(i, part, x.dim() - 1, back) for i, part in enumerate(parts)])
    y = result[0] if not get_interpreter_stack() else _refilled(result[0], parts)
    g = _each(y, lambda _: next(pulled))
    if not get_interpreter_stack() and not create:
        y = _each(y, Tensor.detach)
    return y, g


def _rows(i: int, part: Tensor, batch_dim: int, back: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Pull back part i, ``(*lead, *batch)``, one of the leading directions after the other: ``(*lead, *batch, n)``."""
    lead = part.shape[: part.dim() - batch_dim]
    one = torch.ones_like(part)
    if not lead:
        return back(i, one)
    flat = one.reshape(-1, *part.shape[len(lead) :])
    rows = []
    for k in range(len(flat)):
        chosen = torch.zeros_like(flat)
        chosen[k] = 1
        rows.append(back(i, chosen.reshape(part.shape)))
    return torch.stack(rows).reshape(*lead, *rows[0].shape)


def _on(x: Tensor, leaf: Tensor) -> Tensor:
    """The nested dual x with another plain value at its bottom."""
    return make(_on(x._primal, leaf), x._tan, x._level) if isinstance(x, DualTensor) else leaf


def _each(y: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Map every plain part of a nested dual: its value first, then its tangents."""
    if isinstance(y, DualTensor):
        return make(_each(y._primal, fn), y._tan.map(lambda d: _each(d, fn)), y._level)
    return fn(y)


def _refilled(y: Tensor, parts: Sequence[Tensor]) -> Tensor:
    given = iter(parts)
    return _each(y, lambda _: next(given))


def check_objective(y: Any, x: Tensor) -> None:
    """Check that an objective gives one number a sample."""
    if not isinstance(y, Tensor) or y.shape != x.shape[:-1]:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise StructureError(
            f"fn must return one number a sample, a tensor of shape {tuple(x.shape[:-1])} for x of shape "
            f"{tuple(x.shape)}, got {got}"
        )
    if y.dtype != x.dtype:
        raise StructureError(
            f"fn returned {y.dtype} for an unknown of {x.dtype}: convert x0 or the arguments so that they agree"
        )


def probe(fn: Callable[..., Tensor], x: Tensor, args: Sequence[Any], mode: Mode) -> None:
    """Check on plain tensors, once, what cannot be seen in a value.

    Raises:
        StructureError: Samples influence one another.
        TangentLostError: In reverse, part of fn is hidden from autograd, so that the gradient would be wrong.
    """
    batch = x.shape[:-1]
    mixed = batch.numel() > 1
    if not mixed and mode == "forward":
        return
    v = torch.cos(torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)).expand_as(x)
    half = (torch.arange(batch.numel(), device=x.device) % 2 == 0).reshape(batch)
    y, tan = push(fn, (x, *args), [Dense(torch.stack([v, v * half.unsqueeze(-1)])), *(None for _ in args)])
    check_objective(y, x)
    slope, part = dense_of(tan, y)  # type: ignore[misc]
    if mixed and float((part - torch.where(half, slope, 0)).abs().max()) > 1e-6 * float(slope.abs().max()):
        raise StructureError(
            "fn mixes samples (BatchNorm in training, a mean over the batch?), but each is minimised for itself. Make "
            "them one problem of shape (n,), or take the mixing out."
        )
    if mode == "reverse":
        g = _reverse(fn, x, args)[1]
        terms = (g * v).abs().sum(-1) + slope.abs()
        floor = torch.finfo(x.dtype).eps ** 0.5 * (1 + y.abs())
        if bool(((g * v).sum(-1) - slope).abs().gt(1e-3 * terms + floor).any()):
            raise TangentLostError(
                "autograd sees only part of fn (a no_grad block, .detach(), or numbers built anew): its gradient "
                "disagrees with the one of duals. Use gradient='forward'."
            )
