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
        weight, bias, *own = parameters
        projected = torch.nn.functional.linear(x, weight, bias)
        before, after = cell.run(state.values, projected, own)
        jacobian, kept = cell.linearise(before, after, cell.drives(projected), own)
        y = cell.output(after)
        new = [a[-1].clone() for a in after]
        weight_trace, own_trace = moved(cell, state, x, jacobian, kept, own)
        ctx.cell, ctx.sizes = cell, (len(after), len(own), len(kept))
        # The state's tensors are ours and never written to; x and the parameters are checked for that by autograd.
        entries = [t for row in jacobian for t in row]
        ctx.save_for_backward(x, *parameters, state.weight, state.own, *after, *kept, *entries)
        ctx.mark_non_differentiable(*new, weight_trace, own_trace)
        ctx.set_materialize_grads(False)
        return y, *new, weight_trace, own_trace

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        cell: OnlineCell = ctx.cell
        states, owns, keeps = ctx.sizes
        wanted = ctx.needs_input_grad[2:]
        out: list[Tensor | None] = [None] * len(wanted)
        if grad is None:
            return None, None, *out
        given = iter(ctx.saved_tensors)
        x, weight, _, *own = (next(given) for _ in range(3 + owns))
        weight_trace, own_trace = next(given), next(given)
        after, kept = ([next(given) for _ in range(n)] for n in (states, keeps))
        jacobian = [[next(given) for _ in range(states)] for _ in range(states)]
        delta, first = adjoint(jacobian, cell.output_adjoint(grad, after), after)
        drives, mine = cell.pull(kept, [d.conj() for d in delta], own)
        rows = cell.packed([d.conj() for d in drives], -1)  # (T, B, R N)
        if wanted[0]:
            out[0] = rows @ weight
        if wanted[1] or wanted[2]:
            rows = rows.flatten(0, 1)
            past = torch.einsum("bsgni,sbn->gni", weight_trace.conj(), torch.stack(first))
            behind = cell.packed(list(past), 0)  # (R N, I + 1)
            out[1] = torch.addmm(behind[:, :-1], rows.T, x.flatten(0, 1))
            out[2] = behind[:, -1] + rows.sum(0)
        if owns:
            past = torch.einsum("bspn,sbn->pn", own_trace.conj(), torch.stack(first))
            for p in range(owns):
                total = mine[p].conj().sum(0) + past[p]
                out[3 + p] = total.real if total.is_complex() and not own[p].is_complex() else total
        return None, None, *out


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
    weight, mine = state.weight, state.own
    if weight is None or mine is None:
        raise DualInputError("this state carries no sensitivities")
    steps, batch, _ = x.shape
    size, units = len(jacobian), weight.shape[3]
    suffix = suffixes(jacobian, [v.expand(steps, *v.shape) for v in state.values])
    pulled = [cell.pull(kept, [s[1:] for s in row], own) for row in suffix]
    columns = [c.expand(steps, batch, units) for drives, _ in pulled for c in drives]
    left = torch.stack(columns, 2) if len(columns) > 1 else columns[0]
    left = left.flatten(2).permute(1, 2, 0)  # (B, S G N, T)
    # The bias is the weight of one more input, which is 1.
    right = torch.cat([x, x.new_ones(steps, batch, 1)], -1).transpose(0, 1).to(left.dtype)  # (B, T, I + 1)
    whole = torch.stack([torch.stack([s[0] for s in row], 1) for row in suffix], 1)  # (B or 1, S, S, N)

    def carried(trace: Tensor) -> Tensor:  # (B, S, …) -> the same; sums over the earlier state
        phi = whole.unsqueeze(3)
        phi = phi.unsqueeze(-1) if trace.dim() == 5 else phi
        return phi[:, 0] * trace if size == 1 else (phi * trace.unsqueeze(1)).sum(2)

    new = torch.baddbmm(carried(weight).flatten(1, 3), left, right).reshape(weight.shape)
    if not own:
        return new, mine.clone()
    added = torch.stack([torch.stack([m.expand(batch, units) for m in terms], 1) for _, terms in pulled], 1)
    return new, carried(mine) + added


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
