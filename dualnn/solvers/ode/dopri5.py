"""Dormand and Prince's explicit pair of orders 5 and 4, with an interpolant of order 4.

Reference:
    Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980; interpolant: Shampine, "Some practical
    Runge-Kutta formulas", 1986, equation (4.5).
"""

from dualnn.solvers.ode.control import Controller
from dualnn.solvers.ode.runge_kutta import RungeKutta

_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_D = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)


def _interpolant() -> list[list[float]]:
    """Hairer's form: theta and the cubic of Hermite, and a quartic that vanishes to second order at both ends."""
    rows = []
    for i in range(7):
        first, last, b = float(i == 0), float(i == 6), (*_B, 0.0)[i]
        # y0 + h theta (b + (1 - theta) ((k1 - b) + theta ((2 b - k1 - k7) + (1 - theta) D)))
        u, v, d = first - b, 2 * b - first - last, _D[i]
        # theta b + (theta - theta^2) u + (theta^2 - theta^3) v + (theta^2 - 2 theta^3 + theta^4) d
        rows.append([b + u, -u + v + d, -v - 2 * d, d])
    return rows


DOPRI5 = RungeKutta(
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _B,
    ),
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    p=_interpolant(),
    error_order=4,
    control=Controller(a=0.17, b=0.04),
)
