"""Every error of the library that a user can meet, by name.

All derive from `DualnnError`, and each also from the built-in that a caller would expect to catch.
"""

import difflib
import pickle
from collections.abc import Iterable

from torch.linalg import LinAlgError


class DualnnError(Exception):
    """Base of all errors raised by dualnn."""


class UnsupportedOpError(DualnnError, NotImplementedError):
    """An operation met a DualTensor and has no derivative rule (a tangent is never dropped silently)."""


class TangentLostError(DualnnError, RuntimeError):
    """A result that must carry a tangent arrived without one: the graph of duals was cut on the way."""


class StructureError(DualnnError, ValueError):
    """A claimed Jacobian structure (elementwise, per-sample, …) does not hold."""


class DualShapeError(DualnnError, ValueError):
    """Shapes, dtypes, devices or the number of tangents of a dual's parts disagree."""


class DualInputError(DualnnError, ValueError):
    """An argument lies outside what the function accepts (domain, dtype, range)."""


class ConvergenceError(DualnnError, RuntimeError):
    """An iterative method stopped before it reached its tolerance."""


class UnpicklableError(DualnnError, pickle.PicklingError):
    """A process that is being spawned would not find a function that a module holds."""


class SingularMatrixError(DualnnError, LinAlgError):
    """Matrices that must be regular, or of full rank, are not; the message lists their batch indices."""


class DegenerateWarning(UserWarning):
    """Eigenvalues or singular values coincide: their vectors are not differentiable, and their tangents are nan."""


class UnknownNameError(DualnnError, ValueError):
    """A name is not registered; the message lists the choices and the nearest one."""


class CompileFallbackWarning(UserWarning):
    """A function given to `dualnn.compile` runs eagerly; the message says why."""


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> UnknownNameError:
    """Build the error for a misspelt registered name.

    Example:
        >>> print(unknown_name("activation", "keplr", ["kepler", "quantize"]))
        unknown activation 'keplr': did you mean 'kepler'? Choices: kepler, quantize
    """
    names = sorted(choices)
    lower = {n.lower(): n for n in names}  # "Gelu" is nearest to "gelu", not to another word in lower case
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.4)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}: {hint}Choices: {', '.join(names)}")
