"""`LinearSolve`: a layer whose output solves a linear system."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, DualShapeError, unknown_name
from dualnn.engine.factored import refuse_singular
from dualnn.engine.untraced import untraced
from dualnn.solvers import cholesky, cholesky_solve, solve

STRUCTURES = ("general", "spd", "lower", "upper")
ON_FAILURE = ("raise", "nan")


class LinearSolve(nn.Module):
    r"""Output the solution of a linear system: :math:`z = A^{-1} b`, with a learned A or one that a module makes.

    .. math:: dz = A^{-1} (db - dA\, z)

    A learned matrix starts at the identity, where the layer does nothing. Structured ones are parametrised so that they
    stay what they are: ``"spd"`` as :math:`A = L L^T`, L lower triangular with a positive diagonal
    :math:`e^{d}`; triangular ones with the diagonal :math:`e^{d}`.

    Args:
        matrix: n, for a learned ``(n, n)`` matrix; or a module that makes one for each sample from the layer's second
            input, ``A = module(x)``.
        structure: ``"general"`` (LU), ``"spd"`` (symmetric positive definite, Cholesky; of a module's matrix the lower
            triangle is read), ``"lower"`` or ``"upper"`` (substitution; the other triangle is not read).
        on_failure: For singular matrices (``"spd"``: not positive definite): ``"raise"``, or ``"nan"`` for those
            samples alone.

    Shape:
        ``b: (*, n) -> z: (*, n)``. With a module ``b: (B, n)``, and ``module(x): (B, n, n)`` or ``(n, n)``.

    Raises:
        SingularMatrixError: With the indices of the samples.
        DualShapeError: Shapes or dtypes that do not fit.
        DualInputError: Integers; the second input left out, or given to a learned matrix.
        UnknownNameError: An unknown structure.

    Reference:
        Giles, "An extended collection of matrix derivative results", Oxford report 08/01, 2008.

    Example:
        >>> layer = LinearSolve(2, "spd")
        >>> layer(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]
        >>> list(layer.state_dict())
        ['triangle', 'log_diagonal']
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(
        self,
        matrix: int | nn.Module,
        structure: Literal["general", "spd", "lower", "upper"] = "general",
        *,
        on_failure: Literal["raise", "nan"] = "raise",
    ) -> None:
        super().__init__()
        if structure not in STRUCTURES:
            raise unknown_name("structure", structure, STRUCTURES)
        if on_failure not in ON_FAILURE:
            raise unknown_name("on_failure", on_failure, ON_FAILURE)
        self.structure, self.on_failure = structure, on_failure
        self.module = matrix if isinstance(matrix, nn.Module) else None
        self.features = None
        if self.module is not None:
            return
        if isinstance(matrix, bool) or not isinstance(matrix, int) or matrix < 1:
            raise DualInputError(f"LinearSolve: matrix must be a module or an integer >= 1, got {matrix!r}")
        self.features = matrix
        if structure == "general":
            self.matrix = nn.Parameter(torch.eye(matrix))
        else:
            self.triangle = nn.Parameter(torch.zeros(matrix, matrix))
            self.log_diagonal = nn.Parameter(torch.zeros(matrix))

    def extra_repr(self) -> str:
        """The settings."""
        size = "" if self.features is None else f"{self.features}, "
        return f"{size}structure={self.structure!r}, on_failure={self.on_failure!r}"

    def factor(self) -> Tensor:
        """The learned triangular factor of a structured matrix."""
        side = self.triangle.triu(1) if self.structure == "upper" else self.triangle.tril(-1)
        return side + torch.diag_embed(torch.exp(self.log_diagonal))

    def dense(self) -> Tensor:
        """The learned matrix."""
        if self.module is not None:
            raise DualInputError("LinearSolve: this matrix comes from a module, call that: layer.module(x)")
        if self.structure == "general":
            return self.matrix
        factor = self.factor()
        return factor @ factor.mT if self.structure == "spd" else factor

    @untraced
    def forward(self, b: Tensor, x: Any = None) -> Tensor:
        """Solve for the right-hand sides ``b``; ``x`` goes to the module that makes the matrices."""
        if not isinstance(b, Tensor) or not b.dtype.is_floating_point:
            got = b.dtype if isinstance(b, Tensor) else type(b).__name__
            raise DualInputError(f"LinearSolve: b must be a floating point tensor, got {got}: convert it (b.float())")
        if (self.module is None) != (x is None):
            raise DualInputError(
                "LinearSolve: this matrix is learned and takes no second input"
                if self.module is None
                else "LinearSolve: the module that makes the matrix needs the second input: layer(b, x)"
            )
        if b.dim() < 1 or (self.features is not None and b.shape[-1] != self.features):
            raise DualShapeError(f"LinearSolve: b must be (*, {self.features or 'n'}), got {tuple(b.shape)}")
        if self.module is not None:
            A = self.module(x)
        elif self.structure == "general":
            A = self.matrix
        else:
            A = self.factor()
        A, b = self._fitting(A, b)
        with torch.autocast(b.device.type, enabled=False):  # no factorisation in half precision
            # One matrix: its right-hand sides are the columns of one system.
            columns = b.reshape(-1, b.shape[-1]).mT if A.dim() == 2 else b.unsqueeze(-1)
            z = self._solved(A, columns)
            return z.mT.reshape(b.shape) if A.dim() == 2 else z.squeeze(-1)

    def _solved(self, A: Tensor, columns: Tensor) -> Tensor:
        if self.module is None and self.structure == "spd":
            return cholesky_solve(columns, A)  # A is the factor
        if self.on_failure == "raise":
            return self._direct(A, columns)
        bad = self._singular(A.detach())[..., None, None]
        z = self._direct(torch.where(bad, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), A), columns)
        return torch.where(bad, torch.nan, z)

    def _direct(self, A: Tensor, columns: Tensor) -> Tensor:
        inside = bool(get_interpreter_stack())  # torch.func: torch's own functions, with its own errors
        if self.structure == "general":
            return (torch.linalg.solve if inside else solve)(A, columns)
        if self.structure == "spd":
            return cholesky_solve(columns, (torch.linalg.cholesky if inside else cholesky)(A))
        if self.module is not None and self.on_failure == "raise" and not inside:
            refuse_singular(self._singular(A.detach()), "A")
        return torch.linalg.solve_triangular(A, columns, upper=self.structure == "upper")

    def _singular(self, A: Tensor) -> Tensor:
        A = primal_of(A)
        if self.structure == "general":
            return torch.linalg.lu_factor_ex(A)[2] != 0
        if self.structure == "spd":
            return torch.linalg.cholesky_ex(A)[1] != 0
        return (A.diagonal(dim1=-2, dim2=-1) == 0).any(-1)

    def _fitting(self, A: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices that belong to the right-hand sides, in one precision."""
        n = b.shape[-1]
        if not isinstance(A, Tensor) or A.shape[-2:] != (n, n) or A.shape[:-2] not in ((), b.shape[:-1]):
            got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
            wanted = f"({n}, {n}) or {(*b.shape[:-1], n, n)}"
            raise DualShapeError(f"LinearSolve: for b of shape {tuple(b.shape)} the matrix must be {wanted}, got {got}")
        if torch.is_autocast_enabled(b.device.type):
            common = torch.promote_types(torch.float32, torch.promote_types(A.dtype, b.dtype))
            return A.to(common), b.to(common)
        if A.dtype != b.dtype:
            raise DualShapeError(
                f"LinearSolve: the matrix is {A.dtype}, b is {b.dtype}: convert one of them with .to()"
            )
        return A, b
