"""Solvers with implicit derivatives. One method a file."""

from dualnn.solvers.fixed_point import fixed_point
from dualnn.solvers.linear import (
    cholesky,
    cholesky_solve,
    det,
    eigh,
    expm,
    inv,
    lstsq,
    lu,
    pinv,
    qr,
    slogdet,
    solve,
    svd,
)
from dualnn.solvers.minimize import minimize
from dualnn.solvers.ode import Event, Occurrences, odeint
from dualnn.solvers.root import root
from dualnn.solvers.stats import Stats

__all__ = [
    "Event",
    "Occurrences",
    "Stats",
    "cholesky",
    "cholesky_solve",
    "det",
    "eigh",
    "expm",
    "fixed_point",
    "inv",
    "lstsq",
    "lu",
    "minimize",
    "odeint",
    "pinv",
    "qr",
    "root",
    "slogdet",
    "solve",
    "svd",
]
