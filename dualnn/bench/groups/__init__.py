"""The groups of benchmarks, one a file: ``dualnn bench GROUP``."""

from dualnn.bench.groups.engine import ENGINE
from dualnn.bench.groups.ode import ODE
from dualnn.bench.groups.signals import SIGNALS
from dualnn.bench.groups.solvers import SOLVERS
from dualnn.bench.groups.zoo import ZOO

GROUPS = {"engine": ENGINE, "solvers": SOLVERS, "ode": ODE, "signals": SIGNALS, "zoo": ZOO}
