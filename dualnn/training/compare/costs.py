"""What one training step of an arm costs: live bytes, operations, and which weights it teaches."""

from typing import Any

import lightning.pytorch as pl
import torch

from dualnn.training.compare.experiment import Arm
from dualnn.training.compare.run import build
from dualnn.training.errors import RunError
from dualnn.training.meters import LiveBytes, Work

_BATCHES = 3  # one to see the gradient (and to let lazy buffers appear), one each for the two meters


class StepCosts(pl.Callback):
    """Meters around a few steps: whatever the trainer does in a step, optimizer included, is counted."""

    def __init__(self) -> None:
        self.taught = 0.0
        self.live = LiveBytes()
        self.work = Work()
        self.batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch on the meter of this batch."""
        self.batch = batch
        if (meter := self._meter(batch_idx)) is not None:
            meter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Switch it off."""
        if (meter := self._meter(batch_idx)) is not None:
            meter.__exit__(None, None, None)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """See which weights the first step reaches."""
        if self.taught == 0:
            weights = [p for p in pl_module.parameters() if p.requires_grad]
            reached = sum(p.numel() for p in weights if p.grad is not None and bool(p.grad.any()))
            self.taught = reached / sum(p.numel() for p in weights)

    def _meter(self, batch_idx: int) -> LiveBytes | Work | None:
        if batch_idx == 1:
            return self.live
        return self.work if batch_idx == 2 else None


def step_costs(arm: Arm, seed: int) -> dict[str, float]:
    """Measure a step of an arm.

    Returns:
        `live_bytes`: most bytes of tensors made in a step and alive at once. `forwards`: operations of a step in
        units of a plain forward pass of the same model on the same batch. `taught`: the share of trainable numbers
        that a step gives any gradient.

    Raises:
        RunError: One of these steps failed.
        UsageError: The arm's configuration is wrong.
    """
    costs = StepCosts()
    limits = {"max_epochs": 1, "limit_train_batches": _BATCHES, "limit_val_batches": 0, "accumulate_grad_batches": 1}
    cli = build(arm, seed, limits, [costs])
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    except Exception as error:
        raise RunError(cli.trainer.global_step, error) from error
    # The callback has put the model back: this is its forward pass as anybody would run it.
    with Work() as forward, torch.no_grad():
        cli.model.predict_step(costs.batch, 0)
    return {
        "live_bytes": costs.live.peak,
        "forwards": costs.work.total / forward.total,
        "taught": costs.taught,
    }
