"""Stop a run at the first loss that is not a number."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dualnn.training.errors import NonFiniteLossError


def check_finite_loss(trainer: pl.Trainer, loss: Tensor) -> None:
    """Raise if `loss` is nan or infinite.

    With a gradient scaler (`precision="16-mixed"`) an infinite loss is part of the method: the scaler skips the
    step and lowers its scale, so nothing is raised there.

    Raises:
        NonFiniteLossError: With the step's number.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is None and not bool(torch.isfinite(loss).all()):
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        # Lightning hands the loss over divided by the number of accumulated batches, which changes no nan or inf.
        raise NonFiniteLossError(trainer.global_step, batch, float(loss.detach()))


class FiniteLoss(pl.Callback):
    """Raise `NonFiniteLossError` before a nan or infinite loss is differentiated, so that the weights stay clean.

    `DualPropagation` does the same by itself; this is for runs without it.

    Example:
        >>> import lightning.pytorch as pl
        >>> from dualnn.training import FiniteLoss
        >>> trainer = pl.Trainer(callbacks=[FiniteLoss()], logger=False, enable_checkpointing=False,
        ...                      accelerator="cpu", enable_progress_bar=False)
    """

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Check the loss."""
        check_finite_loss(trainer, loss)
