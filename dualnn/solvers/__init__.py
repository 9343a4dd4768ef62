"""Solvers with implicit derivatives. One method a file."""

from dualnn.solvers.fixed_point import fixed_point
from dualnn.solvers.root import root
from dualnn.solvers.stats import Stats

__all__ = ["Stats", "fixed_point", "root"]
