"""`ElementwiseLSTM`: an LSTM whose recurrent matrices are diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.scan import summed


class ElementwiseLSTM(OnlineCell):
    r"""Long short-term memory with a diagonal recurrence, and exact online gradients.

    .. math::
        (i, f, o) = \sigma(W_{i,f,o}\, x_t + b_{i,f,o} + r_{i,f,o} \odot h_{t-1}), \quad
        g = \tanh(W_g x_t + b_g + r_g \odot h_{t-1}), \quad
        c_t = f \odot c_{t-1} + i \odot g, \quad h_t = o \odot \tanh(c_t)

    It is ``torch.nn.LSTM`` with diagonal recurrent matrices: a unit sees its own past output only. Two numbers of state
    (h, c) and four gates a unit, so eight traces for each input.

    See `OnlineCell` for its two modes and for what is exact.

    Args:
        input_size: I.
        hidden_size: N.
        forget_bias: Where the forget gate's bias starts: larger remembers longer.

    Shape:
        x: (T, B, I) -> y: (T, B, N); ``step``: (B, I) -> (B, N). ``weight: (4 N, I)``, gates i, f, o, g;
        ``recurrent_i: (N,)`` and so on.

    Raises:
        DualInputError: Integer inputs, an empty window, sizes below 1.
        DualShapeError: Inputs or a state of another shape or dtype.

    Reference:
        Hochreiter, Schmidhuber, "Long short-term memory", Neural Computation 9, 1997. Exact real-time
        recurrent learning with element-wise recurrence: Irie, Gopalakrishnan, Schmidhuber, 2023, arXiv 2305.19044.

    Example:
        >>> cell = ElementwiseLSTM(3, 4)
        >>> y, state = cell.window(torch.randn(10, 2, 3))
        >>> y.square().mean().backward()
        >>> cell.recurrent_f.grad.shape
        torch.Size([4])
    """

    states: ClassVar[int] = 2
    gates: ClassVar[int] = 4
    rows: ClassVar[int] = 4
    own_names: ClassVar[tuple[str, ...]] = ("recurrent_i", "recurrent_f", "recurrent_o", "recurrent_g")

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float = 1.0) -> None:
        super().__init__(input_size, hidden_size)
        for name in self.own_names:
            setattr(self, name, nn.Parameter(torch.empty(hidden_size).uniform_(-1, 1)))
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] = forget_bias

    def advance(self, state: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """The four gates."""
        h, c = state
        return self._next(h, c, torch.stack(list(drives), -2), torch.stack(list(own)))

    def recorded(self, values: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """The four gates of a step lie side by side: half the operations."""
        recurrent, (h, c), seen = torch.stack(list(own)), values, []
        for u in projected.unflatten(-1, (4, self.hidden_size)).unbind(0):
            h, c = self._next(h, c, u, recurrent)
            seen.append((h, c))
        return [torch.stack(s) for s in zip(*seen, strict=True)]

    @staticmethod
    def _next(h: Tensor, c: Tensor, u: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor]:
        gates = torch.addcmul(u, recurrent, h.unsqueeze(-2))
        i, f, o = torch.sigmoid(gates[..., :3, :]).unbind(-2)
        c = torch.addcmul(f * c, i, torch.tanh(gates[..., 3, :]))
        return o * torch.tanh(c), c

    def along(
        self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, list[Tensor | None]]:
        """In closed form; the loop writes gates and states where the derivatives read them."""
        gates, recurrent = projected.unflatten(-1, (4, self.hidden_size)), torch.stack(list(own))
        h, c = (torch.cat([s.unsqueeze(0), s.new_empty(len(projected), *s.shape)]) for s in start)
        if self.compiled is not None:
            for whole, found in zip((h, c), self._in_chunks(start, projected, own), strict=True):
                whole[1:] = found
            gates = torch.addcmul(gates, recurrent, h[:-1].unsqueeze(2))
            gates[:, :, :3].sigmoid_()
            gates[:, :, 3].tanh_()
            seen = torch.tanh(c[1:])
        else:
            seen = torch.empty_like(c[1:])
            hs, cs = h.unbind(0), c.unbind(0)
            parts = (gates, gates[:, :, :3], *gates.unbind(2), seen, h[:-1].unsqueeze(2))
            for t, (u, squashed, i, f, o, g, s, last) in enumerate(zip(*(p.unbind(0) for p in parts), strict=True)):
                u.addcmul_(recurrent, last)  # what was projected is not needed again
                squashed.sigmoid_()
                g.tanh_()
                torch.mul(f, cs[t], out=cs[t + 1]).addcmul_(i, g)
                torch.mul(o, torch.tanh(cs[t + 1], out=s), out=hs[t + 1])
        i, f, o, g = gates.unbind(2)
        by = torch.empty_like(gates)  # derivatives of c in the drives; of h, for the output gate
        squashed = gates[:, :, :3]
        torch.addcmul(squashed, squashed, squashed, value=-1, out=by[:, :, :3])
        by_i, by_f, by_o, by_g = by.unbind(2)
        by_i *= g
        by_f *= c[:-1]
        by_o *= seen
        torch.addcmul(i, i * g, g, value=-1, out=by_g)
        by_c = torch.addcmul(o, h[1:], seen, value=-1)
        jacobian = f.new_empty(len(f), 2, 2, *f.shape[1:])
        (h_by_h, h_by_c), (c_by_h, c_by_c) = (row.unbind(1) for row in jacobian.unbind(1))
        torch.mul(by_i, own[0], out=c_by_h).addcmul_(by_f, own[1]).addcmul_(by_g, own[3])
        torch.mul(by_o, own[2], out=h_by_h).addcmul_(by_c, c_by_h)
        torch.mul(by_c, f, out=h_by_c)
        c_by_c.copy_(f)
        return [h[1:], c[1:]], jacobian, [by, by_c, h[:-1]]

    def pull(self, kept: Sequence[Any], vector: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """In closed form; a recurrent weight is a drive's weight whose input is h."""
        by, by_c, h = kept
        drives = by * torch.addcmul(vector[1], vector[0], by_c).unsqueeze(2)
        torch.mul(by[:, :, 2], vector[0], out=drives[:, :, 2])
        return drives, summed(drives, h.unsqueeze(2))
