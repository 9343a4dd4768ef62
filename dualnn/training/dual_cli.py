"""LightningCLI with a section `dual:`: what the commands and every run of a comparison build on."""

import logging
import sys
import warnings
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import dualnn.data
import dualnn.models  # noqa: F401  (imported so that YAML may name their classes without the module)
import dualnn.signals
from dualnn.engine.errors import DualnnError
from dualnn.training.callback import DualPropagation
from dualnn.training.suggest import SuggestingParser


def dual_propagation(
    signal: dualnn.signals.Signal | None = None,
    where: Literal["all", "auto"] | list[str] = "all",
    seed: int | None = None,
) -> pl.Callback:
    """The callback that a `dual:` section asks for; without one, a callback that does nothing.

    Args:
        signal: Where the gradient comes from, for the whole step.
        where: "all", or names or globs of modules that run as exact local duals inside backprop.
        seed: Seed of the random directions; by default that of seed_everything.
    """
    if signal is None and where == "all" and seed is None:
        return pl.Callback()  # no section `dual:` at all: stock training
    return DualPropagation(signal, where, seed)


class DualCLI(LightningCLI):
    """LightningCLI with a section `dual:` (the arguments of `DualPropagation`) and lighter defaults.

    TensorBoard logs go to `logs/`, the progress bar shows on a terminal only, and no sanity validation is run.

    Args:
        args: Command line, or a dict of sections; None reads `sys.argv`.
        run: False only builds `model`, `datamodule` and `trainer`.
        save_config: Write the full configuration beside the logs.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, save_config: bool = True) -> None:
        super().__init__(
            args=args,
            run=run,
            parser_class=SuggestingParser,
            # Abbreviated options are a typo that happens to be a prefix.
            parser_kwargs={"prog": "dualnn", "allow_abbrev": False, "description": "Train by backprop or without it."},
            trainer_defaults=trainer_defaults(),
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback if save_config else None,
            save_config_kwargs={"overwrite": True},
        )

    def after_fit(self) -> None:
        """Say in a line how it ended and where the logs are."""
        metrics = sorted(self.trainer.callback_metrics.items())
        said = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics)
        logs = f"; logs in {self.trainer.log_dir}" if self.trainer.log_dir else ""
        print(f"{self.trainer.global_step} steps: {said}{logs}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `dual:`."""
        parser.add_lightning_class_args(dual_propagation, "dual")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's, without a warning about `sys.argv` when `args` are given by `main`."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)


def trainer_defaults() -> dict[str, Any]:
    """What the Trainer does unless told otherwise.

    Example:
        >>> trainer_defaults()["num_sanity_val_steps"]
        0
    """
    return {
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            # Lightning's placeholder `hp_metric` would hide the real metrics in TensorBoard's HPARAMS.
            "init_args": {"save_dir": "logs", "name": "fit", "default_hp_metric": False},
        },
        "devices": 1,  # a whole-step signal needs one process; and "auto" starts one per GPU
        "num_sanity_val_steps": 0,
        "enable_progress_bar": sys.stderr.isatty(),
        "log_every_n_steps": 10,
    }


def quiet_lightning() -> None:
    """Leave out what Lightning says about itself and what is no mistake here."""
    # Lightning 2.6 calls a deprecated check of torch's own pytree: nothing that a user can mend.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # Small data that lie in memory are fetched fastest without worker processes.
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("\U0001f4a1 Tip", "TPU available"))


def named_error(error: BaseException | None) -> DualnnError | None:
    """The library's own error among an error and its causes (jsonargparse wraps what a constructor raises)."""
    while error is not None and not isinstance(error, DualnnError):
        error = error.__cause__ or error.__context__
    return error
