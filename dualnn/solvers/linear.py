r"""Linear algebra with exact derivatives: on duals, on tensors that autograd records, and on plain ones.

Thin, checked entries to the rules that also serve ``torch.linalg`` on duals: batched, values equal to torch's bit for
bit, one factorisation for the value and all directions, right to second order (duals over duals, reverse over dual).
On plain tensors the derivatives are torch's own autograd.

What is frozen: LU's pivots, the signs that torch chose for the columns of Q and of eigenvectors, the phase of complex
vectors. What has no derivative says so: a singular matrix raises, vectors of repeated eigenvalues are nan with a
`DegenerateWarning`. The equations are derived in ``engine/THEORY.md``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dualnn.engine.errors import DualInputError, DualShapeError
from dualnn.engine.factored import refuse_singular, singular

FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    r"""Solve :math:`A X = B` (or :math:`X A = B`): :math:`\mathrm dX = A^{-1}(\mathrm dB - \mathrm dA\, X)`.

    Args:
        A: Regular matrices.
        B: Right-hand sides; a vector for each matrix is told from a matrix by its shape, as in torch.
        left: Whether A stands on the left.

    Shape:
        ``A: (*batch, n, n), B: (*batch, n, m) or (*batch, n) -> B's``; tangents ``(K, ...)``.

    Raises:
        SingularMatrixError: A is exactly singular, with all batch indices.
        DualInputError: Integers.
        DualShapeError: Shapes or dtypes disagree.

    Reference:
        Giles, "An extended collection of matrix derivative results", Oxford report 08/01, 2008.

    Example:
        >>> import torch, dualnn as dn
        >>> A = dn.dual(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        >>> solve(A, torch.tensor([[4.0]])).tangent.item()  # d(4 / a)/da at 2
        -1.0
    """
    _square(A, "A")
    _matching(A, B, left)
    x, info = torch.linalg.solve_ex(A, B, left=left)
    refuse_singular(info, "A")
    return x


def inv(A: Tensor) -> Tensor:
    r"""Inverse: :math:`\mathrm d(A^{-1}) = -A^{-1}\, \mathrm dA\, A^{-1}`.

    Shape:
        ``A: (*batch, n, n) -> (*batch, n, n)``.

    Raises:
        SingularMatrixError: A is exactly singular, with all batch indices.
        DualInputError: Integers.
        DualShapeError: A is not square.

    Example:
        >>> inv(torch.tensor([[2.0]])).item()
        0.5
    """
    _square(A, "A")
    x, info = torch.linalg.inv_ex(A)
    refuse_singular(info, "A")
    return x


def det(A: Tensor) -> Tensor:
    r"""Determinant: :math:`\mathrm d \det A = \mathrm{tr}(\mathrm{adj}(A)\, \mathrm dA)`, also of singular matrices.

    Shape:
        ``A: (*batch, n, n) -> (*batch)``.

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not square.

    Example:
        >>> det(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).item()
        6.0
    """
    _square(A, "A")
    return torch.linalg.det(A)


def slogdet(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sign and log-modulus of the determinant: :math:`\mathrm d\log|\det A| = \mathrm{tr}(A^{-1} \mathrm dA)`.

    Shape:
        ``A: (*batch, n, n) -> (*batch), (*batch)``. The sign is locally constant (for complex A it turns).

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not square.

    Example:
        >>> sign, log = slogdet(torch.tensor([[-1.0]]))
        >>> sign.item(), log.item()
        (-1.0, 0.0)
    """
    _square(A, "A")
    return torch.linalg.slogdet(A)


def lu(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Factors :math:`A = P L U` with partial pivoting; the pivots are frozen.

    :math:`M = L^{-1} P^T \mathrm dA\, U^{-1}`, :math:`\mathrm dL = L\, \mathrm{tril}(M, -1)`,
    :math:`\mathrm dU = \mathrm{triu}(M)\, U`. Where the pivots change L and U jump, and P L U does not.

    Shape:
        ``A: (*batch, m, n) -> P (*batch, m, m), L (*batch, m, k), U (*batch, k, n)``, k the smaller of m and n.

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not a matrix.

    Example:
        >>> P, L, U = lu(torch.tensor([[1.0, 2.0], [2.0, 2.0]]))
        >>> (P @ L @ U).tolist()
        [[1.0, 2.0], [2.0, 2.0]]
    """
    _matrix(A, "A")
    return torch.linalg.lu(A)


def qr(A: Tensor, mode: Literal["reduced", "complete", "r"] = "reduced") -> tuple[Tensor, Tensor]:
    r"""Factors :math:`A = Q R` with the column signs that torch chose.

    :math:`C = Q^H \mathrm dA\, R^{-1}`, :math:`W = \mathrm{tril}(C, -1) - \mathrm{tril}(C, -1)^H`,
    :math:`\mathrm dQ = Q W + (I - Q Q^H)\, \mathrm dA\, R^{-1}`, :math:`\mathrm dR = (C - W) R`. On duals all modes are
    differentiated, also the further columns of a complete Q, as Householder's method makes them.

    Args:
        A: Of full rank (a wide one: its first columns).
        mode: ``"reduced"``, ``"complete"``, or ``"r"`` (then Q is empty).

    Shape:
        ``A: (*batch, m, n) -> Q (*batch, m, k), R (*batch, k, n)``, k = min(m, n), or m if complete.

    Raises:
        SingularMatrixError: A dual A lacks full rank, with all batch indices.
        DualInputError: Integers, or an unknown mode.
        DualShapeError: A is not a matrix.

    Reference:
        Walter, Lehmann, "Algorithmic differentiation of linear algebra functions with application in optimum
        experimental design", 2010, arXiv 1001.1654.

    Example:
        >>> Q, R = qr(torch.tensor([[0.0], [2.0]]))
        >>> R.abs().item()
        2.0
    """
    _matrix(A, "A")
    if mode not in ("reduced", "complete", "r"):
        raise DualInputError(f"mode must be 'reduced', 'complete' or 'r', got {mode!r}")
    return torch.linalg.qr(A, mode)


def cholesky(A: Tensor, *, upper: bool = False) -> Tensor:
    r"""Factor :math:`A = L L^H`: :math:`\mathrm dL = L\, \Phi(L^{-1} \mathrm dA\, L^{-H})`.

    :math:`\Phi` keeps the lower triangle and half the diagonal. One triangle of A, and of its directions, is read.

    Shape:
        ``A: (*batch, n, n) -> (*batch, n, n)``.

    Raises:
        SingularMatrixError: A is not positive definite, with all batch indices.
        DualInputError: Integers.
        DualShapeError: A is not square.

    Reference:
        Murray, "Differentiation of the Cholesky decomposition", 2016, arXiv 1602.07527.

    Example:
        >>> cholesky(torch.tensor([[4.0]])).item()
        2.0
    """
    _square(A, "A")
    factor, info = torch.linalg.cholesky_ex(A, upper=upper)
    if bool((info != 0).any()):
        raise singular(info != 0, "A is not positive definite")
    return factor


def cholesky_solve(B: Tensor, L: Tensor, *, upper: bool = False) -> Tensor:
    r"""Solve :math:`L L^H X = B` with a factor that is given.

    :math:`\mathrm dX = (L L^H)^{-1} (\mathrm dB - (\mathrm dL\, L^H + L\, \mathrm dL^H) X)`.

    Shape:
        ``B: (*batch, n, m), L: (*batch, n, n) -> (*batch, n, m)``. Of L one triangle is read.

    Raises:
        DualInputError: Integers.
        DualShapeError: Shapes or dtypes disagree.

    Example:
        >>> cholesky_solve(torch.tensor([[8.0]]), torch.tensor([[2.0]])).item()
        2.0
    """
    _square(L, "L")
    _matrix(B, "B")
    _matching(L, B, True)
    return torch.cholesky_solve(B, L, upper=upper)


def eigh(A: Tensor, UPLO: Literal["L", "U"] = "L") -> tuple[Tensor, Tensor]:
    r"""Eigenvalues (ascending) and eigenvectors of Hermitian matrices.

    With :math:`P = V^H \mathrm dA\, V`: :math:`\mathrm d\lambda = \mathrm{diag}\,P`,
    :math:`\mathrm dV = V\,(P_{ij} / (\lambda_j - \lambda_i))_{i \ne j}`. Vectors of a repeated eigenvalue have no
    derivative: on duals their tangents are nan, with a `DegenerateWarning`. The values' tangents are then an element of
    their generalised Jacobian, and right for symmetric functions of them (their sum). ``torch.linalg.eigvalsh`` has no
    such trouble.

    Shape:
        ``A: (*batch, n, n) -> (*batch, n), (*batch, n, n)``. One triangle is read.

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not square.

    Reference:
        Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1, 1985.

    Example:
        >>> values, vectors = eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> values.tolist()
        [1.0, 2.0]
    """
    _square(A, "A")
    return torch.linalg.eigh(A, UPLO)


def svd(A: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    r"""Singular values and vectors, :math:`A = U \Sigma V^H`.

    :math:`\mathrm d\sigma = \mathrm{Re}\,\mathrm{diag}(U^H \mathrm dA\, V)`; the vectors as in ``engine/THEORY.md``.
    What is frozen: signs, and for complex vectors the mean phase of each pair. The further columns of
    ``full_matrices`` stay orthogonal to the others, and do not turn among themselves. Vectors of repeated singular
    values (and of vanishing ones, where they may turn into the null space) have no derivative: nan on duals, with a
    `DegenerateWarning`.

    Shape:
        ``A: (*batch, m, n) -> U (*batch, m, m or k), S (*batch, k), Vh (*batch, n or k, n)``, k = min(m, n).

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not a matrix.

    Reference:
        Giles, "Collected matrix derivative results for forward and reverse mode algorithmic differentiation", 2008.

    Example:
        >>> svd(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))[1].tolist()
        [4.0, 3.0]
    """
    _matrix(A, "A")
    return torch.linalg.svd(A, full_matrices)


def lstsq(A: Tensor, B: Tensor, *, driver: str | None = None) -> Any:
    r"""Least squares (minimum norm for a wide A): :math:`X = A^+ B`, A of full rank.

    :math:`\mathrm dX = A^+(\mathrm dB - \mathrm dA\,X) + (A^H A)^{-1} \mathrm dA^H (B - A X)` for a tall A,
    :math:`A^+(\mathrm dB - \mathrm dA\,X) + (I - A^+ A)\, \mathrm dA^H (A A^H)^{-1} B` for a wide one.

    Shape:
        ``A: (*batch, m, n), B: (*batch, m, k) -> solution (*batch, n, k)``, with torch's residuals, rank and values.

    Raises:
        SingularMatrixError: A lacks full rank, with all batch indices.
        DualInputError: Integers.
        DualShapeError: Shapes or dtypes disagree.

    Reference:
        Golub, Pereyra, "The differentiation of pseudo-inverses …", SIAM J. Numer. Anal. 10, 1973.

    Example:
        >>> round(lstsq(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [3.0]])).solution.item(), 5)
        2.0
    """
    _matrix(A, "A")
    _matching(A, B, True)
    found = torch.linalg.lstsq(A, B, driver=driver)
    low = found.rank < min(A.shape[-2:])  # torch returns no rank with "gels", which takes full rank for granted
    if bool(low.any()):
        raise singular(low, "A lacks full rank, so that the least squares solution is not differentiable")
    return found


def pinv(A: Tensor, *, rtol: float | None = None, hermitian: bool = False) -> Tensor:
    r"""Pseudoinverse, along directions that do not change the rank.

    :math:`\mathrm dP = -P\,\mathrm dA\,P + P P^H\,\mathrm dA^H (I - A P) + (I - P A)\,\mathrm dA^H P^H P`. Where a
    direction raises the rank the pseudoinverse jumps to infinity, and there is no derivative.

    Args:
        A: Matrices.
        rtol: Singular values below this times the largest count as zero (torch's default).
        hermitian: A is Hermitian, and one triangle is read.

    Shape:
        ``A: (*batch, m, n) -> (*batch, n, m)``.

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not a matrix.

    Reference:
        Golub, Pereyra, "The differentiation of pseudo-inverses …", SIAM J. Numer. Anal. 10, 1973.

    Example:
        >>> round(pinv(torch.tensor([[2.0], [0.0]]))[0, 0].item(), 6)
        0.5
    """
    _matrix(A, "A")
    return torch.linalg.pinv(A, rtol=rtol, hermitian=hermitian)


def expm(A: Tensor) -> Tensor:
    r"""Matrix exponential: :math:`\mathrm d e^A = \int_0^1 e^{(1 - s) A}\, \mathrm dA\, e^{s A}\, \mathrm ds`.

    Computed as the derivative of a scaled and squared Taylor polynomial; the scaling is frozen.

    Shape:
        ``A: (*batch, n, n) -> (*batch, n, n)``.

    Raises:
        DualInputError: Integers.
        DualShapeError: A is not square.

    Reference:
        Al-Mohy, Higham, "Computing the Fréchet derivative of the matrix exponential", SIAM J. Matrix Anal. 30, 2009.

    Example:
        >>> expm(torch.zeros(1, 1)).item()
        1.0
    """
    _square(A, "A")
    return torch.linalg.matrix_exp(A)


def _matrix(A: Any, name: str) -> None:
    if not isinstance(A, Tensor) or A.dtype not in FLOATS:
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise DualInputError(
            f"{name} must be a float32, float64 or complex tensor, got {got}: convert it with .double()"
        )
    if A.dim() < 2:
        raise DualShapeError(f"{name} must be a matrix or a batch of them, (*batch, m, n), got shape {tuple(A.shape)}")


def _square(A: Any, name: str) -> None:
    _matrix(A, name)
    if A.shape[-1] != A.shape[-2]:
        raise DualShapeError(f"{name} must be square, (*batch, n, n), got shape {tuple(A.shape)}: see lstsq and pinv")


def _matching(A: Tensor, B: Any, left: bool) -> None:
    """Rows (columns, from the right) of B must be those of A, its dtype and device A's."""
    if not isinstance(B, Tensor) or B.dtype != A.dtype or B.device != A.device:
        got = f"{B.dtype} on {B.device}" if isinstance(B, Tensor) else type(B).__name__
        raise DualShapeError(f"B is {got}, A is {A.dtype} on {A.device}: convert one of them with .to()")
    rows = A.shape[-2]
    vector = left and (B.dim() == 1 or (A.dim() - 1 == B.dim() and B.shape == A.shape[:-1]))
    size = B.shape[-1] if vector or not left else B.shape[-2] if B.dim() > 1 else -1
    batches = (A.shape[:-2], B.shape[:-1] if vector else B.shape[:-2])
    try:
        if B.dim() > 0 and not (vector and B.dim() == 1):
            torch.broadcast_shapes(*batches)
        fits = size == rows
    except RuntimeError:
        fits = False
    if not fits:
        side = "A X = B" if left else "X A = B"
        raise DualShapeError(f"{side} with A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} do not fit")
