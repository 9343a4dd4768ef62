"""Gaussian elimination written out for programs: plain arithmetic that a compiler fuses with what is around it."""

from __future__ import annotations

import torch
from torch import Tensor

from dualnn.solvers.factors import merged

WRITTEN_OUT = 4  # compiles to one kernel up to here; above, its compilation does not end


class Elimination:
    """Factors with partial pivoting: of small matrices entry by entry, of larger ones by LAPACK.

    The same operations, in the same order, as `factors.LU`. Nothing depends on numbers but by selection, so a program
    can be recorded.

    Shape:
        ``matrix: (*batch, n, n)``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.n = matrix.shape[-1]
        if self.n > WRITTEN_OUT:
            self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(matrix)
            return
        rows = [list(row.unbind(-1)) for row in matrix.unbind(-2)]
        self._swaps: list[Tensor] = []
        self._factors: list[Tensor] = []
        for c in range(self.n):
            for r in range(c + 1, self.n):  # the largest entry of the column comes up
                larger = rows[r][c].abs() > rows[c][c].abs()
                self._swaps.append(larger)
                rows[c], rows[r] = _swapped(larger, rows[c], rows[r])
            for r in range(c + 1, self.n):
                factor = rows[r][c] / rows[c][c]
                self._factors.append(factor)
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[c], strict=True)]
        self._rows = rows

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-1} b` for ``(*lead, *batch, n)``."""
        if self.n > WRITTEN_OUT:
            columns = merged(rhs, rhs.dim() - self.lu.dim() + 1).movedim(0, -1)
            return torch.linalg.lu_solve(self.lu, self.pivots, columns).movedim(-1, 0).reshape(rhs.shape)
        x, swaps, factors = list(rhs.unbind(-1)), iter(self._swaps), iter(self._factors)
        for c in range(self.n):
            for r in range(c + 1, self.n):
                (x[c],), (x[r],) = _swapped(next(swaps), [x[c]], [x[r]])
            for r in range(c + 1, self.n):
                x[r] = x[r] - next(factors) * x[c]
        for i in reversed(range(self.n)):
            for j in range(i + 1, self.n):
                x[i] = x[i] - self._rows[i][j] * x[j]
            x[i] = x[i] / self._rows[i][i]
        return torch.stack(x, -1)


def _swapped(mask: Tensor, a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    both = list(zip(a, b, strict=True))
    return [torch.where(mask, y, x) for x, y in both], [torch.where(mask, x, y) for x, y in both]
