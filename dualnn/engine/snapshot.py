"""A snapshot of what running a step changes besides its result: random states and buffers."""

from __future__ import annotations

import random
import sys

import torch
from torch import nn


class RandomStates:
    """The states of the global generators of torch (CPU, and CUDA where it is in use), numpy and Python."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")  # who has not imported it draws nothing from it
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Put all of them back."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class Snapshot:
    """The random generators and a module's buffers, to run a step again as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self.random = RandomStates()

    def restore(self) -> None:
        """Put everything back."""
        self.random.restore()
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
