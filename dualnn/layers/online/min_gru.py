"""`MinGRU`: a gated average whose gate does not see the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.node import Rows


class MinGRU(OnlineCell):
    r"""Minimal gated recurrent unit, with exact online gradients.

    .. math:: z_t = \sigma(W_z x_t + b_z), \qquad \tilde h_t = W_h x_t + b_h, \qquad
        h_t = (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t

    The gate and the candidate depend on the input only, not on :math:`h_{t-1}`: the recurrence is linear in the state,
    with coefficients that follow the input. It has no parameters of its own, so all traces are those of W and b.

    See `OnlineCell` for its two modes and for what is exact.

    Args:
        input_size: I.
        hidden_size: N.

    Shape:
        x: (T, B, I) -> y: (T, B, N); ``step``: (B, I) -> (B, N). ``weight: (2 N, I)``: gate, candidate.

    Raises:
        DualInputError: Integer inputs, an empty window, sizes below 1.
        DualShapeError: Inputs or a state of another shape or dtype.

    Reference:
        Feng, Tung, Ahmed, Bengio, Hajimirsadeghi, "Were RNNs all we needed?", 2024, arXiv 2410.01201.

    Example:
        >>> cell = MinGRU(3, 4)
        >>> optimizer, state = torch.optim.SGD(cell.parameters(), lr=0.1), None
        >>> for x in torch.randn(100, 2, 3):  # a stream: learn at every step, keep nothing
        ...     y, state = cell.step(x, state)
        ...     optimizer.zero_grad()
        ...     (y - 1).square().mean().backward()
        ...     optimizer.step()
    """

    gates: ClassVar[int] = 2
    rows: ClassVar[int] = 2

    def advance(self, state: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gated average."""
        return (torch.lerp(state[0], drives[1], torch.sigmoid(drives[0])),)

    def coefficients(self, drives: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Rows, Sequence[Tensor]]:
        """1 - z and z times the candidate."""
        z = torch.sigmoid(drives[0])
        return [[1 - z]], [z * drives[1]]

    def linearise(
        self, before: Sequence[Tensor], after: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor | None]]:
        """In closed form."""
        z = torch.sigmoid(drives[0])
        rest = 1 - z
        return [[rest]], [torch.stack([(drives[1] - before[0]) * z * rest, z], 2)]

    def pull(self, kept: Sequence[Any], vector: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """In closed form."""
        return vector[0].unsqueeze(2) * kept[0], vector[0].new_zeros(vector[0].shape[1], 0, self.hidden_size)
