"""Several arms of one experiment, trained on the same data in the same order, and a verdict."""

from dualnn.training.compare.command import compare
from dualnn.training.compare.experiment import Arm, Experiment, load_experiment

__all__ = ["Arm", "Experiment", "compare", "load_experiment"]
