"""Run the verdicts over many cases and fold them into one row per op."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from functools import partial

from dualnn.conformance.case import Case
from dualnn.conformance.verdicts import (
    NAN,
    RAISES,
    RIGHT,
    UNCHECKED,
    WRONG,
    Oracles,
    Verdict,
    attempt,
    by_duals,
    by_duals_twice,
    by_torch,
    by_torch_twice,
    check_counts,
    check_first,
    check_reverse,
    check_second,
    check_value,
)

COLUMNS = ("value", "first", "second", "reverse", "torch_jvp", "torch_jvp_jvp")
SEVERITY = (WRONG, NAN, RAISES, "close", "bitwise", RIGHT, UNCHECKED)


@dataclasses.dataclass
class Row:
    """The verdicts on one op, over all of its samples: the worst of each column.

    Attributes:
        name: The op.
        samples: How many were tried.
        outcomes: The worst outcome per column of `COLUMNS`.
        share: How many samples are right, per column.
        why: What the worst was, per column.
    """

    name: str
    samples: int = 0
    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)
    share: dict[str, int] = dataclasses.field(default_factory=dict)
    why: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, column: str, verdict: Verdict) -> None:
        """Fold in one sample's verdict."""
        old = self.outcomes.get(column)
        if verdict.outcome in (RIGHT, "bitwise", "close"):
            self.share[column] = self.share.get(column, 0) + 1
        if old is None or SEVERITY.index(verdict.outcome) < SEVERITY.index(old):
            self.outcomes[column] = verdict.outcome
            self.why[column] = verdict.why


def judge(name: str, cases: Iterable[Case], torch_too: bool = True) -> Row:
    """All verdicts on an op.

    Args:
        name: Of the op.
        cases: Its samples.
        torch_too: Also judge torch.func.jvp and jvp of jvp.
    """
    row = Row(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the samples provoke torch's own deprecation and rounding warnings
        for case in cases:
            row.samples += 1
            oracles = Oracles(case)
            row.add("value", attempt(partial(check_value, case)))
            first = attempt(partial(check_first, oracles, by_duals))
            if first.outcome in (RIGHT, UNCHECKED):
                counts = attempt(partial(check_counts, case))
                first = first if counts.outcome == RIGHT else counts
            row.add("first", first)
            row.add("second", attempt(partial(check_second, oracles, by_duals, by_duals_twice)))
            row.add("reverse", attempt(partial(check_reverse, oracles)))
            if torch_too:
                row.add("torch_jvp", attempt(partial(check_first, oracles, by_torch)))
                row.add("torch_jvp_jvp", attempt(partial(check_second, oracles, by_torch, by_torch_twice)))
    return row
