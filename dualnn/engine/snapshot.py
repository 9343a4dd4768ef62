"""A snapshot of what running a step changes besides its result: random states and buffers."""

from __future__ import annotations

import torch
from torch import nn


class Snapshot:
    """Random generators (CPU, and CUDA where it is in use) and a module's buffers, to run a step again as it was."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Put everything back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
