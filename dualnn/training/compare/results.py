"""The results of a comparison on disk: complete after every run, never half written."""

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch

from dualnn import __version__
from dualnn.training.compare.experiment import Arm, Experiment


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old content or the new, nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the results from others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Results:
    """Runs and costs by arm, kept in `results.json`.

    An arm that is not run again keeps its earlier figures, as long as its configuration and the mode are the same.

    Args:
        experiment: The experiment (all arms, whichever are run).
        path: Where the file lies.
    """

    def __init__(self, experiment: Experiment, path: Path) -> None:
        self.experiment = experiment
        self.path = path
        self.arms: dict[str, dict[str, Any]] = {}
        earlier = _read(path)
        if earlier.get("mode") == experiment.mode:
            for name, arm in experiment.arms.items():
                kept = earlier.get("arms", {}).get(name)
                if kept is not None and kept.get("config") == fingerprint(arm):
                    self.arms[name] = kept

    def start(self, arm: Arm) -> None:
        """Forget what was known of an arm: it is run again."""
        self.arms[arm.name] = {"config": fingerprint(arm), "lr": arm.lr, "costs": {}, "runs": {}, "failure": None}
        self.write()

    def add_costs(self, arm: Arm, costs: dict[str, float]) -> None:
        """Take in what a step costs."""
        self.arms[arm.name]["costs"].update(costs)
        self.write()

    def add_run(self, arm: Arm, seed: int, run: dict[str, Any]) -> None:
        """Take in a finished run."""
        self.arms[arm.name]["runs"][str(seed)] = run
        self.write()

    def fail(self, arm: Arm, failure: dict[str, Any]) -> None:
        """Mark an arm as failed (`error`, `step`, `seed`); its finished runs stay."""
        self.arms[arm.name]["failure"] = failure
        self.write()

    def failed(self, arm: Arm) -> bool:
        """Whether the arm has failed."""
        return bool(self.arms.get(arm.name, {}).get("failure"))

    def write(self) -> None:
        """Write the file."""
        order = [name for name in self.experiment.arms if name in self.arms]
        content = {
            "experiment": self.experiment.name,
            "mode": self.experiment.mode,
            "metric": self.experiment.metric,
            "made_with": versions(self.experiment.threads),
            "arms": {name: self.arms[name] for name in order},
        }
        write_atomically(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def fingerprint(arm: Arm) -> str:
    """A hash of an arm's full configuration.

    Example:
        >>> fingerprint(Arm("a", "a", "exact", {"x": 1}, 0.1)) == fingerprint(Arm("a", "b", "exact", {"x": 1}, 0.1))
        True
    """
    return hashlib.blake2b(json.dumps(arm.config, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def versions(threads: int) -> dict[str, str | int]:
    """What the figures were made with."""
    return {
        "dualnn": __version__,
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}  # no earlier results, or not ours: begin anew
    return content if isinstance(content, dict) else {}
