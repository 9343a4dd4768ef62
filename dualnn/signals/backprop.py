"""Backprop, the rival: plain, or with activation checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dualnn.engine.errors import DualInputError
from dualnn.engine.names import matching
from dualnn.engine.patching import patched_forwards
from dualnn.signals.base import Signal, Step


class Backprop(Signal):
    r"""Reverse-mode autograd, as stock PyTorch runs it.

    Args:
        checkpoint: False stores all activations. True runs the outermost ``nn.Sequential`` containers in
            :math:`\lceil \sqrt n \rceil` segments and stores only what enters each: memory O(sqrt(n)) for one more
            forward pass (Chen et al.). A list of names or globs checkpoints those submodules instead. Norms update
            their running statistics once, as without checkpoints.

    Raises:
        DualInputError: ``checkpoint=True`` finds no ``nn.Sequential`` to split.
        UnknownNameError: A name matches no submodule.

    Reference:
        Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv 1604.06174.

    Example:
        >>> import torch
        >>> from dualnn.signals import Backprop, signal_loss
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> signal_loss(lambda: net(torch.ones(3, 2)).mean(), net, Backprop(checkpoint=True), key=0).backward()
        >>> net[0].weight.grad is not None
        True
    """

    def __init__(self, checkpoint: bool | list[str] = False) -> None:
        self.checkpoint = checkpoint

    def __repr__(self) -> str:  # noqa: D105
        return f"Backprop(checkpoint={self.checkpoint})"

    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run the step with autograd on."""
        with torch.enable_grad(), checkpointed(module, self.checkpoint):
            return step()


@contextmanager
def checkpointed(module: nn.Module, choice: bool | Sequence[str]) -> Iterator[None]:
    """Checkpoint parts of ``module`` while a step runs (their recomputation may come later)."""
    if isinstance(choice, bool) and not choice:
        yield
        return
    patches: dict[nn.Module, Callable]
    if isinstance(choice, bool):
        patches = {m: _segmented(m) for m in outermost_sequentials(module)}
        if not patches:
            raise DualInputError(
                f"checkpoint=True found no nn.Sequential of two or more children in {type(module).__name__} to split: "
                "name the submodules to checkpoint, as in Backprop(checkpoint=['blocks.*'])"
            )
    else:
        patches = {m: _whole(m) for m in matching(module, choice).values()}
    with patched_forwards(patches):
        yield


def outermost_sequentials(module: nn.Module) -> list[nn.Sequential]:
    """The ``nn.Sequential`` containers of at least two children that no other such container holds."""
    # A subclass or a patch may do more in its forward than run the children in turn.
    plain = type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__
    if isinstance(module, nn.Sequential) and len(module) > 1 and plain:
        return [module]
    return [s for child in module.children() for s in outermost_sequentials(child)]


def _segmented(sequence: nn.Sequential) -> Callable:
    size = len(sequence) // math.ceil(math.sqrt(len(sequence)))
    *segments, last = [sequence[i : i + size] for i in range(0, len(sequence), size)]

    def forward(input: Any) -> Any:
        for segment in segments:
            input = _checkpoint(segment, segment, input)
        return last(input)  # its backward comes first: nothing would be gained

    return forward


def _whole(module: nn.Module) -> Callable:
    forward = module.forward
    return lambda *args, **kwargs: _checkpoint(module, forward, *args, **kwargs)


def _checkpoint(module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    contexts = partial(_contexts, module)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let a recomputation update copies of running statistics: the forward pass has updated them already."""
    held = [(m, dict(m._buffers)) for m in module.modules() if isinstance(m, _NormBase)]
    try:
        for m, buffers in held:
            m._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for m, buffers in held:
            m._buffers.update(buffers)
