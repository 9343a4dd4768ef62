r"""How a Jacobian is got and solved with: dense, banded, matrix-free, or given by the caller.

=============  ====================================================================================================
``"dense"``    n directions, LU
``"banded"``   lower + upper + 1 coloured directions, LAPACK's band LU; the claim is checked by a random direction
``"krylov"``   nothing is formed: GMRES on directional derivatives, on backward passes for the transposed systems
a callable     ``jacobian(x, *args) -> (*batch, n, n)``, LU; at the solution it is checked by a random direction
=============  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dualnn.engine.errors import DualInputError, StructureError, unknown_name
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.banded import Banded, banded_jacobian
from dualnn.solvers.factors import LU, Factors, block_jacobian, refuse_mixing, same_shape
from dualnn.solvers.krylov import Krylov

Residual = Callable[..., Tensor]


class Jacobian(Protocol):
    """One way; an object serves one call of a solver, and may remember what it has checked."""

    kept: bool  # whether its factors are worth keeping for the derivative

    def __call__(self, fn: Residual, x: Tensor, args: Sequence[Any], solution: bool) -> tuple[Tensor, Factors]:
        """``fn(x, *args)`` and factors of its Jacobian; ``solution``: for the derivative, not for a step."""


class DenseJacobian:
    """n directions, LU; the first call checks that samples do not mix."""

    kept = True

    def __init__(self) -> None:
        self.checked = False

    def __call__(self, fn: Residual, x: Tensor, args: Sequence[Any], solution: bool) -> tuple[Tensor, Factors]:
        """Form and factorise it."""
        value, matrix = block_jacobian(lambda u: fn(u, *args), x, probe=not self.checked)
        self.checked = True
        return value, LU(matrix)


class BandedJacobian:
    """Coloured directions, band LU; every call checks the bandwidth (an entry may vanish at one point by chance)."""

    kept = True

    def __init__(self, bandwidth: tuple[int, int]) -> None:
        self.lower, self.upper = bandwidth

    def __call__(self, fn: Residual, x: Tensor, args: Sequence[Any], solution: bool) -> tuple[Tensor, Factors]:
        """Form and factorise it."""
        lower, upper = min(self.lower, x.shape[-1] - 1), min(self.upper, x.shape[-1] - 1)
        value, bands = banded_jacobian(lambda u: fn(u, *args), x, lower, upper)
        return value, Banded(bands, lower, upper)


class KrylovJacobian:
    """Matrix-free; the first call checks that samples do not mix."""

    kept = False  # one made at the solution costs nothing

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.checked = False

    def __call__(self, fn: Residual, x: Tensor, args: Sequence[Any], solution: bool) -> tuple[Tensor, Factors]:
        """Take it as it is."""

        def equations(u: Tensor) -> Tensor:
            return fn(u, *args)

        value = equations(x)
        same_shape(value, x)
        if not self.checked and x.shape[:-1].numel() > 1:
            refuse_mixing(equations, x)
        self.checked = True
        return value, Krylov(equations, x, strict=self.strict and solution)


class GivenJacobian:
    """The caller's own. An approximate one may find the solution, but would give a wrong derivative."""

    kept = True

    def __init__(self, jacobian: Callable[..., Tensor]) -> None:
        self.jacobian = jacobian

    def __call__(self, fn: Residual, x: Tensor, args: Sequence[Any], solution: bool) -> tuple[Tensor, Factors]:
        """Call it, check it, factorise it."""
        matrix = self.jacobian(x, *args)
        shape = (*x.shape, x.shape[-1])
        if not isinstance(matrix, Tensor) or matrix.shape != shape or matrix.dtype != x.dtype:
            got = f"{matrix.dtype} of {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise StructureError(f"jacobian(x, *args) must return {x.dtype} of shape {shape}, got {got}")
        if not solution:
            return fn(x, *args), LU(matrix)
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        value, tan = push(lambda u: fn(u, *args), (x,), [Dense(z.unsqueeze(0))])
        product = (matrix * z.unsqueeze(-2)).sum(-1)
        error = (product - dense_of(tan, value)[0]).abs()  # type: ignore[index]
        slack = max(1e-3, 16 * torch.finfo(x.dtype).eps)
        wrong = error > slack * (matrix * z.unsqueeze(-2)).abs().sum(-1) + torch.finfo(x.dtype).tiny
        if bool(wrong.any()):
            raise StructureError(
                f"the given jacobian is not that of the equations: at the solution it differs by "
                f"{float(error[wrong].max()):.3g} along a random direction. An approximate one finds solutions, but "
                "not their derivatives: correct it, or use jacobian='dense'."
            )
        return value, LU(matrix)


# What a name stands for, from (bandwidth, strict).
JACOBIANS: dict[str, Callable[[Any, bool], Jacobian]] = {
    "dense": lambda bandwidth, strict: DenseJacobian(),
    "banded": lambda bandwidth, strict: BandedJacobian(bandwidth),
    "krylov": lambda bandwidth, strict: KrylovJacobian(strict),
}


def choose(
    jacobian: str | Callable[..., Tensor], bandwidth: tuple[int, int] | None = None, strict: bool = True
) -> Jacobian:
    """A fresh strategy for one call of a solver.

    Args:
        jacobian: A name of `JACOBIANS`, or a callable ``jacobian(x, *args)``.
        bandwidth: Bands below and above the diagonal, for ``"banded"``.
        strict: Raise where a derivative's system cannot be solved to its tolerance; otherwise it is nan there.

    Raises:
        UnknownNameError: No such name.
        DualInputError: A bandwidth that is missing, not wanted, or makes no sense.
    """
    if callable(jacobian) and bandwidth is None:
        return GivenJacobian(jacobian)
    if jacobian not in JACOBIANS:
        raise unknown_name("jacobian", jacobian, JACOBIANS)
    if (bandwidth is None) == (jacobian == "banded"):
        raise DualInputError(
            f"jacobian='banded' and bandwidth=(lower, upper) go together, got {jacobian!r}, {bandwidth}"
        )
    if bandwidth is not None and not _is_pair(bandwidth):
        raise DualInputError(f"bandwidth must be (lower, upper), two integers >= 0, got {bandwidth!r}")
    return JACOBIANS[jacobian](bandwidth, strict)  # type: ignore[index]


def _is_pair(bandwidth: Any) -> bool:
    pair = isinstance(bandwidth, (tuple, list)) and len(bandwidth) == 2
    return pair and all(isinstance(b, int) and b >= 0 for b in bandwidth)
