"""Exchange a module's parameters and buffers while a function runs, and put them back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import UnsupportedOpError


@contextmanager
def swapped(module: nn.Module, replacement: Mapping[Any, Tensor]) -> Iterator[None]:
    """Replace parameters and buffers by identity, wherever they occur in ``module`` (tied, RNN ``_flat_weights``).

    Args:
        module: The module whose submodules are searched.
        replacement: The tensor that stands in for each parameter or buffer; the others stay.

    Raises:
        UnsupportedOpError: A parameter was written to in place meanwhile (the write would be lost).
    """
    undo: list[tuple[dict[str, Any], str, Tensor]] = []
    flat: list[tuple[nn.Module, list]] = []
    values = [(r, r._primal) for r in replacement.values() if isinstance(r, DualTensor)]
    try:
        for sub in module.modules():
            homes: tuple[dict[str, Any], ...] = (sub._parameters, sub._buffers)
            for home in homes:
                for name, old in home.items():
                    if old is not None and old in replacement:
                        undo.append((home, name, old))
                        home[name] = replacement[old]
            weights = sub.__dict__.get("_flat_weights")
            if weights is not None:
                flat.append((sub, weights))
                sub._flat_weights = [replacement.get(w, w) for w in weights]  # type: ignore[assignment]
        yield
    finally:
        for home, name, old in undo:
            home[name] = old
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


class Places:
    """Where a module's parameters are, so that tensors stand in for them at any later time.

    By place and not by identity: a backward pass may run after ``torch.func.functional_call`` has put others there.

    Args:
        module: The module, as it is now; None for a function without parameters.

    Attributes:
        parameters: Each parameter once.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.parameters = [] if module is None else list(module.parameters())
        position = {id(p): i for i, p in enumerate(self.parameters)}
        self._places = [
            (sub, name, position[id(p)])
            for sub in ([] if module is None else module.modules())
            for name, p in sub._parameters.items()
            if p is not None
        ]

    def swapped(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """As `swapped`: ``tensors[i]`` stands where ``parameters[i]`` was.

        Example:
            >>> import torch
            >>> layer = nn.Linear(1, 1, bias=False)
            >>> with Places(layer).swapped([torch.tensor([[3.0]])]):
            ...     layer(torch.ones(1))
            tensor([3.])
        """
        here = {sub._parameters[name]: tensors[i] for sub, name, i in self._places}
        return swapped(self.module or nn.Module(), here)  # type: ignore[arg-type]
