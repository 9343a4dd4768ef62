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
from dualnn.layers.online.scan import scan

if TYPE_CHECKING:
    from dualnn.layers.online.cell import OnlineCell
    from dualnn.layers.online.state import OnlineState

Rows = Sequence[Sequence[Tensor | None]]


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
    return after, [*(t for row in jacobian for t in row), *kept], *traces


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
    size = len(after)
    jacobian = [kept[i * size : (i + 1) * size] for i in range(size)]
    delta, first = adjoint(jacobian, cell.output_adjoint(grad, after), after)
    # Conjugates of real numbers cost nothing; for complex states gradients are cotangents, the conjugate derivatives.
    drives, mine = cell.pull(kept[size * size :], [d.conj() for d in delta], own)
    rows = cell.packed(drives.expand(*x.shape[:2], *drives.shape[2:]).conj())  # (T, B, R N)
    whole = torch.stack(first)
    behind = cell.packed(torch.einsum("bisgn,sbn->ign", traces[0].conj(), whole))  # (I + 1, R N)
    flat = rows.flatten(0, 1)
    found: list[Tensor | None] = [
        rows @ weight if wants_x else None,
        torch.addmm(behind[:-1].T, flat.T, x.flatten(0, 1)),
        behind[-1] + flat.sum(0),
    ]
    if own:
        total = mine.conj().sum(0) + torch.einsum("bspn,sbn->pn", traces[1].conj(), whole)
        found += [t.real if t.is_complex() and not p.is_complex() else t for t, p in zip(total, own, strict=True)]
    return found


def transposed(rows: Rows) -> list[list[Tensor | None]]:
    """A square nested list by columns."""
    return [list(column) for column in zip(*rows, strict=True)]


def suffixes(jacobian: Rows, like: Sequence[Tensor]) -> list[list[Tensor]]:
    """Products of the Jacobians of all later steps, from before the window: ``[i][j]`` is ``(T + 1, B or 1, N)``."""
    size = len(jacobian)
    shape = next((t.shape[1:] for row in jacobian for t in row if t is not None), like[0].shape[1:])
    eye = torch.eye(size, dtype=like[0].dtype, device=like[0].device)
    start = [eye[j].reshape(-1, *(1,) * len(shape)).expand(size, *shape) for j in range(size)]
    columns = [[None if t is None else t.unsqueeze(1) for t in column] for column in transposed(jacobian)]
    if all(t is None for column in columns for t in column):  # nothing is remembered
        found = [s.new_zeros(like[0].shape[0], *s.shape) for s in start]
    else:
        found = scan(columns, [None] * size, start, reverse=True)
    whole = [torch.cat([f, s.unsqueeze(0)]) for f, s in zip(found, start, strict=True)]
    return [[w[:, i] for w in whole] for i in range(size)]


def moved(
    cell: OnlineCell, state: OnlineState, x: Tensor, jacobian: Rows, kept: list[Tensor | None], own: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The sensitivities at the end of the window."""
    steps, batch, _ = x.shape
    size = len(jacobian)
    suffix = suffixes(jacobian, [v.expand(steps, *v.shape) for v in state.values])
    whole = torch.stack([torch.stack([s[0] for s in row], 1) for row in suffix], 1)  # (B or 1, S, S, N)

    def carried(trace: Tensor) -> Tensor:  # (B, …, S, G or P, N) -> the same; sums over the earlier state
        phi = whole.reshape(len(whole), *(1,) * (trace.dim() - 4), size, size, 1, whole.shape[-1])
        return phi[..., 0, :, :] * trace if size == 1 else (phi * trace.unsqueeze(-4)).sum(-3)

    new, mine = carried(state.weight), carried(state.own)  # type: ignore[arg-type]
    # The bias is the weight of one more input, which is 1. Inputs first: units lie side by side in the product.
    inputs = torch.cat([x, x.new_ones(steps, batch, 1)], -1).to(new.dtype).permute(1, 2, 0)  # (B, I + 1, T)
    for s, row in enumerate(suffix):
        drives, added = cell.pull(kept, [f[1:] for f in row], own)
        rows = drives.expand(steps, batch, *drives.shape[2:]).flatten(2).transpose(0, 1)  # (B, T, G N)
        new[:, :, s] += torch.bmm(inputs, rows).unflatten(-1, drives.shape[2:])
        if own:
            mine[:, s] += added
    return new, mine


def adjoint(
    jacobian: Rows, cotangents: Sequence[Tensor | None], like: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Cotangents of every state of the window, and of the one before it."""
    turned = [[None if t is None else t.conj() for t in column] for column in transposed(jacobian)]
    delta = [torch.zeros_like(s) if g is None else g for g, s in zip(cotangents, like, strict=True)]
    last = [d[-1] for d in delta]
    if len(delta[0]) > 1:
        later = [[None if t is None else t[1:] for t in row] for row in turned]
        found = scan(later, [d[:-1] for d in delta], last, reverse=True)
        delta = [torch.cat([f, e.unsqueeze(0)]) for f, e in zip(found, last, strict=True)]
    first = []
    for row in turned:
        total = torch.zeros_like(last[0])
        for t, d in zip(row, delta, strict=True):
            total = total if t is None else torch.addcmul(total, t[0], d[0])
        first.append(total)
    return delta, first
