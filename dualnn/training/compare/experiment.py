"""What an experiment's file says: its arms, seeds, learning rates, and the shorter version of it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from dualnn.engine.errors import unknown_name
from dualnn.training.errors import ExperimentError, RunNameError
from dualnn.training.suggest import elsewhere

Kind = Literal["exact", "estimated", "control"]

# A plain folder name: no separator, no leading dot, nothing that a shell or another file system reads differently.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Arm:
    """One way of training: an overlay on the experiment's configuration.

    Attributes:
        name: The key in the file, and the name of its runs' folders.
        label: What tables call it.
        kind: "exact" gradient, "estimated" gradient, or a "control" that shows what the others are worth.
        config: The full configuration, learning rate included.
        lr: Its learning rate.
        control_of: For a control: the arm that it is to be compared with.
        remark: A sentence for the table's notes.
        fails: It is to fail: that is what the experiment shows.
    """

    name: str
    label: str
    kind: Kind
    config: dict[str, Any]
    lr: float
    control_of: str | None = None
    remark: str = ""
    fails: bool = False


@dataclass(frozen=True)
class Tuning:
    """How learning rates are found: a grid, and seeds that no reported run uses."""

    grid: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """The arms of a comparison and what they share.

    Attributes:
        name: Name of the folder under `logs/`.
        file: The file it was read from.
        question: What it is to find out.
        arms: By name, in the file's order.
        seeds: One run per arm and seed.
        reference: The arm that the verdict measures the others against.
        metric: What is compared, as the model logs it after `test/` and `val/`.
        lr_key: Where the configuration keeps the learning rate.
        tuning: How learning rates are found.
        threads: CPU threads of every run.
        mode: "full", or "fast" for the short version.
    """

    name: str
    file: Path
    question: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    reference: str
    metric: str
    lr_key: str
    tuning: Tuning
    threads: int
    mode: Literal["full", "fast"]

    def only(self, names: Iterable[str]) -> "Experiment":
        """The same experiment with some of its arms.

        Raises:
            UnknownNameError: No arm has that name.
        """
        chosen = {}
        for name in names:
            if name not in self.arms:
                raise unknown_name("arm", name, self.arms)
            chosen[name] = self.arms[name]
        return replace(self, arms=chosen)

    def with_seeds(self, seeds: Iterable[int]) -> "Experiment":
        """The same experiment with other seeds."""
        return replace(self, seeds=tuple(seeds))


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another, section by section.

    Where a section names another `class_path` than the one below, that one's arguments do not shine through.

    Example:
        >>> overlay({"trainer": {"max_epochs": 9, "precision": 32}}, {"trainer": {"max_epochs": 1}})
        {'trainer': {'max_epochs': 1, 'precision': 32}}
        >>> overlay({"class_path": "A", "init_args": {"a": 1}}, {"class_path": "B"})
        {'class_path': 'B'}
    """
    if over.get("class_path", base.get("class_path")) != base.get("class_path"):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def with_value(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with the value at a dotted key set.

    Example:
        >>> with_value({}, "model.lr", 0.1)
        {'model': {'lr': 0.1}}
    """
    for part in reversed(key.split(".")):
        value = {part: value}
    return overlay(config, value)


def plain_name(kind: str, name: object) -> str:
    """Return `name` if it is a plain folder name.

    Raises:
        RunNameError: It is not, so that a run named by it could land outside `logs/`.

    Example:
        >>> plain_name("arm", "activity-k16")
        'activity-k16'
    """
    if not isinstance(name, str):
        raise RunNameError(f"the name of an {kind} must be text, got {name!r}: put it in quotes")
    if not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise RunNameError(
            f"{name!r} cannot name an {kind}: its runs are written to logs/<experiment>/<arm>-s<seed>, so it must be "
            "letters, digits, '_', '-' and '.' only, begin with a letter or digit, and have at most 64 of them"
        )
    return name


def load_experiment(path: str | Path, fast: bool = False) -> Experiment:
    """Read an experiment's file.

    The file's keys: `name`, `question`, `base` (configurations that all arms share, relative to the file), `arms`
    (name: `label`, `kind`, `lr`, `overrides`, `control_of`, `remark`, `fails`), `seeds`, `reference`, `metric`,
    `lr_key`,
    `tune` (`grid`, `seeds`), `threads`, and `fast` (`seeds`, `overrides`) for the short version.

    Args:
        path: The file.
        fast: Take the short version.

    Raises:
        ExperimentError: The file cannot be read, or lacks something, or contradicts itself.
        RunNameError: A name could write outside `logs/`.
        UnknownNameError: A key is misspelt.
    """
    file = Path(path)
    raw = _read_yaml(file)
    _check_keys(f"key in {file}", raw, _KEYS, required=("name", "base", "arms", "seeds", "reference", "tune"))
    short = raw.get("fast", {})
    _check_keys("key of fast", short, ("seeds", "overrides"))
    short = short if fast else {}
    _check_keys("key of tune", raw["tune"], ("grid", "seeds"), required=("grid", "seeds"))

    shared: dict[str, Any] = {}
    for part in _as_list(raw["base"]):
        shared = overlay(shared, _read_yaml(file.parent / part))
    shared = overlay(shared, raw.get("overrides", {}))

    name = plain_name("experiment", raw["name"])
    lr_key = raw.get("lr_key", "model.init_args.optimizer.init_args.lr")
    if not isinstance(raw["arms"], Mapping) or not raw["arms"]:
        raise ExperimentError(f"{file}: arms must be a mapping of names to arms, and have at least one")
    arms = {key: _arm(key, arm, shared, lr_key, short.get("overrides", {})) for key, arm in raw["arms"].items()}
    for arm in arms.values():
        if arm.control_of is not None and arm.control_of not in arms:
            raise unknown_name(f"arm in control_of of {arm.name!r}", arm.control_of, arms)
    if raw["reference"] not in arms:
        raise unknown_name("arm in reference", raw["reference"], arms)
    seeds = _seeds(f"{file}: seeds", short.get("seeds", raw["seeds"]))
    tuning = Tuning(tuple(float(lr) for lr in raw["tune"]["grid"]), _seeds(f"{file}: tune.seeds", raw["tune"]["seeds"]))
    if not tuning.grid or list(tuning.grid) != sorted(set(tuning.grid)):
        raise ExperimentError(f"{file}: tune.grid must be rising learning rates, got {list(tuning.grid)}")
    if common := set(tuning.seeds) & set(raw["seeds"]):
        raise ExperimentError(
            f"{file}: {sorted(common)} stand in tune.seeds and in seeds, so the learning rates would be chosen on runs "
            "that are reported: take others"
        )
    return Experiment(
        name=name,
        file=file,
        question=raw.get("question", ""),
        arms=arms,
        seeds=seeds,
        reference=raw["reference"],
        metric=raw.get("metric", "acc"),
        lr_key=lr_key,
        tuning=tuning,
        threads=raw.get("threads", 1),
        mode="fast" if fast else "full",
    )


_KEYS = (
    "name",
    "question",
    "base",
    "overrides",
    "arms",
    "seeds",
    "reference",
    "metric",
    "lr_key",
    "tune",
    "threads",
    "fast",
)
_ARM_KEYS = ("label", "kind", "lr", "overrides", "control_of", "remark", "fails")


def _arm(key: object, raw: Any, shared: Mapping[str, Any], lr_key: str, last: Mapping[str, Any]) -> Arm:
    name = plain_name("arm", key)
    _check_keys(f"key of arm {name!r}", raw, _ARM_KEYS, required=("kind", "lr"))
    if raw["kind"] not in get_args(Kind):
        raise unknown_name(f"kind of arm {name!r}", raw["kind"], get_args(Kind))
    if not isinstance(raw["lr"], int | float) or not raw["lr"] > 0:
        raise ExperimentError(f"arm {name!r}: lr must be a positive number, got {raw['lr']!r}")
    config = overlay(overlay(shared, raw.get("overrides", {})), last)
    return Arm(
        name=name,
        label=raw.get("label", name),
        kind=raw["kind"],
        config=with_value(config, lr_key, float(raw["lr"])),
        lr=float(raw["lr"]),
        control_of=raw.get("control_of"),
        remark=raw.get("remark", ""),
        fails=raw.get("fails", False),
    )


def _seeds(what: str, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ExperimentError(f"{what} must be a list of integers, at least one, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ExperimentError(f"{what} must be different integers, got {seeds}")
    return tuple(seeds)


def _check_keys(kind: str, section: Any, known: Iterable[str], required: Iterable[str] = ()) -> None:
    if not isinstance(section, Mapping):
        raise ExperimentError(f"{kind}: expected keys and values, got {section!r}")
    for key in section:
        if key not in known:
            raise unknown_name(kind, key, known)
    for key in required:
        if key not in section:
            raise ExperimentError(f"{kind}: {key!r} is missing")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ExperimentError(f"cannot read {file} ({error.strerror}).{elsewhere(str(file))}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExperimentError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ExperimentError(f"{file}: expected keys and values, got {type(content).__name__}")
    return content
