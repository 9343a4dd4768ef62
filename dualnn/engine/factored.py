r"""One LU factorisation of a matrix, for solves of every level of duals and for reverse mode.

:math:`A X = B` with :math:`A = A_0 + \varepsilon\, \mathrm dA`, :math:`B = B_0 + \varepsilon\, \mathrm dB` has
:math:`X_0 = A_0^{-1} B_0` and :math:`\mathrm dX = A_0^{-1} (\mathrm dB - \mathrm dA\, X_0)`. Where :math:`A_0` is
itself a dual the same holds again: down at the bottom every solve is one with the same plain matrix, which is
factorised once. The K directions of a level are K more columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.dual_tensor import count, make, primal_of, split, top_level
from dualnn.engine.errors import SingularMatrixError
from dualnn.engine.sides import after, beside, leading, turned
from dualnn.engine.tangents import Tangent, Zero, aligned

# Where an inverse and a product beat substitution: small matrices, several of them, many columns. Measured on one
# thread, 256 matrices: n = 8, 64 columns 0.22 against 0.75 ms; n = 16, 64 columns 0.57 against 1.8 ms.
INVERT_TO, INVERT_FROM_BATCH = 32, 8

Value = Callable[[Tensor, Tensor], Tensor]


class Factored:
    r"""A matrix with the LU factors of its innermost value, computed at the first solve and kept.

    Args:
        A: ``(*batch, n, n)``; a plain tensor, one that autograd records, or a dual of any level.

    Attributes:
        info: After the first solve, ``(*batch)``: zero where the matrix is regular, else the first zero pivot.

    Example:
        >>> import torch, dualnn as dn
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> factored = Factored(dn.dual(A, torch.eye(2)))
        >>> x = factored.solve(torch.tensor([[2.0], [4.0]]))
        >>> x.primal.flatten().tolist(), x.tangent.flatten().tolist()
        ([1.0, 1.0], [-0.5, -0.25])
    """

    def __init__(self, A: Tensor) -> None:
        self.A = A
        self.info: Tensor | None = None
        self._lu: tuple[Tensor, Tensor, bool] | None = None  # factors, pivots, whether they are A^T's
        self._inverse: Tensor | None = None

    def solve(self, B: Tensor) -> Tensor:
        """X of ``A X = B``, ``B: (*batch, n, m)``; B may be a dual or recorded as well."""
        return self.descend(self.A, B)

    def solve_adjoint(self, B: Tensor) -> Tensor:
        r"""X of :math:`A^H X = B` (:math:`A^T` for real numbers)."""
        return self.descend(self.A, B, adjoint=True)

    def solve_transposed(self, B: Tensor) -> Tensor:
        r"""X of :math:`A^T X = B`."""
        return self.solve_adjoint(B.conj()).conj() if B.is_complex() else self.solve_adjoint(B)

    def inverse(self) -> Tensor:
        """The inverse of A, of A's level."""
        return self.inverted(self.A)

    def check(self, what: str = "the matrix") -> None:
        """Raise `SingularMatrixError` with the batch indices of the singular matrices (after a solve)."""
        if self.info is not None:
            refuse_singular(self.info, what)

    def adopt(self, lu: Tensor, pivots: Tensor, of_transpose: bool, info: Tensor | None = None) -> None:
        """Take factors that an op of torch returned next to its value."""
        self._lu = lu.detach(), pivots, of_transpose
        self.info = info

    def descend(self, A: Tensor, B: Tensor, adjoint: bool = False, value: Value | None = None) -> Tensor:
        """Solve at A's and B's level by solves at lower ones.

        Args:
            A: This matrix, or its primal at some level.
            B: Right-hand sides.
            adjoint: Solve with the conjugate transpose.
            value: What yields the plain solution at the bottom, where a value of its own is asked for.
        """
        level = top_level((A, B))
        if level == 0:
            return self._plain(A, B, adjoint) if value is None else value(A, B)
        (a, ta), (b, tb) = split(A, level), split(B, level)
        x = self.descend(a, b, adjoint, value)
        tan: Tangent | None = None
        if ta is not None:
            tan = ta.map(lambda d: -_times(d, x, adjoint))
        if tb is not None:
            spread = tb.map(lambda d: broadcast(d, x))
            tan = spread if tan is None else tan.plus(spread)
        if tan is None:
            return make(x, Zero(count(level, (A, B))), level)
        return make(x, tan.map(lambda d: self.columns(a, d, adjoint)), level)

    def columns(self, A: Tensor, d: Tensor, adjoint: bool = False) -> Tensor:
        """Solve with K right-hand sides at once: ``(K, *batch, n, m)``."""
        t = beside(d)
        return leading(self.descend(A, t.flatten(-2), adjoint).unflatten(-1, t.shape[-2:]))

    def inverted(self, A: Tensor) -> Tensor:
        """The inverse of this matrix's primal ``A`` at some level."""
        bottom = primal_of(A)
        if A is bottom and not needs_record(A) and self._ready(A):
            return self._inverse_of(A)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return self.descend(A, eye.expand(A.shape))

    def _plain(self, A: Tensor, B: Tensor, adjoint: bool) -> Tensor:
        if not self._ready(A) or is_functorch_wrapped_tensor(B):
            return torch.linalg.solve(A.mH if adjoint else A, B)  # under torch.func: its own way
        if A.dim() == 2 and B.dim() > 2:  # one matrix: the batch is more columns
            flat = self._recorded(A, B.movedim(-2, 0).flatten(1), adjoint)
            return flat.reshape(B.shape[-2], *B.shape[:-2], B.shape[-1]).movedim(0, -2)
        return self._recorded(A, B, adjoint)

    def _recorded(self, A: Tensor, B: Tensor, adjoint: bool) -> Tensor:
        if needs_record(A, B):
            return _Solve.apply(self, A, B, adjoint)  # type: ignore[no-untyped-call]
        return self.substitute(B, adjoint)

    def _ready(self, A: Tensor) -> bool:
        """Factorise unless it is done; False where the numbers belong to a torch.func transform."""
        if is_functorch_wrapped_tensor(A):
            return False
        if self._lu is None:
            lu, pivots, info = torch.linalg.lu_factor_ex(A.detach())
            self.adopt(lu, pivots, False, info)
        return True

    def substitute(self, B: Tensor, adjoint: bool) -> Tensor:
        """Solve with the plain factors; nothing is recorded."""
        assert self._lu is not None
        lu, pivots, of_transpose = self._lu
        n = lu.shape[-1]
        many = lu.dim() > 2 and n <= INVERT_TO and lu.shape[:-2].numel() >= INVERT_FROM_BATCH
        if many and (self._inverse is not None or B.shape[-1] >= 2 * n):
            inverse = self._inverse_of(B)
            return (inverse.mH if adjoint else inverse) @ B.detach()
        return torch.linalg.lu_solve(lu, pivots, B.detach(), adjoint=adjoint != of_transpose)

    def _inverse_of(self, like: Tensor) -> Tensor:
        if self._inverse is None:
            assert self._lu is not None
            lu, pivots, of_transpose = self._lu
            eye = torch.eye(lu.shape[-1], dtype=like.dtype, device=like.device).expand(lu.shape)
            self._inverse = torch.linalg.lu_solve(lu, pivots, eye, adjoint=of_transpose)
        return self._inverse


def _times(d: Tensor, x: Tensor, adjoint: bool) -> Tensor:
    """``dA_k X`` or ``dA_k^H X``; for a few columns the larger tensor, the directions, stays where it is."""
    if 2 * x.shape[-1] <= d.shape[-1] and d.shape[-1] >= 8:
        return aligned(d.mH if adjoint else d, x.dim()) @ x
    return leading(after(turned(beside(d)) if adjoint else beside(d), x))


def broadcast(d: Tensor, x: Tensor) -> Tensor:
    """Directions of a right-hand side, of the solution's shape."""
    return d if d.shape[1:] == x.shape else aligned(d, x.dim()).expand(d.shape[0], *x.shape)


def needs_record(*tensors: Tensor) -> bool:
    """Whether autograd is to record what is done with these plain tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@functools.lru_cache
def _transposes(op: Callable, device: str, contiguous: bool) -> bool:
    """Whether this op of torch factorises the transpose (it saves a copy; which ops do depends on the release)."""
    matrix = torch.tensor([[1.0, 0.0], [0.5, 1.0]], device=device)
    matrix = matrix if contiguous else matrix.mT.contiguous().mT
    return float(op(matrix)[0, 1]) != 0


def factors_of_solve(A: Tensor, B: Tensor, left: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Torch's solution, its factors and pivots, its info, and whether they are those of the transpose."""
    x, lu, pivots, info = torch._linalg_solve_ex(A, B, left=left)
    return x, lu, pivots, info, _of_transpose(_solve_factors, A)


def factors_of_slogdet(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """Torch's sign and logarithm, its factors and pivots, and whether they are those of the transpose."""
    sign, log, lu, pivots = torch._linalg_slogdet(A)
    return sign, log, lu, pivots, _of_transpose(_slogdet_factors, A)


def _solve_factors(matrix: Tensor) -> Tensor:
    return torch._linalg_solve_ex(matrix, matrix)[1]


def _slogdet_factors(matrix: Tensor) -> Tensor:
    return torch._linalg_slogdet(matrix)[2]


def _of_transpose(op: Callable, A: Tensor) -> bool:
    return not A.is_complex() and _transposes(op, A.device.type, A.is_contiguous())


def refuse_singular(info: Tensor, what: str = "the matrix") -> None:
    """Raise with the batch indices of all singular matrices, where torch's ``info`` shows any."""
    if bool((info != 0).any()):
        raise singular(info != 0, f"{what} is exactly singular (a zero pivot)")


def singular(mask: Tensor, what: str) -> SingularMatrixError:
    """The error for the matrices in ``mask``, with their batch indices."""
    advice = "Add a multiple of the identity, use lstsq or pinv, or leave these samples out."
    if mask.dim() == 0:
        return SingularMatrixError(f"{what}. {advice}")
    where = [i[0] if len(i) == 1 else tuple(i) for i in mask.nonzero().tolist()]
    shown = ", ".join(map(str, where[:20])) + (", …" if len(where) > 20 else "")
    return SingularMatrixError(f"{what} for {len(where)} of {mask.numel()} samples, batch indices {shown}. {advice}")


class _Solve(torch.autograd.Function):
    """One node: its backward is one more solve with the same factors, recorded in the same way if asked for."""

    @staticmethod
    def forward(factored: Factored, A: Tensor, B: Tensor, adjoint: bool) -> Tensor:  # noqa: D102
        return factored.substitute(B, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        ctx.factored, A, B, ctx.adjoint = inputs
        ctx.shape = B.shape
        ctx.save_for_backward(A, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        A, x = ctx.saved_tensors
        pulled = ctx.factored.descend(A, grad, not ctx.adjoint)
        grad_a = None
        if ctx.needs_input_grad[1]:
            grad_a = -(x @ pulled.mH if ctx.adjoint else pulled @ x.mH).sum_to_size(A.shape)
        return None, grad_a, pulled.sum_to_size(ctx.shape), None
