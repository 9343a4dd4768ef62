"""Lightning: the callback, the command line, the comparison of several signals.

The names are imported when first used, so that `dualnn --help` does not wait for Lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualnn.training.callback import DualPropagation
    from dualnn.training.errors import (
        ExperimentError,
        NonFiniteLossError,
        ResumeError,
        RunError,
        RunNameError,
        TrainingSetupError,
        UsageError,
    )
    from dualnn.training.finite import FiniteLoss

__all__ = [
    "DualPropagation",
    "ExperimentError",
    "FiniteLoss",
    "NonFiniteLossError",
    "ResumeError",
    "RunError",
    "RunNameError",
    "TrainingSetupError",
    "UsageError",
]

_HOMES = {"DualPropagation": "callback", "FiniteLoss": "finite"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"dualnn.training.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
