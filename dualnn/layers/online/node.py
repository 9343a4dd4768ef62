r"""One window of an online cell as one node of graph.

With the local derivatives :math:`J_t = \partial s_t / \partial s_{t-1}`, :math:`U_t = \partial s_t / \partial u_t` (of
the drives :math:`u_t = W x_t + b`), :math:`P_t = \partial s_t / \partial \theta`, small matrices a unit, and
:math:`\Phi_t = J_{T} \cdots J_{t+1}`, forward moves the sensitivities to the end of the window,

.. math:: E^W_T = \Phi_0 E^W_0 + \sum_t \Phi_t U_t \otimes x_t, \qquad
    E^\theta_T = \Phi_0 E^\theta_0 + \sum_t \Phi_t P_t

(the sum over t is a matrix product), and backward takes the window's cotangents :math:`g_t` back to its start,

.. math:: \delta_t = J_{t+1}^T \delta_{t+1} + g_t, \qquad
    \bar W = \sum_t U_t^T \delta_t \otimes x_t + \langle \delta_0, E^W_0 \rangle, \qquad
    \bar x_t = W^T U_t^T \delta_t :

backpropagation within the window, and the traces for all that lies before it. That is exact for every parameter of the
cell; what is cut is the path from this window's loss to the *inputs* of earlier windows.

Reference:
    Williams, Zipser, "A learning algorithm for continually running fully recurrent neural networks", Neural
    Computation 1, 1989. Blocks of steps: Schmidhuber, "A fixed size storage O(n^3) time complexity learning algorithm
    for fully recurrent continually running networks", Neural Computation 4, 1992.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualnn.engine.errors import DualInputError
from dualnn.layers.online.scan import scan, times

if TYPE_CHECKING:
    from dualnn.layers.online.cell import OnlineCell
    from dualnn.layers.online.state import OnlineState

Rows = Sequence[Sequence[Tensor | None]]  # of a Jacobian; None where an entry is zero in every step


class Window(torch.autograd.Function):
    """``(cell, state, x, weight, bias, *own) -> (y, *values, E_weight, E_own)``; only y is differentiable."""

    @staticmethod
    def forward(ctx: Any, cell: OnlineCell, state: OnlineState, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        if state.weight is None or state.own is None:
            raise DualInputError("this state carries no sensitivities")
        after, kept, weight_trace, own_trace = cell.ahead(state, x, *parameters)
        new = [a[-1].clone() for a in after]
        ctx.cell, ctx.sizes = cell, (len(parameters), len(after), len(kept))
        # The state's tensors are ours and never written to; x and the parameters are checked for that by autograd.
        ctx.save_for_backward(x, *parameters, state.weight, state.own, *after, *kept)
        ctx.mark_non_differentiable(*new, weight_trace, own_trace)
        ctx.set_materialize_grads(False)
        return cell.output(after), *new, weight_trace, own_trace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        wanted = ctx.needs_input_grad[2:]
        if grad is None:
            return None, None, *[None] * len(wanted)
        given = iter(ctx.saved_tensors)
        x = next(given)
        parameters, traces, after, kept = ([next(given) for _ in range(n)] for n in (ctx.sizes[0], 2, *ctx.sizes[1:]))
        return None, None, *ctx.cell.back(grad, x, parameters, traces, after, kept, wanted[0])


def ahead(
    cell: OnlineCell, state: OnlineState, x: Tensor, weight: Tensor, bias: Tensor, *own: Tensor
) -> tuple[Sequence[Tensor], list[Tensor | None], Tensor, Tensor]:
    """States after every step, what `back` needs, and the sensitivities at the end of the window."""
    after, jacobian, kept = cell.along(state.values, torch.nn.functional.linear(x, weight, bias), own)
    traces = moved(cell, state, x, jacobian, kept, own)
    return after, [jacobian, *kept], *traces


def back(
    cell: OnlineCell,
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    traces: Sequence[Tensor],
    after: Sequence[Tensor],
    kept: list[Tensor | None],
    wants_x: bool,
) -> list[Tensor | None]:
    """Gradients of x and of the parameters, over the whole past."""
    weight, _, *own = parameters
    jacobian, *rest = kept
    delta, whole = adjoint(jacobian, cell.output_adjoint(grad, after), after)  # type: ignore[arg-type]
    # Conjugates of real numbers cost nothing; for complex states gradients are cotangents, the conjugate derivatives.
    drives, mine = cell.pull(rest, delta.conj().unbind(1), own)
    rows = cell.packed(drives.expand(*x.shape[:2], *drives.shape[2:]).conj())  # (T, B, R N)
    earlier = whole.transpose(0, 1).unsqueeze(2)  # (B, S, 1, N)
    behind = cell.packed((traces[0].conj() * earlier.unsqueeze(1)).sum((0, 2)))  # (I + 1, R N)
    flat = rows.flatten(0, 1)
    found: list[Tensor | None] = [
        rows @ weight if wants_x else None,
        torch.addmm(behind[:-1].T, flat.T, x.flatten(0, 1)),
        behind[-1] + flat.sum(0),
    ]
    if own:
        total = mine.conj().sum(0) + (traces[1].conj() * earlier).sum((0, 1))
        found += [t.real if t.is_complex() and not p.is_complex() else t for t, p in zip(total, own, strict=True)]
    return found


def suffixes(jacobian: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of the Jacobians of all later steps, from before the window, ``(T + 1, S, S, …)``: transposed."""
    steps, size, _, *units = jacobian.shape
    found = jacobian.new_empty(steps + 1, size, size, *units, dtype=dtype)
    found[-1] = torch.eye(size, dtype=dtype, device=jacobian.device).reshape(size, size, *(1 for _ in units))
    scan(jacobian.transpose(1, 2).unsqueeze(3), None, found[-1], reverse=True, out=found[:-1])
    return found


def moved(
    cell: OnlineCell, state: OnlineState, x: Tensor, jacobian: Tensor, kept: list[Tensor | None], own: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sensitivities at the end of the window."""
    steps, batch, _ = x.shape
    size = len(state.values)
    suffix = suffixes(jacobian, state.values[0].dtype)
    whole = suffix[0].permute(2, 1, 0, 3)  # (B or 1, S, S, N)

    def carried(trace: Tensor) -> Tensor:  # (B, …, S, G or P, N) -> the same; sums over the earlier state
        phi = whole.reshape(len(whole), *(1,) * (trace.dim() - 4), size, size, 1, whole.shape[-1])
        return phi[..., 0, :, :] * trace if size == 1 else (phi * trace.unsqueeze(-4)).sum(-3)

    new, mine = carried(state.weight), carried(state.own)  # type: ignore[arg-type]
    # The bias is the weight of one more input, which is 1. Inputs first: units lie side by side in the product.
    inputs = torch.cat([x, x.new_ones(steps, batch, 1)], -1).to(new.dtype).permute(1, 2, 0)  # (B, I + 1, T)
    for s in range(size):
        drives, added = cell.pull(kept, suffix[1:, :, s].unbind(1), own)
        rows = drives.expand(steps, batch, *drives.shape[2:]).flatten(2).transpose(0, 1)  # (B, T, G N)
        new[:, :, s] += torch.bmm(inputs, rows).unflatten(-1, drives.shape[2:])
        if own:
            mine[:, s] += added
    return new, mine


def adjoint(jacobian: Tensor, cotangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Cotangents of every state of the window, ``(T, S, B, N)``, and of the one before it."""
    turned = jacobian.transpose(1, 2).conj()
    given = torch.stack([torch.zeros_like(s) if g is None else g for g, s in zip(cotangents, like, strict=True)], 1)
    if len(given) > 1:  # every entry is read before it is written
        scan(turned[1:], given[:-1], given[-1], reverse=True, out=given[:-1])
    return given, times(turned[0], given[0])
