"""What an online cell carries from window to window: its state, and how that moves with every parameter."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dualnn.engine.errors import DualInputError, DualShapeError


@dataclasses.dataclass(frozen=True)
class OnlineState:
    r"""State of an online cell, without graph, and its exact sensitivities to the cell's parameters.

    Its size does not depend on how many steps lie behind it. It is never written to, so an older one may be kept and
    gone back to; it pickles and saves as its tensors do, so a stream can be resumed.

    Attributes:
        values: S tensors, the units' state.
        weight: :math:`\partial s / \partial (W, b)`, G drives of every unit against its inputs and bias; None where no
            gradient is wanted.
        own: :math:`\partial s / \partial \theta`, P parameters a unit, likewise.

    Shape:
        ``values: (B, N)`` each, ``weight: (B, I + 1, S, G, N)``, ``own: (B, S, P, N)``.

    Example:
        >>> from dualnn.layers import MinGRU
        >>> state = MinGRU(3, 4).start(2)
        >>> tuple(state.weight.shape), state.nbytes
        ((2, 4, 1, 2, 4), 288)
    """

    values: tuple[Tensor, ...]
    weight: Tensor | None = None
    own: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.values, self.weight, self.own) if t is not None)

    def reset(self, ended: Tensor) -> OnlineState:
        """The state where some samples start anew: their values and sensitivities are zero, whatever they were.

        Args:
            ended: Which samples.

        Shape:
            ``ended: (B,)``, booleans.

        Raises:
            DualInputError: ``ended`` is not of booleans.
            DualShapeError: It has another shape.
        """
        batch = self.values[0].shape[0]
        if not isinstance(ended, Tensor) or ended.dtype != torch.bool:
            got = ended.dtype if isinstance(ended, Tensor) else type(ended).__name__
            raise DualInputError(f"ended must be a tensor of booleans, one a sample, got {got}")
        if ended.shape != (batch,):
            raise DualShapeError(f"ended must have shape ({batch},), one entry a sample, got {tuple(ended.shape)}")

        # Not a product with zero: a sample that has gone to nan must come back.
        def clear(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.masked_fill(ended.reshape(-1, *(1,) * (t.dim() - 1)), 0)

        return OnlineState(tuple(clear(v) for v in self.values), clear(self.weight), clear(self.own))  # type: ignore[misc]

    def without_traces(self) -> OnlineState:
        """The values alone: steps from here on are plain inference."""
        return OnlineState(self.values)
