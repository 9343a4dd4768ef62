"""Watch for parameters that a step uses outside of the modules that own them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What takes a parameter's value out of the derivative on purpose (for a logger, say), or never was in it.
_CUTS = {Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.grad.__get__}  # type: ignore[attr-defined, union-attr]


class OutsideUse(TorchFunctionMode):
    """Note parameters that meet an op outside of `inside`: ``F.linear(x, net.weight)``, a penalty on the weights.

    Args:
        parameters: The parameters to watch.

    Attributes:
        found: Those that were used outside.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._watched = {id(p): p for p in parameters}
        self._depth = 0
        self.found: dict[int, nn.Parameter] = {}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Use in here is as it should be."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the op, and look at its operands."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._depth and func not in _CUTS:
            used = {id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)}
            if any(isinstance(x, Tensor) and x.dtype.is_floating_point for x in pytree.tree_leaves(out)):
                self.found.update((i, self._watched[i]) for i in used if i in self._watched)
        return out
