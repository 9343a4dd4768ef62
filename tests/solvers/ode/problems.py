"""Initial value problems with published or closed-form answers."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualnn.bench.ivp import robertson, van_der_pol

F64 = torch.float64
STIFF = ("radau", "rodas5p", "bdf")
EXPLICIT = ("dopri5", "dop853")
METHODS = (*STIFF, *EXPLICIT)


class Known(NamedTuple):
    """Values and sensitivities (one row a parameter) at the times after the first; by two integrators, nine digits."""

    fn: object
    y0: Tensor
    t: Tensor
    p: Tensor
    y: Tensor
    dy: Tensor  # (times, parameters, n)


def _tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


ROBERTSON = Known(
    robertson,
    _tensor(1.0, 0.0, 0.0),
    _tensor(0.0, 0.4, 40.0),
    _tensor(0.04, 1e4, 3e7),
    _tensor((0.985172113861, 3.386395378975e-5, 1.479402218522e-2), (0.715827068719, 9.1855347645e-6, 0.284163745746)),
    _tensor(
        (
            (-0.355952566, 3.902544054e-4, 0.3555623116),
            (9.54238143e-8, -2.130961030e-10, -9.52107182e-8),
            (-1.583176636e-11, -5.290041093e-13, 1.636077046e-11),
        ),
        (
            (-4.24755877, 4.59119625e-5, 4.24751286),
            (1.373080797e-5, -2.357192114e-10, -1.373057225e-5),
            (-2.288355088e-9, -1.1380595e-13, 2.288468894e-9),
        ),
    ),
)
LATE = (
    4e4,
    _tensor(3.898337709e-2, 1.621768316e-7, 0.961016460738),
    _tensor(-1.574971610, -2.761956365e-6, 1.57497437),
)
# The "Test Set for IVP Solvers" (problem rober). As t grows, y1 tends to p2^2 / (p3 p1^2 t): its sensitivities are
# those of a product of powers.
LAST = (1e11, _tensor(0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050), _tensor(-2.0, 2.0, -1.0))
# SUNDIALS, cvsRoberts_FSA_dns with rtol 1e-4: time, y1, dy1/dp1.
SUNDIALS = ((4e5, 4.9394e-3, -2.3640e-1), (4e6, 5.1681e-4, -2.5663e-2), (4e7, 5.2039e-5, -2.5997e-3),
            (4e8, 5.2092e-6, -2.6049e-4))  # fmt: skip
VAN_DER_POL = Known(
    van_der_pol,
    _tensor(2.0, 0.0),
    _tensor(0.0, 0.5),
    _tensor(1e-3),
    _tensor((1.59732368459, -1.02859902098)),
    _tensor(((0.5539920122, 1.782526024),)),
)
KNOWN = {"robertson": ROBERTSON, "van_der_pol": VAN_DER_POL}

MATRIX = _tensor((-1.0, 2.0, 0.3), (-0.5, -3.0, 0.1), (0.2, 0.4, -20.0))
START = _tensor(1.0, -0.5, 0.7)


def linear(t: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
    """y' = A y: the solution is expm(A (t - t0)) y0."""
    return (matrix @ y.unsqueeze(-1)).squeeze(-1)


def driven(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Neither linear nor autonomous, and mildly stiff."""
    a, b = y.unbind(-1)
    t = t.squeeze(-1) if t.dim() else t
    return torch.stack([b + p[..., 0] * torch.sin(t), -20 * b + p[..., 1] * a * b - torch.cos(t * a)], -1)


DRIVEN = (_tensor(1.0, 0.5), _tensor(0.0, 0.35, 1.0), _tensor(0.7, -1.3))
