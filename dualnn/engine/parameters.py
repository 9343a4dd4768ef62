"""Exchange a module's parameters for duals while a function runs, and put them back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import UnsupportedOpError


@contextmanager
def swapped(module: nn.Module, replacement: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Replace parameters by identity, wherever they occur in ``module`` (tied weights, RNN ``_flat_weights``).

    Args:
        module: The module whose submodules are searched.
        replacement: The tensor that stands in for each parameter.

    Raises:
        UnsupportedOpError: A parameter was written to in place meanwhile (the write would be lost).
    """
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    flat: list[tuple[nn.Module, list]] = []
    values = [(r, r._primal) for r in replacement.values() if isinstance(r, DualTensor)]
    try:
        for sub in module.modules():
            for name, parameter in sub._parameters.items():
                if parameter is not None and parameter in replacement:
                    undo.append((sub, name, parameter))
                    sub._parameters[name] = replacement[parameter]  # type: ignore[assignment]
            weights = sub.__dict__.get("_flat_weights")
            if weights is not None:
                flat.append((sub, weights))
                sub._flat_weights = [replacement.get(w, w) for w in weights]  # type: ignore[assignment]
        yield
    finally:
        for sub, name, parameter in undo:
            sub._parameters[name] = parameter
        for sub, weights in flat:
            sub._flat_weights = weights  # type: ignore[assignment]
    # A dual's parts are exchanged by a write, never overwritten: the parameter itself has not seen it.
    written = {id(r) for r, value in values if r._primal is not value}
    if written:
        names = {name for _, name, p in undo if id(replacement[p]) in written}
        raise UnsupportedOpError(
            f"a parameter ({', '.join(sorted(names))}) was written to in place while its derivative was computed "
            "(weights clipped or loaded inside the step): the write would be lost. Do it outside the step, for "
            "example in a hook of the optimizer."
        )
