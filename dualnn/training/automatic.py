"""``where="auto"``: the doctor examines the first batch's training step, and only what fails is swapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from dualnn.diagnosis import Report, examine
from dualnn.training.errors import TrainingSetupError


def examine_step(module: pl.LightningModule, batch: Any, batch_idx: int) -> Report:
    """Run the doctor on one training step; nothing is logged, and the module stays as it is."""
    with _unlogged(module):
        return examine(module, (batch, batch_idx), {}, method="training_step")


def names_to_swap(report: Report) -> list[str]:
    """Names, inside the LightningModule, of the failing submodules that exact local duals can take over.

    Raises:
        TrainingSetupError: Something fails that they cannot: a surrogate or an estimate is only taken by name.
    """
    names = report.where
    beyond = [f for f in report.failures if f.path not in names and f.kind != "memory"]
    if beyond:
        listed = "; ".join(f"{f.name or 'training_step'}: {f.cause}. Remedy: {f.remedy}" for f in beyond)
        raise TrainingSetupError(
            f'where="auto" only swaps in exact derivatives, and {len(beyond)} failure(s) have none: {listed}. Mend '
            "them as it says, or name the modules yourself with where=[…]."
        )
    return names


def tell(trainer: pl.Trainer, report: Report, names: list[str]) -> None:
    """Print what was found and chosen, and write it to TensorBoard as text."""
    chosen = f"swapped for exact local duals: {', '.join(names)}" if names else "nothing to swap: backprop works"
    text = f"{report}\n\n{chosen}"
    if trainer.is_global_zero:
        print(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("doctor", f"```\n{text}\n```", trainer.global_step)


@contextmanager
def _unlogged(module: pl.LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing: an examination is not a training step."""
    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    try:
        for name in before:
            setattr(module, name, _nothing)
        yield
    finally:
        for name, value in before.items():
            module.__dict__.pop(name, None)
            if value is not None:
                setattr(module, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
