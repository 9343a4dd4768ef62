r"""Complex states as real ones of twice the size: :math:`(\operatorname{Re} z_1, \operatorname{Im} z_1, \dots)`.

The right-hand side need not be holomorphic: the implicit methods' matrices are those of the real system. Real and
imaginary parts are components of the error norm each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.solvers.factors import same_shape


def to_real(z: Tensor) -> Tensor:
    """``(…, n)`` complex to ``(…, 2n)`` real."""
    return torch.stack([z.real, z.imag], -1).flatten(-2)


def to_complex(y: Tensor) -> Tensor:
    """And back."""
    return torch.complex(y[..., 0::2], y[..., 1::2])


def real_rhs(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A right-hand side of complex states, of real ones."""

    def call(t: Tensor, y: Tensor, *args: Any) -> Tensor:
        z = to_complex(y)
        f = fn(t, z, *args)
        same_shape(f, z)
        return to_real(f)

    return call


def real_event(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An event's function of complex states, of real ones."""
    return lambda t, y, *args: fn(t, to_complex(y), *args)


def real_matrix(m: Tensor) -> Tensor:
    """``(*batch, n, n)``, real or complex, to ``(*batch, 2n, 2n)``."""
    re, im = (m.real, m.imag) if m.is_complex() else (m, torch.zeros_like(m))
    rows = [torch.stack(pair, -1) for pair in ((re, -im), (im, re))]
    return torch.stack(rows, -3).flatten(-4, -3).flatten(-2)
