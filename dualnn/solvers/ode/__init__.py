"""Ordinary differential equations. One method a file."""

from dualnn.solvers.ode.events import Event, Occurrences
from dualnn.solvers.ode.odeint import odeint

__all__ = ["Event", "Occurrences", "odeint"]
