"""Benchmarks beside their peers in the same run: `dualnn bench`."""

from dualnn.bench.benchmark import Arm, Benchmark, Settings, Unavailable
from dualnn.bench.result import Result
from dualnn.bench.timing import DisagreementError, run

__all__ = ["Arm", "Benchmark", "DisagreementError", "Result", "Settings", "Unavailable", "run"]
