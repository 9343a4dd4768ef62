"""Find each arm's learning rate on validation data, and say where the grid was too short."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import yaml

from dualnn.training.compare.experiment import Arm, Experiment, with_value
from dualnn.training.compare.run import train
from dualnn.training.errors import ExperimentError, NonFiniteLossError


@dataclass(frozen=True)
class Tuned:
    """The grid's outcome for one arm: validation metric by learning rate, None where training failed."""

    arm: Arm
    scores: dict[float, float | None]

    @property
    def best(self) -> float | None:
        """The best learning rate, the middle one of equals (a plateau); None if all failed."""
        finished = {lr: score for lr, score in self.scores.items() if score is not None}
        equals = sorted(lr for lr, score in finished.items() if score == max(finished.values()))
        return equals[len(equals) // 2] if equals else None

    @property
    def at_edge(self) -> bool:
        """Whether the best lies at an end of the grid, so that a better one may lie outside."""
        return self.best in (min(self.scores), max(self.scores))


def tune(experiment: Experiment, arms: Sequence[Arm], say: Callable[[str], None]) -> list[Tuned]:
    """Train each arm once with each learning rate of the grid.

    Args:
        experiment: The experiment; its tuning seed is used, which no reported run has.
        arms: Which arms.
        say: Takes a line for each arm.

    Raises:
        UsageError: An arm's configuration is wrong.
    """
    outcome = []
    for arm in arms:
        scores: dict[float, float | None] = {}
        for lr in experiment.tuning.grid:
            candidate = replace(arm, lr=lr, config=with_value(arm.config, experiment.lr_key, lr))
            try:
                scores[lr] = train(experiment, candidate, experiment.tuning.seed, logs=None)["val"]
            except NonFiniteLossError:
                scores[lr] = None  # too large a learning rate: that is what the grid is to find out
        outcome.append(Tuned(arm, scores))
        say(line(outcome[-1]))
    return outcome


def line(tuned: Tuned) -> str:
    """One arm's grid, its best learning rate in brackets.

    Example:
        >>> print(line(Tuned(Arm("a", "a", "exact", {}, 0.1), {0.01: 0.9, 0.1: 0.95, 1.0: None})))
        a: 0.01 90.0 %, [0.1 95.0 %], 1 diverged; committed 0.1
    """
    parts = []
    for lr, score in tuned.scores.items():
        part = f"{lr:g} diverged" if score is None else f"{lr:g} {100 * score:.1f} %"
        parts.append(f"[{part}]" if lr == tuned.best else part)
    edge = "; AT THE EDGE of the grid: extend it" if tuned.at_edge else ""
    changed = "" if tuned.best == tuned.arm.lr else " (differs)"
    return f"{tuned.arm.name}: {', '.join(parts)}; committed {tuned.arm.lr:g}{changed}{edge}"


def proposal(experiment: Experiment, outcome: Sequence[Tuned]) -> str:
    """What to write into the experiment's file, as YAML.

    Raises:
        ExperimentError: No learning rate of the grid trained an arm.
    """
    hopeless = [tuned.arm.name for tuned in outcome if tuned.best is None]
    if hopeless:
        raise ExperimentError(f"every learning rate of the grid diverged for {', '.join(hopeless)}: extend tune.grid downwards")
    arms = {tuned.arm.name: {"lr": tuned.best} for tuned in outcome}
    head = f"# Found by `dualnn compare --config {experiment.file} --tune`; copy the lr of each arm into that file.\n"
    return head + yaml.safe_dump({"arms": arms}, sort_keys=False)
