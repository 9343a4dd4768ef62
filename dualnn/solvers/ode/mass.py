r"""Mass matrices, :math:`M y' = f(t, y, p)`: implicit ODEs, and where M is singular, algebraic equations of index 1.

Let :math:`U` and :math:`V` span the left and the right null space of a singular M. No :math:`y'` enters
:math:`U^T f(t, y, p) = 0`: these are the algebraic equations, and :math:`y_0` must satisfy them. They determine what
:math:`M y` leaves open, :math:`y_0 + V w`, if :math:`U^T f_y V` is regular: that is index 1.

Reference:
    Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996, section VI.1; Shampine, Reichelt, Kierzenka,
    "Solving index-1 DAEs in MATLAB and Simulink", SIAM Review 41, 1999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, primal_of
from dualnn.engine.errors import DualInputError, SingularMatrixError, UnsupportedOpError
from dualnn.solvers.factors import LU, block_jacobian
from dualnn.solvers.ode.captured import plain
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.root import root
from dualnn.solvers.stats import those


class Null(NamedTuple):
    """The singular value decomposition of mass matrices, split by rank.

    Attributes:
        left: All left singular vectors, as columns.
        right: All right ones.
        zero: Which singular values are zero, ``(*batch, n)``.
    """

    left: Tensor
    right: Tensor
    zero: Tensor


def null(mass: Tensor) -> Null:
    """Of plain matrices."""
    u, s, vh = torch.linalg.svd(mass)
    zero = s <= s.amax(-1, keepdim=True) * s.shape[-1] * torch.finfo(s.dtype).eps
    return Null(u, vh.mT, zero)


def slope(mass: Tensor, f: Tensor, f_y: Tensor, f_t: Tensor) -> Tensor:
    r""":math:`y'` at a consistent point, from :math:`M y' = f` and :math:`U^T (f_y y' + f_t) = 0`.

    Differentiated in M, it takes U as constant: in what U's motion changes, M does not see it.
    """
    found = null(plain(mass))
    lost = torch.where(found.zero.unsqueeze(-2), found.left, 0.0) @ found.left.mT
    rhs = f - ((f + f_t).unsqueeze(-2) @ lost).squeeze(-2)
    return LU(mass + lost @ f_y).solve(rhs)


def check_mass(mass: Any, y0: Tensor, method: str, explicit: bool) -> None:
    """Raise where it cannot be one."""
    if not isinstance(mass, Tensor):
        raise DualInputError(f"mass must be a torch.Tensor (n, n) or (B, n, n), got {type(mass).__name__}")
    n = y0.shape[-1]
    if mass.shape not in ((n, n), (*y0.shape[:-1], n, n)):
        raise DualInputError(
            f"mass must be ({n}, {n}), or one a sample, for y0 of shape {tuple(y0.shape)}: got {tuple(mass.shape)}"
        )
    if mass.dtype not in (y0.dtype, y0.dtype.to_real()) or mass.device != y0.device:
        raise DualInputError(f"mass is {mass.dtype} on {mass.device}, y0 is {y0.dtype} on {y0.device}: mass.to(y0)")
    if not bool(torch.isfinite(primal_of(mass)).all()):
        raise DualInputError("mass holds values that are nan or infinite")
    if explicit:
        raise DualInputError(
            f"method={method!r} is explicit and takes no mass matrix: use 'radau', 'rodas5p' or 'bdf', or return "
            "M^-1 f from fn"
        )


def consistent(
    rhs: Callable[..., Tensor], t0: Tensor, y0: Tensor, mass: Tensor, args: Sequence[Any], tol: Tolerance, project: bool
) -> Tensor:
    """The start, with the algebraic equations checked or solved.

    Args:
        rhs: ``rhs(t, y, *args)``, for times of the batch's shape.
        t0: 0-dim.
        y0: The start as it was given, maybe differentiated; as ``t0``, ``mass`` and ``args``.
        mass: The mass matrix.
        args: Further arguments.
        tol: How near is consistent.
        project: Change what :math:`M y_0` leaves open by any amount; else raise where it is more than the tolerance.
    """
    found = null(plain(mass))
    if not bool(found.zero.any()):
        return y0
    moves = isinstance(mass, DualTensor) or (torch.is_grad_enabled() and mass.requires_grad)
    if project and moves:
        raise UnsupportedOpError(
            "options['project'] with a singular mass matrix that is differentiated itself: the space in which y0 is "
            "projected would move. Project first (one call with mass.detach()), or detach mass."
        )

    def moved(w: Tensor, y: Tensor) -> Tensor:
        free = torch.where(found.zero, w, 0.0)
        return y + (free.unsqueeze(-2) @ found.right.mT).squeeze(-2)

    def residual(w: Tensor, y: Tensor, t: Tensor, *args: Any) -> Tensor:
        f = rhs(t + torch.zeros_like(w[..., 0]), moved(w, y), *args)
        return torch.where(found.zero, (f.unsqueeze(-2) @ found.left).squeeze(-2), w)

    start, now, *rest = (plain(x) for x in (y0, t0, *args))
    with torch.no_grad():
        defect, matrix = block_jacobian(lambda w: residual(w, start, now, *rest), torch.zeros_like(start))
        singular = torch.linalg.cond(matrix) > 0.1 / torch.finfo(matrix.dtype).eps
        if bool(singular.any()):
            raise SingularMatrixError(
                f"M y' = f is not of index 1 for {those(_where(singular), singular.numel())} at the start: the "
                "algebraic equations do not determine the components that M leaves open. Differentiate constraints "
                "until they do."
            )
        away = -LU(matrix).solve(defect)
        off = moved(away, torch.zeros_like(start))
        norm = tol.measure(off, tol.scale(start))
    if bool((norm > 1).any()) and not project:
        worst = int(norm.argmax())
        raise DualInputError(
            f"y0 is inconsistent for {those(_where(norm > 1), norm.numel())}: the algebraic equations of M y' = f "
            f"leave a residual of {float(defect.abs().amax(-1).reshape(-1)[worst]):.3g}, and hold about "
            f"{float(off.abs().amax(-1).reshape(-1)[worst]):.3g} from y0, {float(norm.max()):.3g} times the "
            "tolerance. Mend y0, or pass options={'project': True}."
        )
    # Also from a consistent start: its derivative has to be consistent as well.
    return y0 if moves else moved(root(residual, torch.zeros_like(start), (y0, t0, *args)), y0)


def _where(mask: Tensor) -> list[int]:
    return torch.nonzero(mask.reshape(-1)).flatten().tolist()
