"""K matrices beside each other, so that one product serves all K directions.

Directions of a matrix come as ``(K, *batch, n, m)``. Multiplying each by one shared matrix (or solving with one shared
factor) in this layout is K times batch small products, for which torch copies the shared operand K times. With K moved
beside the columns, ``(*batch, n, K, m)``, the same memory is at once n rows of ``K m`` columns, for what acts from the
left, and ``n K`` rows of m columns, for what acts from the right: one product a matrix of the batch, both views.
Measured on one thread, 256 matrices of 4x4, K = 64: 0.2 ms against 3.4 ms a product.
"""

import torch
from torch import Tensor


def beside(t: Tensor) -> Tensor:
    """``(K, *batch, n, m) -> (*batch, n, K, m)``."""
    return t.movedim(0, -2)


def leading(t: Tensor) -> Tensor:
    """``(*batch, n, K, m) -> (K, *batch, n, m)``."""
    return t.movedim(-2, 0)


def before(a: Tensor, t: Tensor) -> Tensor:
    """``a @ t_k`` for every k; ``t: (*batch, n, K, m)``."""
    return (a @ t.flatten(-2)).unflatten(-1, t.shape[-2:])


def after(t: Tensor, a: Tensor) -> Tensor:
    """``t_k @ a`` for every k."""
    return (t.flatten(-3, -2) @ a).unflatten(-2, t.shape[-3:-1])


def before_solve(a: Tensor, t: Tensor, *, upper: bool, unit: bool = False) -> Tensor:
    """``a^-1 t_k`` for every k, with a triangular a."""
    found = torch.linalg.solve_triangular(a, t.flatten(-2), upper=upper, unitriangular=unit)
    return found.unflatten(-1, t.shape[-2:])


def after_solve(t: Tensor, a: Tensor, *, upper: bool) -> Tensor:
    """``t_k a^-1`` for every k, with a triangular a."""
    found = torch.linalg.solve_triangular(a, t.flatten(-3, -2), upper=upper, left=False)
    return found.unflatten(-2, t.shape[-3:-1])


def turned(t: Tensor) -> Tensor:
    """The conjugate transpose of every ``t_k``."""
    flipped = t.transpose(-3, -1)
    return flipped.conj() if t.is_complex() else flipped


def below(n: int, m: int, like: Tensor, offset: int = -1) -> Tensor:
    """A mask ``(n, 1, m)`` of the entries on or below a diagonal (by default those strictly below the main one)."""
    return torch.ones(n, m, dtype=torch.bool, device=like.device).tril(offset).unsqueeze(-2)


def only(mask: Tensor, t: Tensor) -> Tensor:
    """The entries in ``mask``, zero elsewhere."""
    return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))
