"""The verdict in words, computed from the numbers: who wins on accuracy, on time, on memory."""

import math
from collections.abc import Sequence

from dualnn.training.compare.table import Row, failure, percent, size

# Differences below these are called equal. With one seed there is no spread, and half a point is often luck.
_POINTS_WITHOUT_SPREAD = 0.005
_TIME = 1.15
_MEMORY = 1.02
_OF_SECONDS, _OF_MEMORY = "of the seconds", "of the live bytes"
_SECONDS = 1.0  # a shorter training says more about the machine's mood than about the arm


def verdict(rows: Sequence[Row], reference: str) -> list[str]:
    """Sentences about every arm, beside the reference.

    Args:
        rows: The table's rows.
        reference: Name of the arm that the others are measured against.

    Returns:
        One sentence or two for each arm, and one about equal memory.
    """
    by_name = {r.arm.name: r for r in rows}
    base = by_name.get(reference)
    if base is None or base.score is None:
        return [f"No verdict: the reference, {reference}, has no finished run.", *_failures(rows)]
    name = base.arm.label
    lines = [f"{name} reaches {percent(base.score, base.spread)} in {base.steps} steps and {base.seconds:.1f} s."]
    for r in rows:
        if r is base or r.score is None or r.failure is not None:
            continue
        if r.arm.kind == "control" and r.arm.control_of in by_name:
            lines.append(_about_control(r, by_name[r.arm.control_of]))
        else:
            lines.append(_about(r, base))
    lines += _failures(rows)
    lines += _equal_memory(rows)
    lines += _overall(rows, base)
    return lines


def tied(a: Row, b: Row) -> bool:
    """Whether two arms' accuracies differ by no more than their seeds do."""
    if a.score is None or b.score is None:
        return False
    if a.spread is None or b.spread is None:
        return abs(a.score - b.score) <= _POINTS_WITHOUT_SPREAD
    return abs(a.score - b.score) <= math.hypot(a.spread, b.spread)


def _about(r: Row, base: Row) -> str:
    name, other = base.arm.label, r.arm.label
    return (
        f"{other}: {_accuracy(r, base)}; time: {_ratio(r.seconds, base.seconds, _TIME, other, name, _OF_SECONDS)}; "
        f"memory: {_ratio(r.live_bytes, base.live_bytes, _MEMORY, other, name, _OF_MEMORY)}."
    )


def _accuracy(r: Row, base: Row) -> str:
    assert r.score is not None and base.score is not None  # for the type checker: callers have looked
    if tied(r, base):
        return f"accuracy: equal to {base.arm.label} within the spread ({percent(r.score, r.spread)})"
    winner = r if r.score > base.score else base
    gap = 100 * abs(r.score - base.score)
    return f"accuracy: {winner.arm.label} wins by {gap:.1f} points ({percent(r.score, r.spread)})"


def _ratio(value: float | None, base: float | None, equal: float, name: str, base_name: str, what: str) -> str:
    if not value or not base:
        return "not measured"
    times = value / base
    if what == _OF_SECONDS and max(value, base) < _SECONDS:
        return f"too short to tell ({times:.2f} x {what})"
    if 1 / equal <= times <= equal:
        return f"equal ({times:.2f} x {what})"
    return f"{name if times < 1 else base_name} wins ({times:.2f} x {what})"


def _about_control(r: Row, arm: Row) -> str:
    if arm.score is None:
        return f"{r.arm.label} (control): {arm.arm.label}, whose control it is, has no finished run."
    taught = ""
    if r.taught is not None and r.taught < 0.999:
        taught = f" It teaches {100 * r.taught:.0f} % of the weights; the others never move."
    return (
        f"{arm.arm.label} beside its control {r.arm.label}: {_accuracy(arm, r)}; "
        f"time: {_ratio(arm.seconds, r.seconds, _TIME, arm.arm.label, r.arm.label, _OF_SECONDS)}; "
        f"memory: {_ratio(arm.live_bytes, r.live_bytes, _MEMORY, arm.arm.label, r.arm.label, _OF_MEMORY)}."
        f"{taught}"
    )


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{r.arm.label}: {failure(r.failure)}." for r in rows if r.failure is not None]


def _equal_memory(rows: Sequence[Row]) -> list[str]:
    """At the memory of each estimated arm: which arm is best there? Without this no comparison is fair to backprop."""
    usable = [r for r in rows if r.score is not None and r.live_bytes and r.arm.kind != "control" and not r.failure]
    lines = []
    for r in usable:
        if r.arm.kind != "estimated":
            continue
        memory = r.live_bytes or 0.0
        others = [other for other in usable if other is not r and (other.live_bytes or 0.0) <= memory * _MEMORY]
        better = [other for other in others if not tied(other, r) and (other.score or 0.0) > (r.score or 0.0)]
        equal = [other for other in others if tied(other, r)]
        at = f"At the memory of {r.arm.label} ({size(r.live_bytes)})"
        if better:
            best = max(better, key=lambda other: other.score or 0.0)
            score = percent(best.score or 0.0, best.spread)
            lines.append(f"{at}, {best.arm.label} is more accurate: {score} with {size(best.live_bytes)}.")
        elif equal:
            leanest = min(equal, key=lambda other: other.live_bytes or 0.0)
            lines.append(f"{at}, {leanest.arm.label} is as accurate, with {size(leanest.live_bytes)}.")
        else:
            lines.append(f"{at}, nothing here is more accurate.")
    return lines


def _overall(rows: Sequence[Row], base: Row) -> list[str]:
    estimated = [r for r in rows if r.arm.kind == "estimated" and r.score is not None and not r.failure]
    if not estimated:
        return []
    name = base.arm.label
    best = max(estimated, key=lambda r: r.score or 0.0)
    if not tied(best, base) and (best.score or 0.0) < (base.score or 0.0):
        gap = 100 * ((base.score or 0.0) - (best.score or 0.0))
        return [
            f"Overall: where the step can be backpropagated, {name} wins: the best estimated signal, {best.arm.label}, "
            f"stays {gap:.1f} points behind."
        ]
    how = f"equals {name} within the spread" if tied(best, base) else f"beats {name} in accuracy"
    costs = [(best.seconds, base.seconds, _TIME, _OF_SECONDS), (best.live_bytes, base.live_bytes, _MEMORY, _OF_MEMORY)]
    dearer = [f"{a / b:.1f} x {what}" for a, b, equal, what in costs if a and b and a / b > equal]
    price = f", for {' and '.join(dearer)}: {name} wins on cost" if dearer else ""
    return [f"Overall: the best estimated signal, {best.arm.label}, {how}{price}."]
