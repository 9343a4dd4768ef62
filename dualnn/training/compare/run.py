"""Train one arm with one seed, and keep what a comparison needs to know of it."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils._pytree import tree_leaves

from dualnn.engine.errors import unknown_name
from dualnn.training.compare.experiment import Arm, Experiment, overlay, plain_name
from dualnn.training.dual_cli import DualCLI, named_error
from dualnn.training.errors import ExperimentError, RunError, RunNameError, UsageError
from dualnn.training.finite import FiniteLoss

# Quiet, and nothing on disk that is not asked for: these hold for every run of a comparison.
_TRAINER = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "devices": 1,
    "logger": False,
}


def build(arm: Arm, seed: int, trainer: dict[str, Any], callbacks: list[pl.Callback]) -> DualCLI:
    """Seed everything, then make model, data and trainer of an arm.

    Raises:
        UsageError: The arm's configuration is wrong.
    """
    sections = {"seed_everything": seed, "trainer": {**_TRAINER, **trainer}}
    try:
        cli = DualCLI(overlay(arm.config, sections), run=False, save_config=False)
    except Exception as error:
        if (ours := named_error(error)) is None:
            raise
        raise UsageError(f"arm {arm.name!r}: {ours}") from error
    cli.trainer.callbacks.extend([FiniteLoss(), *callbacks])  # type: ignore[attr-defined]  # set by a connector
    return cli


def run_folder(experiment: Experiment, arm: Arm, seed: int, logs: Path) -> Path:
    """The folder of a run, `logs/<experiment>/<arm>-s<seed>`.

    Raises:
        RunNameError: It would lie outside `logs` (by its name, or because a link leads away).
    """
    folder = logs / plain_name("experiment", experiment.name) / f"{plain_name('arm', arm.name)}-s{seed}"
    if not folder.resolve().is_relative_to(logs.resolve()):
        raise RunNameError(f"{folder} leads to {folder.resolve()}, outside {logs}: remove the link")
    return folder


class Stopwatch(pl.Callback):
    """Seconds spent on training: from its first batch to its last, without validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self._start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause."""
        self._stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on."""
        self._start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop."""
        self._stop()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the queue of the last batches is training too
            self.seconds += time.perf_counter() - self._since
            self._since = None


class Fingerprints(pl.Callback):
    """Hashes of the initial weights and of the batches in their order: were the arms really given the same?"""

    def __init__(self) -> None:
        self.weights: dict[str, str] = {}
        self._batches = hashlib.blake2b(digest_size=8)

    @property
    def batches(self) -> str:
        """Hash of all batches so far."""
        return self._batches.hexdigest()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the weights that training begins with."""
        self.weights = {
            name: hashlib.blake2b(_bytes(value), digest_size=8).hexdigest()
            for name, value in pl_module.state_dict().items()
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch."""
        for leaf in tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                self._batches.update(_bytes(leaf))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def train(experiment: Experiment, arm: Arm, seed: int, logs: Path | None) -> dict[str, Any]:
    """Train and test an arm with one seed.

    Args:
        experiment: What the arm belongs to.
        arm: The arm.
        seed: Seed of weights, batches and directions.
        logs: Where TensorBoard logs go; None writes none.

    Returns:
        The run's figures: `test` and `val` (the metric), `val_loss`, `steps`, `seconds`, and fingerprints of what
        went in. Without logs there is no test: tuning looks at validation data only.

    Raises:
        RunError: It broke; the cause may be a `NonFiniteLossError`.
        UsageError: The arm's configuration is wrong.
    """
    watch, prints = Stopwatch(), Fingerprints()
    cli = build(arm, seed, {}, [watch, prints])
    logger = None
    if logs is not None:
        logger = _logger(experiment, arm, seed, logs)
        cli.trainer.loggers = [logger]
    figures: dict[str, Any] = {}
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        steps = cli.trainer.global_step
        figures["val"] = _metric(cli.trainer, f"val/{experiment.metric}")
        figures["val_loss"] = _metric(cli.trainer, "val/loss")
        if logger is not None:
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            figures["test"] = _metric(cli.trainer, f"test/{experiment.metric}")
    except Exception as error:
        raise RunError(cli.trainer.global_step, error) from error
    figures |= {"steps": steps, "seconds": watch.seconds}
    if logger is not None:
        logger.log_metrics({f"figure/{name}": figures[name] for name in _FIGURES}, steps)
        logger.finalize("success")
    return figures | {"batches": prints.batches, "weights": prints.weights}


def _metric(trainer: pl.Trainer, name: str) -> float:
    if name not in trainer.callback_metrics:
        raise unknown_name("metric of the model", name, trainer.callback_metrics)
    value = float(trainer.callback_metrics[name])
    if not math.isfinite(value):
        raise ExperimentError(f"{name} is {value}: the comparison needs a number")
    return value


_FIGURES = ("test", "val", "val_loss", "steps", "seconds")


def _logger(experiment: Experiment, arm: Arm, seed: int, logs: Path) -> TensorBoardLogger:
    folder = run_folder(experiment, arm, seed, logs)
    for old in folder.glob("events.out.tfevents.*"):  # an earlier run's curves would continue in this one's
        old.unlink()
    # Without `default_hp_metric` the HPARAMS tab shows these figures and no placeholder.
    logger = TensorBoardLogger(str(logs), name=experiment.name, version=folder.name, default_hp_metric=False)
    settings = {"arm": arm.name, "kind": arm.kind, "lr": arm.lr, "seed": seed, "mode": experiment.mode}
    logger.log_hyperparams(settings, {f"figure/{name}": float("nan") for name in _FIGURES})
    curves = {name: ["Multiline", [f"train/{name}", f"val/{name}"]] for name in (experiment.metric, "loss")}
    logger.experiment.add_custom_scalars({experiment.name: curves})
    return logger
