r"""Linear systems with the Jacobian of a residual: factored once, solved for any number of right-hand sides.

A residual maps ``(*batch, n)`` to itself, sample by sample, so its Jacobian is a block ``(*batch, n, n)``. A `Factors`
solves :math:`A x = b` and :math:`A^T x = b` for right-hand sides ``(*lead, *batch, n)``; the leading axes (directions)
become columns, so that K directions cost one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push


class Factors(Protocol):
    """What a solver and the implicit derivative ask of a factorised Jacobian."""

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-1} b` for ``(*lead, *batch, n)``."""

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-T} b`."""


class LU:
    """A dense block by LU with partial pivoting (by division for n = 1).

    A singular sample gives infinities or nan in its own rows only. Half precision is solved in float32. Where the
    matrix itself is to be differentiated (a dual, or recorded by autograd) it is solved by `torch.linalg.solve`.

    Shape:
        ``matrix: (*batch, n, n)``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.dtype = matrix.dtype
        self.matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        self.followed = isinstance(matrix, DualTensor) or (torch.is_grad_enabled() and matrix.requires_grad)
        if not self.followed and matrix.shape[-1] > 1:
            self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(self.matrix)

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-1} b` for ``(*lead, *batch, n)``."""
        return self._solved(rhs, transposed=False)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-T} b`."""
        return self._solved(rhs, transposed=True)

    def _solved(self, rhs: Tensor, transposed: bool) -> Tensor:
        if self.matrix.shape[-1] == 1:
            return (rhs / self.matrix[..., 0]).to(self.dtype)
        lead = rhs.dim() - self.matrix.dim() + 1
        wide = rhs.to(self.matrix.dtype)
        # (*batch, n, prod(lead)); one right-hand side alone, the most frequent case, needs no copy.
        columns = merged(wide, lead).movedim(0, -1) if lead else wide.unsqueeze(-1)
        if self.followed:
            found = torch.linalg.solve(self.matrix.mT if transposed else self.matrix, columns)
        else:
            found = torch.linalg.lu_solve(self.lu, self.pivots, columns, adjoint=transposed)
        return (found.movedim(-1, 0).reshape(rhs.shape) if lead else found.squeeze(-1)).to(self.dtype)


def merged(rhs: Tensor, lead: int) -> Tensor:
    """The first ``lead`` axes in one, also where others are empty."""
    return rhs.reshape(rhs.shape[:lead].numel(), *rhs.shape[lead:])


def block_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor, probe: bool = True) -> tuple[Tensor, Tensor]:
    """Value of ``fn`` and the derivative of each sample's output in its own input, from one dual pass.

    Args:
        fn: ``(*batch, n) -> (*batch, n)``, sample by sample.
        x: Where.
        probe: With several samples, push one more direction that moves half of them: the other half must not change.

    Returns:
        ``(fn(x), J)`` with ``J: (*batch, n, n)``.

    Raises:
        StructureError: Samples influence one another, or the result has another shape.
    """
    n, batch = x.shape[-1], x.shape[:-1]
    rows = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *(1,) * len(batch), n)
    seeds = rows.expand(n, *x.shape)
    probe = probe and batch.numel() > 1
    if probe:
        seeds = torch.cat([seeds, _half(x).to(x.dtype).expand(1, *x.shape)])
    y, tan = push(fn, (x,), [Dense(seeds)])
    same_shape(y, x)
    columns: Any = dense_of(tan, y)
    if probe:
        _check_half(columns[-1], x, columns)
        columns = columns[:-1]
    return y, columns.movedim(0, -1)


def refuse_mixing(fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise StructureError if samples influence one another: that check of `block_jacobian` alone."""
    y, tan = push(fn, (x,), [Dense(_half(x).to(x.dtype).expand(1, *x.shape))])
    moved = dense_of(tan, y)
    _check_half(moved[0], x, moved)  # type: ignore[index, arg-type]


def _half(x: Tensor) -> Tensor:
    """Every other sample, ``(*batch, 1)``."""
    batch = x.shape[:-1]
    return (torch.arange(batch.numel(), device=x.device) % 2 == 0).reshape(*batch, 1)


def _check_half(moved: Tensor, x: Tensor, columns: Tensor) -> None:
    leak = torch.where(_half(x), 0, moved.detach().abs())
    if float(leak.max()) > 1e-6 * float(columns.detach().abs().max()):
        raise StructureError(
            "the equations mix samples (BatchNorm in training, a mean over the batch?), but they are solved sample "
            "by sample. Make them one system of shape (n,), or take the mixing out."
        )


def same_shape(y: Any, x: Tensor) -> None:
    """Check that a residual has the shape and dtype of its unknown."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise StructureError(f"fn must return a tensor of the unknown's shape {tuple(x.shape)}, got {got}")
    if y.dtype != x.dtype:
        raise StructureError(
            f"fn returned {y.dtype} for an unknown of {x.dtype}: convert x0 or the arguments so that they agree"
        )
