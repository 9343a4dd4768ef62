"""What layers share that solve equations for their output: a module as equations, its weights among their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.autocast import as_now
from dualnn.engine.errors import DualInputError, DualShapeError
from dualnn.engine.parameters import Places


class Equations:
    """``module(z, *inputs)`` as a function of flat unknowns and of everything else that is differentiated.

    Args:
        name: The layer's, for messages.
        module: The module.
        z: Where to start, ``(B, …)``.
        inputs: Further inputs of the module.

    Raises:
        DualInputError: z or an input is not a floating point tensor, or z is empty beside the batch.
        DualShapeError: z has no batch axis and at least one more.

    Attributes:
        start: z, ``(B, n)``.
        args: The inputs and the module's parameters.
    """

    def __init__(self, name: str, module: nn.Module, z: Any, inputs: tuple[Any, ...]) -> None:
        for what, t in (*(("x", x) for x in inputs), ("z0", z)):
            if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
                got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise DualInputError(
                    f"{name}: {what} must be a floating point tensor, got {got}: convert it (x.float())"
                )
        if z.dim() < 2 or z.shape[1:].numel() == 0:
            raise DualShapeError(f"{name}: z0 needs a batch axis and unknowns, (B, …), got shape {tuple(z.shape)}")
        self.name, self.module, self.shape, self.count = name, module, z.shape, len(inputs)
        self.places = Places(module)
        self.start = z.reshape(z.shape[0], z.shape[1:].numel())
        self.args = (*inputs, *self.places.parameters)
        self._device = z.device.type

    def function(self, flat: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """``fn(z, *args)`` with z flat; ``flat(y, z)`` checks and shapes what the module returns.

        In today's autocast state whenever it runs, the result in z's precision; gradients are enabled, so that modules
        are free to use autograd themselves.
        """

        def run(z: Tensor, *args: Any) -> Tensor:
            inputs, weights = args[: self.count], args[self.count :]
            with self.places.swapped(weights) if weights else contextlib.nullcontext():
                y = self.module(z.reshape(z.shape[0], *self.shape[1:]), *inputs)
            return flat(y, z).to(z.dtype)

        return as_now(run, self._device)


def empty(z: Tensor, module: nn.Module, inputs: tuple[Any, ...]) -> Tensor | None:
    """An empty batch's solution: empty, on the graph of the inputs; None for any other batch."""
    if z.shape[0]:
        return None
    tied = [x for x in (*inputs, *module.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    return z + sum((t.sum() for t in tied), torch.zeros((), dtype=z.dtype, device=z.device)) * 0
