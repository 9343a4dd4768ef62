"""The dual-tensor engine: DualTensor, tangents, levels, op rules, transforms and the autograd bridge.

The theory is in ``THEORY.md`` beside this file.
"""

from dualnn.engine import rules
from dualnn.engine.dual_tensor import DualTensor, dual
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    DualnnError,
    DualShapeError,
    StructureError,
    TangentLostError,
    UnknownNameError,
    UnsupportedOpError,
)
from dualnn.engine.transforms import jacobian, jvp

__all__ = [
    "ConvergenceError",
    "DualInputError",
    "DualShapeError",
    "DualTensor",
    "DualnnError",
    "StructureError",
    "TangentLostError",
    "UnknownNameError",
    "UnsupportedOpError",
    "dual",
    "jacobian",
    "jvp",
    "rules",
]
