"""Train neural networks through code that backprop cannot differentiate.

`import dualnn as dn` is light: subpackages and the public names below are attributes, imported when first used.

Example:
    >>> import dualnn as dn
    >>> "layers" in dir(dn)
    True
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ resolves, spelt out for type checkers
    from dualnn import (
        activations,
        bench,
        conformance,
        data,
        diagnosis,
        engine,
        layers,
        models,
        signals,
        solvers,
        training,
    )
    from dualnn.diagnosis import doctor
    from dualnn.engine import (
        DualTensor,
        StructureError,
        TangentLostError,
        UnsupportedOpError,
        compile,
        custom_dual,
        dual,
        gradcheck,
        hessian,
        hvp,
        jacobian,
        jvp,
        laplacian,
    )

__version__ = "0.1.0"

__all__ = [
    "DualTensor",
    "StructureError",
    "TangentLostError",
    "UnsupportedOpError",
    "activations",
    "bench",
    "compile",
    "conformance",
    "custom_dual",
    "data",
    "diagnosis",
    "doctor",
    "dual",
    "engine",
    "gradcheck",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "laplacian",
    "layers",
    "models",
    "signals",
    "solvers",
    "training",
]

_SUBPACKAGES = frozenset(
    {
        "activations",
        "bench",
        "conformance",
        "data",
        "diagnosis",
        "engine",
        "layers",
        "models",
        "signals",
        "solvers",
        "training",
    }
)
# Every other public name lives in dualnn.engine, under the same name, except:
_HOMES = {"doctor": "dualnn.diagnosis"}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"dualnn.{name}")
    if name in __all__:
        home = _HOMES.get(name, "dualnn.engine")
        value = globals()[name] = getattr(importlib.import_module(home), name)
        return value
    # `name` and `obj` let Python add "Did you mean: ...?"
    raise AttributeError(f"module 'dualnn' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
