"""`ElementwiseLSTM`: an LSTM whose recurrent matrices are diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.node import Rows


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

    def linearise(
        self, before: Sequence[Tensor], after: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor | None]]:
        """In closed form: the derivatives of c in the drives, of h in c and in the output gate's drive."""
        (h, c), (after_h, after_c) = before, after
        i, f, o, g = (torch.addcmul(u, r, h) for u, r in zip(drives, own, strict=True))
        i, f, o, g = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o), torch.tanh(g)
        seen = torch.tanh(after_c)
        by_i, by_f, by_g = g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)
        by_o, by_c = after_h * (1 - o), o * (1 - seen * seen)
        c_by_h = by_i * own[0] + by_f * own[1] + by_g * own[3]
        jacobian = [[torch.addcmul(by_o * own[2], by_c, c_by_h), by_c * f], [c_by_h, f]]
        return jacobian, [by_i, by_f, by_o, by_g, by_c, h]

    def pull(
        self, kept: Sequence[Any], vector: Sequence[Tensor], own: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """In closed form; a recurrent weight is a drive's weight whose input is h."""
        by_i, by_f, by_o, by_g, by_c, h = kept
        of_c = torch.addcmul(vector[1], vector[0], by_c)
        drives = [of_c * by_i, of_c * by_f, vector[0] * by_o, of_c * by_g]
        return drives, [(d * h).sum(0) for d in drives]
