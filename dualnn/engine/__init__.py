"""The dual-tensor engine: DualTensor, tangents, levels, op rules, transforms and the autograd bridge.

The theory is in ``THEORY.md`` beside this file.
"""

from dualnn.engine import rules
from dualnn.engine.compiling import compile
from dualnn.engine.custom import custom_dual
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
from dualnn.engine.gradcheck import GradcheckError, gradcheck
from dualnn.engine.jacobians import jacobian
from dualnn.engine.scaled import scaled_tangents
from dualnn.engine.second_order import hessian, hvp, laplacian
from dualnn.engine.sparsity import Sparsity, detect
from dualnn.engine.transforms import jvp

__all__ = [
    "ConvergenceError",
    "DualInputError",
    "DualShapeError",
    "DualTensor",
    "DualnnError",
    "GradcheckError",
    "Sparsity",
    "StructureError",
    "TangentLostError",
    "UnknownNameError",
    "UnsupportedOpError",
    "compile",
    "custom_dual",
    "detect",
    "dual",
    "gradcheck",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "laplacian",
    "rules",
    "scaled_tangents",
]
