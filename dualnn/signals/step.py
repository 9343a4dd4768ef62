"""`signal_loss`: one training step under any signal, in a bare PyTorch loop."""

from __future__ import annotations

from typing import Any

from torch import nn

from dualnn.engine.errors import DualInputError
from dualnn.signals.base import Signal, Step


def signal_loss(step: Step, module: nn.Module, signal: Signal, key: int) -> Any:
    r"""Run one training step under a signal; ``.backward()`` on the result writes ``.grad``.

    Args:
        step: A function without arguments that computes the loss, as an ordinary training step does: a scalar
            tensor, or a dict with ``"loss"``, or None to skip the batch.
        module: Holds the parameters to train (their ``requires_grad`` decides).
        signal: Where the gradient comes from.
        key: All random directions follow from it: give every step (and every machine) its own.

    Returns:
        What ``step`` returned, with a plain scalar loss. ``backward()`` adds the gradient to ``.grad`` of every
        parameter that the step uses, so any optimizer, clipping and accumulation work as usual.

    Raises:
        TangentLostError: The loss does not depend on what the signal perturbs.
        UnsupportedOpError: The step used an op without a derivative rule.

    Example:
        >>> import torch, dualnn as dn
        >>> net = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> x, target = torch.randn(8, 4), torch.randint(0, 2, (8,))
        >>> signal = dn.signals.ActivityPerturbation(tangents=4)
        >>> for i in range(3):
        ...     optimizer.zero_grad()
        ...     step = lambda: torch.nn.functional.cross_entropy(net(x), target)
        ...     dn.signals.signal_loss(step, net, signal, key=i).backward()
        ...     optimizer.step()
    """
    if not isinstance(signal, Signal):
        raise DualInputError(f"signal must be a dualnn.signals.Signal, such as ForwardGradient(), got {signal!r}")
    if not callable(step):
        raise DualInputError(f"step must be a function without arguments that returns the loss, got {step!r}")
    return signal.loss(step, module, int(key))
