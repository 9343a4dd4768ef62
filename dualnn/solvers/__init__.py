"""Solvers with implicit derivatives. One method a file."""

from dualnn.solvers.fixed_point import fixed_point

__all__ = ["fixed_point"]
