"""Where eigenvalues or singular values coincide: which tangents do not exist, and one warning that says so.

Vectors of a repeated value may be turned among themselves at will: as functions of the matrix they jump, and their
tangents are nan, never a large finite number that rounding made. Two values count as equal where they are closer than
the error that rounding leaves in them, ``n eps norm``.
"""

import warnings

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DegenerateWarning
from dualnn.engine.scaling import idle


def rounding(values: Tensor, n: int) -> Tensor:
    """``n eps max|values|``, with a last axis of one."""
    if not values.shape[-1]:
        return values
    return n * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)


def equal_pairs(values: Tensor, n: int) -> Tensor:
    """``(*batch, r, r)``: pairs of values that cannot be told apart (not with themselves)."""
    plain = primal_of(values).detach()
    gaps = (plain.unsqueeze(-2) - plain.unsqueeze(-1)).abs()
    off = ~torch.eye(plain.shape[-1], dtype=torch.bool, device=plain.device)
    return off & (gaps <= rounding(plain, n).unsqueeze(-1))


def seen(values: Tensor, mask: Tensor) -> bool:
    """Whether there is anything in ``mask``; True where the numbers cannot be looked at (tracing, torch.func)."""
    return bool(mask.any()) if idle() else True


def warn_pairs(values: Tensor, mask: Tensor, what: str) -> None:
    """Name the first pair, where the numbers can be looked at; of nested duals only the innermost level speaks."""
    if type(values) is not Tensor or not idle():
        return
    pairs = mask.triu(1).nonzero()
    *batch, i, j = pairs[0].tolist()
    gap = float((values[(*batch, i)] - values[(*batch, j)]).abs())
    where = f" of sample {batch[0] if len(batch) == 1 else tuple(batch)}" if batch else ""
    more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
    warnings.warn(
        f"{what} {i} and {j}{where} coincide (gap {gap:.3g}){more}: the tangents of their vectors do not exist and are "
        "nan. The values' tangents, and functions of the whole invariant subspace, are defined: use eigvalsh or "
        "svdvals, or a function of the matrix itself (matrix_exp, inv, pinv).",
        DegenerateWarning,
        stacklevel=2,
    )


def warn_small(values: Tensor, mask: Tensor) -> None:
    """The same for singular values that vanish."""
    if type(values) is not Tensor or not idle():
        return
    *batch, i = mask.nonzero()[0].tolist()
    where = f" of sample {batch[0] if len(batch) == 1 else tuple(batch)}" if batch else ""
    warnings.warn(
        f"singular value {i}{where} vanishes ({float(values[(*batch, i)]):.3g}): its vectors may be turned into the "
        "null space at will, their tangents do not exist and are nan. Use svdvals or pinv, or leave the sample out.",
        DegenerateWarning,
        stacklevel=2,
    )
