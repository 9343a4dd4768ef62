"""What a run of a benchmark found, and who won."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from dualnn.bench.benchmark import Benchmark, Side


@dataclass(frozen=True)
class Timing:
    """One arm: seconds a call and the ratio to the reference within a round, each as median, smallest and largest.

    Attributes:
        first: Seconds of the first call, compilation included; None where nothing is compiled.
        remark: What the arm says about itself.
        taken: Seconds a call, one for each round.
    """

    name: str
    side: Side
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    first: float | None
    remark: str = ""
    taken: list[float] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Result:
    """A benchmark's timings, in the order of its arms, and the arms that could not run, with the reason."""

    benchmark: Benchmark
    reference: str
    timings: list[Timing]
    missing: dict[str, str]

    def best(self, *sides: Side) -> Timing | None:
        """The fastest arm of some sides."""
        return min((t for t in self.timings if t.side in sides), key=lambda t: t.median, default=None)

    @property
    def winner(self) -> str | None:
        """The fastest arm, floors apart."""
        best = self.best("ours", "peer")
        return best.name if best else None

    @property
    def verdict(self) -> str:
        """Who won, by how much, in a few words."""
        ours, theirs = self.best("ours"), self.best("peer")
        if not self.benchmark.contest:
            return f"cheapest: {self.winner}"
        if ours is None or theirs is None:
            return f"{self.winner} ran alone" if self.winner else "no arm ran"
        ratios = [b / a for a, b in zip(ours.taken, theirs.taken, strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        spread = f"[{low:.2f}, {high:.2f}]"
        if low <= 1 <= high:
            return f"level: {ours.name} and {theirs.name}, {middle:.2f}x {spread}"
        if middle > 1:
            return f"{ours.name} wins: {middle:.2f}x {spread} faster than {theirs.name}"
        return f"{theirs.name} wins: {1 / middle:.2f}x [{1 / high:.2f}, {1 / low:.2f}] faster than {ours.name}"

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        arms: list[dict[str, Any]] = [
            {
                "name": t.name,
                "side": t.side,
                "seconds": {"median": t.median, "min": t.low, "max": t.high},
                "ratio": {"median": t.ratio, "min": t.ratio_low, "max": t.ratio_high},
                "first_call_seconds": t.first,
                "remark": t.remark,
                "rounds": t.taken,
                "missing": None,
            }
            for t in self.timings
        ]
        arms += [{"name": n, "side": self.benchmark.arms[n].side, "missing": why} for n, why in self.missing.items()]
        return {
            "group": self.benchmark.group,
            "name": self.benchmark.name,
            "parameters": dict(self.benchmark.parameters),
            "reference": self.reference,
            "note": self.benchmark.note,
            "arms": arms,
            "winner": self.winner,
            "verdict": self.verdict,
        }
