"""The function to be minimised, as the methods see it: value, gradient and curvature of ``(*batch, n)``, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import StructureError
from dualnn.solvers.factors import block_jacobian
from dualnn.solvers.gradients import Mode, columns, gradient
from dualnn.solvers.wolfe import Point


class Objective:
    """A scalar function of each sample.

    Args:
        fn: ``fn(x, *args)``.
        args: Further arguments.
        mode: How gradients are taken.
    """

    def __init__(self, fn: Callable[..., Tensor], args: Sequence[Any], mode: Mode) -> None:
        self.fn, self.args, self.mode = fn, args, mode
        self.evaluations = self.jacobians = 0

    def __call__(self, x: Tensor) -> Point:
        """Value and gradient."""
        self.evaluations += 1
        return Point(*gradient(self.fn, x, self.args, self.mode))

    def hessian(self, x: Tensor) -> Tensor:
        """A block ``(*batch, n, n)``."""
        self.jacobians += 1
        slope = lambda u: gradient(self.fn, u, self.args, self.mode)[1]  # noqa: E731
        return block_jacobian(slope, x, probe=False)[1]


class LeastSquares(Objective):
    r"""Half the sum of squares of residuals ``(*batch, m)``; `Point.rest` is the residual and :math:`J^T`.

    Args:
        fn: The objective :math:`\tfrac12 \lVert r \rVert^2`, for its exact Hessian.
        args: Further arguments.
        mode: How gradients of ``fn`` are taken.
        residual: ``residual(x, *args)``.
    """

    def __init__(
        self, fn: Callable[..., Tensor], args: Sequence[Any], mode: Mode, residual: Callable[..., Tensor]
    ) -> None:
        super().__init__(fn, args, mode)
        self.residual = residual

    def __call__(self, x: Tensor) -> Point:
        """Value, gradient, residual and its transposed Jacobian ``(*batch, n, m)``, by n directions."""
        self.evaluations += 1
        self.jacobians += 1
        r, moved = columns(self.residual, x, self.args)
        check_residual(r, x)
        transposed = moved.movedim(0, -2).contiguous()  # a sum then runs in one order, whatever the batch
        return Point((r * r).sum(-1) / 2, (transposed * r.unsqueeze(-2)).sum(-1), (r, transposed))


def half_squares(residual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The objective of a residual."""

    def fn(x: Tensor, *args: Any) -> Tensor:
        r = residual(x, *args)
        check_residual(r, x)
        return (r * r).sum(-1) / 2

    return fn


def check_residual(r: Any, x: Tensor) -> None:
    """Check that a least-squares function gives a vector a sample."""
    shape = tuple(r.shape) if isinstance(r, Tensor) else None
    if shape is None or len(shape) != x.dim() or shape[:-1] != tuple(x.shape[:-1]) or shape[-1] == 0:
        wanted = ", ".join([*map(str, x.shape[:-1]), "m"])
        raise StructureError(
            f"a least-squares method needs the residuals, a tensor of shape ({wanted}) for x of shape "
            f"{tuple(x.shape)}, got {type(r).__name__ if shape is None else shape}"
        )
    if r.dtype != x.dtype:
        raise StructureError(
            f"fn returned {r.dtype} for an unknown of {x.dtype}: convert x0 or the arguments so that they agree"
        )


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``A v`` for each sample, in an order of additions that does not depend on the batch."""
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, with an axis to broadcast by."""
    return (a * b).sum(-1, keepdim=True)


def first_scale(g: Tensor) -> Tensor:
    """Length of a first step along -g, whose scale nothing tells: at most 1."""
    return 1 / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(1)
