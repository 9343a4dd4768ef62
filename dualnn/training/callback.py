"""The callback that trains an unmodified LightningModule with another signal than backprop."""

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from dualnn.engine.errors import UnpicklableError, unknown_name
from dualnn.engine.names import matching
from dualnn.layers.held import holders, unspawnable
from dualnn.layers.local import LocalCall
from dualnn.layers.local_swap import LocalForward, restore_forward
from dualnn.signals import Backprop, Signal, signal_loss
from dualnn.training import automatic
from dualnn.training.errors import ResumeError, TrainingSetupError
from dualnn.training.finite import check_finite_loss
from dualnn.training.keys import step_key


class _SignalStep:
    """What stands in `trainer.strategy.training_step` while a run lasts (a class, so that it pickles)."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, signal: Signal, seed: int) -> None:
        self.inner = trainer.strategy.training_step
        self.trainer = trainer
        self.module = module
        self.signal = signal
        self.seed = seed
        self.active = True
        self.calls_this_batch = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = partial(self.inner, *args, **kwargs)
        if not self.active:
            return step()
        self.calls_this_batch += 1
        if self.calls_this_batch > 1 and not isinstance(self.signal, Backprop):
            raise _several_calls(self.signal, self.trainer.optimizers[0])
        # total_batch_idx is saved in every checkpoint: a resumed run goes on with the next key.
        key = step_key(self.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.trainer.global_rank)
        return signal_loss(step, self.module, self.signal, key)


class DualPropagation(pl.Callback):
    r"""Train an unmodified LightningModule by dual numbers: the whole step, or named modules inside backprop.

    *Whole step* (``where="all"``): the user's `training_step`, with the precision plugin's context around it, runs
    inside `dualnn.signals.signal_loss`. The loss that Lightning receives has a backward that writes the signal's
    gradient; accumulation, clipping, the optimizer, mixed precision and checkpoints stay stock Lightning. All random
    directions of a step follow from :math:`\mathrm{key}(\mathrm{seed}, \mathrm{batch}, \mathrm{rank})`, never from
    the global generators: the batches, the initial weights and dropout equal those of a run by backprop, and a
    resumed run equals the uninterrupted one bit for bit.

    *Inside backprop* (``where=[…]``): the named modules run on dual numbers, and backprop takes their exact local
    derivatives. This is the way to train a network of which a part cannot be backpropagated. ``where="auto"`` asks
    `dualnn.diagnosis.doctor` before the first batch which modules those are, prints what it found (TensorBoard keeps
    it as text), and swaps those that have an exact remedy; what is too wide for one gets an unbiased estimate, with its
    variance said; any other failure ends the run with its remedy. With several processes all of them swap what one
    of them found.

    The module is as before when `fit` returns or raises. A loss that is nan or infinite ends the run.

    Args:
        signal: Where the gradient comes from, for ``where="all"``. With names it stays None (or a `Backprop`).
        where: ``"all"``; or names of submodules, with ``*``, ``?`` and ``[…]`` as in file names (``["net.act*"]``);
            or ``"auto"``.
        seed: Seed of the directions. None takes the checkpoint's on resuming, else that of `seed_everything`, else 0.

    Raises:
        TrainingSetupError: The arguments contradict each other, or do not go with the trainer or module (manual
            optimization, several processes, an optimizer that calls the step more than once).
        ResumeError: `seed` is given and is not the checkpoint's.
        UnpicklableError: A strategy that spawns processes, and a module that holds a lambda or a closure.
        NonFiniteLossError: The loss became nan or infinite.

    Example:
        >>> from dualnn.signals import ForwardGradient
        >>> from dualnn.training import DualPropagation
        >>> DualPropagation(ForwardGradient(tangents=16)).where
        'all'
        >>> DualPropagation(where=["net.act*"]).where
        ['net.act*']
    """

    def __init__(
        self,
        signal: Signal | None = None,
        where: Literal["all", "auto"] | list[str] = "all",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.where = _checked_where(where)
        self.signal = _checked_signal(signal, self.where)
        self.seed = seed
        self._resumed: dict[str, Any] = {}
        self._seed_in_use = 0
        self._step: _SignalStep | None = None
        self._chosen: dict[str, int | None] = {}
        self._swapped: dict[str, LocalForward] = {}
        self._calls: dict[str, LocalCall] = {}
        self._pending = False
        self._started = False  # fit, in this process

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the signal in place (the module is on its device and the checkpoint is loaded by now)."""
        self._started = True
        self._check_resumed()
        self._seed_in_use = self._resolve_seed()
        if self.signal is not None:
            _check_trainer(trainer, pl_module, self.signal)
            self._step = _SignalStep(trainer, pl_module, self.signal, self._seed_in_use)
            # Lightning looks the method up by name for every batch, so an instance attribute is honoured.
            trainer.strategy.training_step = self._step  # type: ignore[method-assign]
        if self.where == "auto":
            # A resumed run keeps what the first one chose: another batch might look different to the doctor.
            self._pending = "swapped" not in self._resumed
            self._swap(pl_module, self._resumed.get("swapped", {}))
        elif self.where != "all":
            self._swap(pl_module, dict.fromkeys(matching(pl_module, self.where)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A new batch: the step may be called once again; before the very first, the doctor's examination."""
        if self._pending:
            self._pending = False
            report = automatic.examine_first(trainer, pl_module, batch, batch_idx)
            self._swap(pl_module, automatic.to_swap(report))
            automatic.tell(trainer, report, self._chosen)
        if self._step is not None:
            self._step.calls_this_batch = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """A loss that is not finite ends the run here, before it reaches a weight."""
        check_finite_loss(trainer, loss)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The run is over."""
        self._undo(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The run broke; Lightning calls no `teardown` then."""
        self._undo(trainer, pl_module)
        if not self._started and isinstance(exception, (pickle.PicklingError, AttributeError, TypeError)):
            # No process could be spawned. Python's own message names a function at most; here its module is known.
            if held := holders(pl_module):
                raise UnpicklableError(unspawnable(held)) from exception

    def _undo(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step is not None:
            # Inactive first: if somebody wrapped our wrapper, it stays in the chain and only passes calls on.
            self._step.active = False
            if vars(trainer.strategy).get("training_step") is self._step:
                del trainer.strategy.training_step
            self._step = None
        if self._swapped:
            restore_forward(pl_module)
            self._swapped = {}

    def _swap(self, module: pl.LightningModule, chosen: Mapping[str, int | None]) -> None:
        self._chosen = dict(chosen)
        self._swapped = automatic.swap(module, chosen, self._seed_in_use)
        for name, calls in self._resumed.get("calls", {}).items():
            if name in self._swapped:
                self._swapped[name].local.calls = calls
        self._calls = {name: forward.local for name, forward in self._swapped.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: enough to continue with the same directions, and to notice other settings."""
        own = self.signal.state_dict() if self.signal is not None else {}
        state = {"seed": self._seed_in_use, "signal": describe(self.signal), "where": self.where, "signal_state": own}
        if self.where != "all":
            # The random directions of a swapped module, and when its structure is probed, follow from its calls.
            state["calls"] = {name: local.calls for name, local in self._calls.items()}
        return state | {"swapped": self._chosen} if self.where == "auto" else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's settings; they are compared when a fit starts."""
        self._resumed = dict(state_dict)

    def _resolve_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        if "seed" in self._resumed:
            return int(self._resumed["seed"])
        return int(os.environ.get("PL_GLOBAL_SEED", 0))  # where seed_everything leaves its seed

    def _check_resumed(self) -> None:
        if not self._resumed:
            return
        if self.seed is not None and self.seed != self._resumed["seed"]:
            raise ResumeError(
                f"the checkpoint was made with DualPropagation(seed={self._resumed['seed']}), this run says "
                f"seed={self.seed}: leave seed out to continue with the checkpoint's"
            )
        before = (self._resumed["signal"], self._resumed["where"])
        now = (describe(self.signal), self.where)
        if before != now:
            # Changing the signal on purpose is a method (start with backprop, go on without), so no error.
            warnings.warn(
                f"the checkpoint was trained with signal={before[0]}, where={before[1]!r}; this run continues with "
                f"signal={now[0]}, where={now[1]!r}",
                stacklevel=2,
            )
        elif self.signal is not None:
            self.signal.load_state_dict(self._resumed["signal_state"])


def describe(signal: Signal | None) -> str:
    """A signal as one line that is the same in every process: class and public settings.

    Example:
        >>> from dualnn.signals import Backprop
        >>> describe(Backprop(checkpoint=True))
        'Backprop(checkpoint=True)'
    """
    if signal is None:
        return "None"
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(signal).items() if not name.startswith("_"))
    return f"{type(signal).__name__}({settings})"


def _checked_where(where: str | Sequence[str]) -> Literal["all", "auto"] | list[str]:
    if where == "all":
        return "all"
    if where == "auto":
        return "auto"
    if isinstance(where, str):
        if "." in where or any(sign in where for sign in "*?["):
            raise TrainingSetupError(f"where={where!r} looks like the name of a module: give a list, where=[{where!r}]")
        raise unknown_name("value of where", where, ("all", "auto", "[names or globs]"))
    names = list(where)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TrainingSetupError(f'where={where!r}: give at least one name or glob of a module, or where="all"')
    return names


def _checked_signal(signal: Signal | None, where: str | list[str]) -> Signal | None:
    if signal is not None and not isinstance(signal, Signal):
        raise TrainingSetupError(
            f"signal must be a signal, such as dualnn.signals.ForwardGradient(tangents=16), got {signal!r}"
        )
    if where == "all" and signal is None:
        raise TrainingSetupError(
            'where="all" replaces backprop in the whole step and needs a signal, for example '
            'DualPropagation(ForwardGradient(tangents=16)); to swap single modules, name them: where=["net.act*"]'
        )
    if where != "all" and not isinstance(signal, Backprop | None):
        raise TrainingSetupError(
            f"where={where!r} swaps modules inside backprop, and {describe(signal)} replaces backprop altogether: "
            'leave signal out, or use where="all"'
        )
    return signal


def _check_trainer(trainer: pl.Trainer, module: pl.LightningModule, signal: Signal) -> None:
    """Refuse what would train on a wrong gradient. `Backprop` leaves the step as it is, so it goes with anything."""
    if isinstance(signal, Backprop):
        return
    if not module.automatic_optimization:
        raise TrainingSetupError(
            f"{type(module).__name__} optimizes manually: its training_step calls backward itself, and a whole-step "
            "signal differentiates the loss that training_step returns. Use automatic optimization, or "
            "dualnn.signals.signal_loss inside your step"
        )
    if trainer.world_size > 1:
        # DistributedDataParallel averages gradients from hooks of a backward pass that does not take place here.
        raise TrainingSetupError(
            f"whole-step signals on several processes are not built yet (this trainer has {trainer.world_size}): use "
            "devices=1, num_nodes=1, or where=[…], which stays inside backprop"
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise _several_calls(signal, optimizer)


def _several_calls(signal: Signal, optimizer: Any) -> TrainingSetupError:
    return TrainingSetupError(
        f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__} evaluates the step several times per batch and "
        f"compares the results, which {describe(signal)} does not support: use an optimizer that needs one gradient "
        "per batch (SGD, Adam, …), or Backprop()"
    )
