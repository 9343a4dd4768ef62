"""The exact gradient by duals: every unit direction of the weights, in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualnn.engine.directions import Directions
from dualnn.engine.errors import DualInputError
from dualnn.engine.snapshot import Snapshot
from dualnn.signals.base import Signal, Step, inject, loss_of, trainable, with_loss
from dualnn.signals.forward_gradient import warn_unused, weight_pass


class Exact(Signal):
    r"""The exact gradient, one tangent for each trainable number: :math:`g_i = \partial L / \partial w_i`.

    Costs n tangents, so it is for few parameters meeting a long computation (an ODE, a Newton loop), where memory
    that does not grow with the number of steps decides. With ``chunk`` the step runs ceil(n / chunk) times, from the
    same random state and the same buffers, so that every run computes the same loss.

    Args:
        chunk: At most this many tangents at a time; None pushes all n at once.

    Raises:
        DualInputError: ``chunk`` is less than 1; the step computed another loss when it ran again.

    Example:
        >>> import torch
        >>> from dualnn.signals import Exact, signal_loss
        >>> net, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
        >>> signal_loss(lambda: net(x).square().mean(), net, Exact(), key=0).backward()
        >>> exact = net.weight.grad.clone(); net.zero_grad()
        >>> net(x).square().mean().backward()
        >>> torch.allclose(exact, net.weight.grad)
        True
    """

    def __init__(self, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise DualInputError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk

    def __repr__(self) -> str:  # noqa: D105
        return f"Exact(chunk={self.chunk})"

    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run the step once per chunk of unit directions."""
        parameters = trainable(module)
        total = sum(p.numel() for p in parameters)
        size = self.chunk or total
        before = Snapshot(module) if size < total else None
        sums: dict[nn.Parameter, torch.Tensor | None] = dict.fromkeys(parameters)
        output: Any = None
        first: Any = None
        for start in range(0, total, size):
            if start and before is not None:
                before.restore()
            directions = Directions("basis", min(size, total - start), key, start)
            output, part = weight_pass(step, module, directions, None)
            if loss_of(output) is None:
                return output
            value = loss_of(output).detach()
            first = value if first is None else first
            if not torch.allclose(value, first, rtol=1e-4, equal_nan=True):
                raise DualInputError(
                    f"the step computed {float(first)} when it ran for the first chunk and {float(value)} later: its "
                    "parts do not belong to one gradient. It must depend on nothing that changes between runs, such as "
                    "an iterator or a generator of its own; or use Exact(chunk=None), which runs it once."
                )
            for p, g in part.items():
                if g is not None:
                    seen = sums[p]
                    sums[p] = g if seen is None else seen + g
        warn_unused(module, [p for p in parameters if sums[p] is None])
        return with_loss(output, inject(first, sums))
