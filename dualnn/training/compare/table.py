"""Rows and tables of a comparison, as Markdown that reads well in a terminal too."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from dualnn.training.compare.experiment import Arm, Experiment


@dataclass(frozen=True)
class Row:
    """An arm's figures over its seeds; None where there is none.

    Attributes:
        arm: The arm.
        score: Mean of the test metric over the finished runs.
        spread: Its standard deviation over seeds (n - 1), None with fewer than two.
        finished: How many runs finished.
        steps: Optimizer steps of a run.
        seconds: Mean seconds of training.
        forwards: Operations of a step, in forward passes.
        live_bytes: Most bytes of live tensors in a step.
        resident_bytes: Peak resident size of a fresh process.
        idle_bytes: The same of a process that trains nothing.
        taught: Share of the trainable numbers that a step gives any gradient.
        failure: What ended the arm: `error`, `step`, `seed`.
    """

    arm: Arm
    score: float | None = None
    spread: float | None = None
    finished: int = 0
    steps: int | None = None
    seconds: float | None = None
    forwards: float | None = None
    live_bytes: float | None = None
    resident_bytes: float | None = None
    idle_bytes: float | None = None
    taught: float | None = None
    failure: dict[str, Any] | None = field(default=None)


def row(arm: Arm, record: dict[str, Any]) -> Row:
    """Summarise what `results.json` holds of an arm."""
    runs, costs = list(record["runs"].values()), record["costs"]
    scores = [run["test"] for run in runs]
    return Row(
        arm=arm,
        score=fmean(scores) if scores else None,
        spread=stdev(scores) if len(scores) > 1 else None,
        finished=len(runs),
        steps=runs[0]["steps"] if runs else None,
        seconds=fmean(run["seconds"] for run in runs) if runs else None,
        forwards=costs.get("forwards"),
        live_bytes=costs.get("live_bytes"),
        resident_bytes=costs.get("resident_bytes"),
        idle_bytes=costs.get("idle_bytes"),
        taught=costs.get("taught"),
        failure=record["failure"],
    )


_COLUMNS = ("arm", "test accuracy", "lr", "steps", "seconds", "F a step", "live bytes", "resident", "taught")


def tables(experiment: Experiment, rows: Sequence[Row]) -> str:
    """Two tables, exact signals and estimated ones, and what the columns mean.

    Example:
        >>> from dualnn.training.compare.experiment import Arm
        >>> print(table([Row(Arm("a", "backprop", "exact", {}, 0.1), score=0.975, finished=1, steps=9)]))
        | arm      | test accuracy | lr  | steps | seconds | F a step | live bytes | resident | taught |
        |----------|---------------|-----|-------|---------|----------|------------|----------|--------|
        | backprop | 97.5 %        | 0.1 | 9     | -       | -        | -          | -        | -      |
    """
    exact = [r for r in rows if r.arm.kind != "estimated"]
    estimated = [r for r in rows if r.arm.kind == "estimated"]
    parts = []
    if exact:
        parts += ["## Exact signals (controls marked *)", table(exact)]
    if estimated:
        parts += ["## Estimated signals", table(estimated)]
    seeds = f"{len(experiment.seeds)} seeds" if len(experiment.seeds) > 1 else "one seed: no spread"
    notes = [
        f"Test accuracy: mean ± standard deviation over {seeds}. Seconds: training without validation, "
        f"{experiment.threads} thread{'s' if experiment.threads > 1 else ''}. F: operations of a step in forward "
        "passes of the same model. Live bytes: most bytes of tensors made in a step and alive at once. Resident: peak "
        f"of a fresh process that trains a few steps ({_idle(rows)} of it are the libraries). Taught: share of the "
        "trainable numbers that a step gives any gradient."
    ]
    notes += [f"{_label(r)}: {r.arm.remark}" for r in rows if r.arm.remark]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def table(rows: Sequence[Row]) -> str:
    """Rows as an aligned Markdown table."""
    cells = [_COLUMNS, *(_cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    lines = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _idle(rows: Sequence[Row]) -> str:
    return size(next((r.idle_bytes for r in rows if r.idle_bytes), None))


def _label(r: Row) -> str:
    return r.arm.label + (" *" if r.arm.kind == "control" else "")


def _cells(r: Row) -> tuple[str, ...]:
    return (
        _label(r),
        _score(r),
        f"{r.arm.lr:g}",
        _or_dash(r.steps, "d"),
        _or_dash(r.seconds, ".1f"),
        _or_dash(r.forwards, ".1f"),
        size(r.live_bytes),
        size(r.resident_bytes),
        "-" if r.taught is None else f"{100 * r.taught:.0f} %",
    )


def _score(r: Row) -> str:
    score = "" if r.score is None else percent(r.score, r.spread)
    if r.failure is None:
        return score or "-"
    kept = f" (before: {score} of {r.finished})" if score else ""
    return f"{failure(r.failure, width=60)}{kept}"


def failure(what: dict[str, Any], width: int = 1000) -> str:
    """How an arm ended, in at most about `width` characters."""
    text = what["error"]
    return f"FAILED {text if len(text) <= width else text[: width - 1] + '…'}, seed {what['seed']}"


def percent(score: float, spread: float | None = None) -> str:
    """A share as per cent, with its spread.

    Example:
        >>> percent(0.981, 0.0021)
        '98.1 ± 0.2 %'
    """
    return f"{100 * score:.1f} %" if spread is None else f"{100 * score:.1f} ± {100 * spread:.1f} %"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them.

    Example:
        >>> size(1536), size(3 * 2**20), size(None)
        ('1.5 KiB', '3.0 MiB', '-')
    """
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _or_dash(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
