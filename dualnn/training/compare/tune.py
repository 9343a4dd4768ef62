"""Find each arm's learning rate on validation data, and say where the grid was too short."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import yaml

from dualnn.training.compare.experiment import Arm, Experiment, with_value
from dualnn.training.compare.run import train
from dualnn.training.compare.status import Status
from dualnn.training.errors import ExperimentError, RunError


@dataclass(frozen=True)
class Tuned:
    """The grid's outcome for one arm.

    The lowest validation loss decides. Accuracy on a few hundred samples has plateaus, and chance picks from them; a
    loss is smooth. A learning rate with which one seed failed is out.

    Attributes:
        arm: The arm.
        outcomes: By learning rate: mean validation loss and metric, or None where training failed.
    """

    arm: Arm
    outcomes: dict[float, tuple[float, float] | None]

    @property
    def best(self) -> float | None:
        """The best learning rate; None if all failed."""
        losses = {lr: outcome[0] for lr, outcome in self.outcomes.items() if outcome is not None}
        return min(losses, key=losses.__getitem__) if losses else None

    @property
    def at_edge(self) -> bool:
        """Whether the best lies at an end of the grid, so that a better one may lie outside."""
        return self.best in (min(self.outcomes), max(self.outcomes))


def tune(experiment: Experiment, arms: Sequence[Arm], status: Status) -> list[Tuned]:
    """Train each arm with each learning rate of the grid.

    Args:
        experiment: The experiment; its tuning seeds are used, which no reported run has.
        arms: Which arms.
        status: Shows what is going on, and a line for each finished arm.

    Raises:
        UsageError: An arm's configuration is wrong.
    """
    found = []
    for arm in arms:
        outcomes: dict[float, tuple[float, float] | None] = {}
        for lr in experiment.tuning.grid:
            candidate = replace(arm, lr=lr, config=with_value(arm.config, experiment.lr_key, lr))
            runs = []
            for seed in experiment.tuning.seeds:
                status.doing(f"{arm.label}, learning rate {lr:g}, seed {seed}")
                try:
                    runs.append(train(experiment, candidate, seed, logs=None))
                except RunError:
                    break  # mostly too large a learning rate: that is what the grid is to find out
                finally:
                    status.advance()
            complete = len(runs) == len(experiment.tuning.seeds)
            outcomes[lr] = (fmean(r["val_loss"] for r in runs), fmean(r["val"] for r in runs)) if complete else None
        found.append(Tuned(arm, outcomes))
        status.say(line(found[-1]))
    return found


def line(tuned: Tuned) -> str:
    """One arm's grid, its best learning rate in brackets.

    Example:
        >>> print(line(Tuned(Arm("a", "a", "exact", {}, 0.1), {0.01: (0.4, 0.9), 0.1: (0.1, 0.95), 1.0: None})))
        a: 0.01 0.400 (90.0 %), [0.1 0.100 (95.0 %)], 1 failed; committed 0.1
    """
    parts = []
    for lr, outcome in tuned.outcomes.items():
        part = f"{lr:g} failed" if outcome is None else f"{lr:g} {outcome[0]:.3f} ({100 * outcome[1]:.1f} %)"
        parts.append(f"[{part}]" if lr == tuned.best else part)
    edge = "; AT THE EDGE of the grid: extend it" if tuned.at_edge else ""
    changed = "" if tuned.best == tuned.arm.lr else " (differs)"
    return f"{tuned.arm.name}: {', '.join(parts)}; committed {tuned.arm.lr:g}{changed}{edge}"


def proposal(experiment: Experiment, found: Sequence[Tuned]) -> str:
    """What to write into the experiment's file, as YAML.

    Raises:
        ExperimentError: No learning rate of the grid trained an arm.
    """
    hopeless = [tuned.arm.name for tuned in found if tuned.best is None]
    if hopeless:
        names = ", ".join(hopeless)
        raise ExperimentError(f"every learning rate of the grid failed for {names}: extend tune.grid downwards")
    arms = {tuned.arm.name: {"lr": tuned.best} for tuned in found}
    head = f"# Found by `dualnn compare --config {experiment.file} --tune`; copy the lr of each arm into that file.\n"
    return head + yaml.safe_dump({"arms": arms}, sort_keys=False)
