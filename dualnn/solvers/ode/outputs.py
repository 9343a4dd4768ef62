"""Results at the requested times, from the steps that passed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Output(NamedTuple):
    """A requested time that some samples passed in a step."""

    row: int
    samples: Tensor
    theta: Tensor
    value: Tensor


class Outputs:
    """What was asked for, and what has been found; nan where nothing has.

    Args:
        t: The requested times, the start first.
        y: What is known there, ``(*lead, *batch, n)``.
        sign: 1 or -1, of the direction of time.
        batch: Shape.
    """

    def __init__(self, t: Tensor, y: Tensor, sign: Tensor, batch: torch.Size) -> None:
        self.t, self.sign, self.lead = t, sign, y.dim() - len(batch) - 1
        self.rows = torch.full((len(t), *y.shape), torch.nan, dtype=y.dtype, device=y.device)
        self.rows[0] = y
        self.cursor = torch.ones(batch, dtype=torch.int64, device=t.device)

    @property
    def wanted(self) -> Tensor:
        """The next time that every sample has to pass (the last one where there is none left)."""
        return self.t[self.cursor.clamp_max(len(self.t) - 1)]

    @property
    def complete(self) -> Tensor:
        """Which samples have passed all of them."""
        return self.cursor >= len(self.t)

    def take(
        self,
        now: Tensor,
        after: Tensor,
        h: Tensor,
        passed: Tensor,
        end: Tensor,
        dense: Callable[[Tensor], Tensor],
    ) -> tuple[Output, ...]:
        """Enter what lies in a step.

        Args:
            now: Where it began, ``batch``.
            after: Where it ended.
            h: Its length.
            passed: The samples that took it.
            end: The solution there.
            dense: The solution at ``now + theta h``; ``theta`` has axes before those of the batch.
        """
        if not bool((passed & ~self.complete & (self.sign * (after - self.wanted) >= 0)).any()):
            return ()
        reached = torch.searchsorted(self.sign * self.t, self.sign * after, right=True)
        cursor = torch.where(passed, reached, self.cursor)
        rows = slice(int(self.cursor.min()), int(cursor.max()))
        index = torch.arange(rows.start, rows.stop, device=after.device)
        index, wanted = (x.reshape(-1, *(1,) * after.dim()) for x in (index, self.t[rows]))
        here = (self.cursor <= index) & (index < cursor)
        # 1 for the samples that are elsewhere: finite, so that no derivative of theirs spoils another's.
        theta = torch.where(here & (wanted != after), (wanted - now) / h, 1.0)
        apart = (slice(None), *(None,) * self.lead)
        value = torch.where((theta == 1)[apart].unsqueeze(-1), end, dense(theta[apart]))
        self.rows[rows] = torch.where(here[apart].unsqueeze(-1), value, self.rows[rows])
        self.cursor = cursor
        return tuple(Output(rows.start + i, here[i], theta[i], value[i]) for i in range(len(here)))
