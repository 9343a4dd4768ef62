"""What the doctor says: findings, and the report that holds them."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Literal

Kind = Literal[
    "raises", "cut", "nonfinite", "wrong", "flat", "memory", "surrogate", "stop-gradient", "unneeded", "unexamined"
]
Swap = Literal["exact", "estimate", "surrogate"]

TITLES: dict[str, str] = {
    "raises": "backward raises",
    "cut": "graph cut",
    "nonfinite": "nan or inf gradient",
    "wrong": "wrong gradient",
    "flat": "zero almost everywhere",
    "memory": "memory over budget",
    "surrogate": "surrogate gradient",
    "stop-gradient": "stop-gradient",
    "unneeded": "fails, not needed",
    "unexamined": "not examined",
}
#: Kinds that are worth knowing and fail nothing.
INFORMATION = frozenset({"surrogate", "stop-gradient", "unneeded", "unexamined"})
WIDTH = 110


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the doctor found.

    Attributes:
        name: Qualified name of the submodule ("" is the module itself: its own code, outside its parts), without
            the ``_orig_mod`` that ``torch.compile`` adds.
        kind: ``"raises"``, ``"cut"``, ``"nonfinite"``, ``"wrong"``, ``"flat"`` or ``"memory"``; as information
            ``"surrogate"`` (its backward takes another function's derivative), ``"stop-gradient"``, ``"unneeded"``
            (fails for an input before which nothing is trained), ``"unexamined"``.
        cause: What goes wrong, in plain words.
        line: ``file:line`` of the source where it happens ("" where no line is to blame).
        remedy: One line of code.
        cost: What the remedy costs.
        swap: How local duals can take the module's place inside backprop: ``"exact"`` (tried: the gradient equals
            finite differences), ``"estimate"``, ``"surrogate"`` (after choosing a smooth stand-in), None (not at all).
        path: The name as ``named_modules`` spells it, for code.
        op: The operation to blame, where one is known.
        leaves: The parameters and inputs whose derivative fails.
        tangents: K of the random local tangents that estimate what has no exact remedy (its variance is in `cost`).
    """

    name: str
    kind: Kind
    cause: str
    line: str
    remedy: str
    cost: str
    swap: Swap | None = None
    path: str = ""
    op: str = ""
    leaves: tuple[str, ...] = ()
    tangents: int | None = None

    @property
    def information(self) -> bool:
        """Whether it is worth knowing, and no failure."""
        return self.kind in INFORMATION


@dataclasses.dataclass(frozen=True)
class Report:
    """Where backprop fails in a module, why, and what to use; ``str()`` is a table.

    Attributes:
        findings: In the module's own order, failures first.
        module: The class of the examined module.
        examined: The submodules that were replayed.
    """

    findings: list[Finding]
    module: str = ""
    examined: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing fails (information does not count)."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """The findings that spoil training."""
        return [f for f in self.findings if not f.information]

    @property
    def where(self) -> list[str]:
        """Submodules that exact local duals can take over: ``DualPropagation(where=report.where)``."""
        return list(dict.fromkeys(f.path for f in self.failures if f.swap == "exact" and f.path))

    @property
    def estimates(self) -> dict[str, int]:
        """Submodules of which random local tangents can only estimate the gradient, and how many."""
        found = {f.path: f.tangents for f in self.failures if f.path and f.tangents is not None}
        return {path: k for path, k in found.items() if path not in self.where}

    def __str__(self) -> str:
        """A table: one block for each finding."""
        failing = len({f.name for f in self.failures})
        verdict = "backprop works" if self.ok else f"backprop fails in {failing} of {len(self.examined)} parts"
        notes = len(self.findings) - len(self.failures)
        head = f"{self.module}: {verdict}" + (f", {notes} remark{'s' * (notes > 1)}" if notes else "")
        lines = [head]
        for f in self.findings:
            lines += ["", *_block(f)]
        if self.where:
            lines += ["", f"In Lightning, at once: DualPropagation(where={self.where!r})"]
        return "\n".join(lines)


def _block(f: Finding) -> list[str]:
    title = f"{f.name or '(the module itself)'}   {TITLES[f.kind]}" + (f"   {f.line}" if f.line else "")
    lines = [title]
    for label, text in (("why", f.cause), ("remedy", f.remedy), ("cost", f.cost)):
        # Code is never wrapped: it is there to be copied.
        body = [text] if label == "remedy" else textwrap.wrap(text, WIDTH - 10, break_on_hyphens=False)
        lines += [f"  {label if i == 0 else '':<7} {part}" for i, part in enumerate(body) if text]
    return lines
