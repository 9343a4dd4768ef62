"""The right-hand side as the integrators see it: counted, checked, and linearised by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.factors import LU, same_shape


class Counts:
    """What has been spent, on the whole batch."""

    def __init__(self) -> None:
        self.evaluations = self.jacobians = self.factorisations = 0


class Field:
    """``fn(t, y, *args)`` for times of the batch's shape.

    Args:
        fn: The user's function.
        args: Its further arguments.
        counts: Where evaluations are counted; None: they are not.
    """

    def __init__(self, fn: Callable[..., Tensor], args: Sequence[Any], counts: Counts | None = None) -> None:
        self.fn, self.args = fn, tuple(args)
        self.counts = Counts() if counts is None else counts
        self.known: Any = None  # what `along` found out about the arguments
        self._seeds: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side at ``t: batch``, ``y: (*batch, n)``."""
        self.counts.evaluations += 1
        f = self._of(t, y)
        same_shape(f, y)
        return f

    def _of(self, t: Tensor, y: Tensor) -> Tensor:
        return self.fn(t.unsqueeze(-1) if y.dim() > 1 else t, y, *self.args)

    def linearise(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""``(f, f_y, f_t)`` by one dual pass.

        Shape:
            ``f: (*batch, n), f_y: (*batch, n, n), f_t: (*batch, n)``.
        """
        self.counts.jacobians += 1
        in_t, in_y = self._directions(t, y)
        f, tan = push(self._of, (t, y), [Dense(in_t), Dense(in_y)])
        same_shape(f, y)
        columns: Any = dense_of(tan, f)
        return f, columns[:-1].movedim(0, -1), columns[-1]

    def factorise(self, matrix: Tensor) -> LU:
        """LU factors, counted."""
        self.counts.factorisations += 1
        return LU(matrix)

    def _directions(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._seeds is None or self._seeds[1].shape[1:] != y.shape:
            n, device = y.shape[-1], y.device
            in_y = torch.eye(n + 1, n, dtype=y.dtype, device=device).reshape(n + 1, *(1,) * (y.dim() - 1), n)
            in_t = torch.eye(n + 1, dtype=y.dtype, device=device)[n].reshape(n + 1, *(1,) * t.dim())
            self._seeds = in_t.expand(n + 1, *t.shape), in_y.expand(n + 1, *y.shape)
        return self._seeds
