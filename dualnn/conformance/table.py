"""The conformance table: rows to and from Markdown, totals, and where the committed tables are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from dualnn.conformance.sweep import COLUMNS, Row
from dualnn.conformance.verdicts import NAN, RAISES, RIGHT, UNCHECKED, WRONG
from dualnn.engine.errors import DualInputError

TABLES = Path(__file__).parent / "tables"
HEADS = ("value", "first order", "second order", "reverse over dual", "torch.func.jvp", "jvp of jvp")


def release() -> str:
    """The installed torch's major and minor version, such as ``2.14``."""
    return ".".join(torch.__version__.split(".")[:2])


def committed(kind: str) -> Path:
    """The table of ``"ops"``, ``"complex"``, ``"boundary"`` or ``"modules"`` for this torch (it may not exist)."""
    return TABLES / f"torch-{release()}-{kind}.md"


def share(rows: Iterable[Row], column: str) -> tuple[int, int]:
    """``(right, all)`` of a column, over the rows that it judged."""
    outcomes = [row.outcomes[column] for row in rows if column in row.outcomes]
    return sum(o in (RIGHT, "bitwise", "close") for o in outcomes), len(outcomes)


def totals(rows: Iterable[Row]) -> str:
    """One line per column: how many are right, raise, are wrong."""
    rows = list(rows)
    lines = []
    for column, head in zip(COLUMNS, HEADS, strict=True):
        right, total = share(rows, column)
        if total:
            count = {o: sum(r.outcomes.get(column) == o for r in rows) for o in (RAISES, NAN, WRONG, UNCHECKED)}
            rest = ", ".join(f"{n} {o}" for o, n in count.items() if n)
            lines.append(
                f"- {head}: {right} of {total} right ({100 * right / total:.1f} %){': ' + rest if rest else ''}"
            )
    return "\n".join(lines)


def markdown(title: str, rows: Iterable[Row]) -> str:
    """The table as it is committed."""
    rows = list(rows)
    lines = [
        f"# {title}, torch {torch.__version__.split('+')[0]}",
        "",
        "Made by `dualnn conformance --write`. A cell is the worst over the samples; `right (7/8)` tells how many of",
        "them are right where not all are. `value` is `bitwise` where it equals the plain op's to the last bit.",
        "",
        totals(rows),
        "",
        f"| name | samples | {' | '.join(HEADS)} |",
        f"|---|---|{'---|' * len(HEADS)}",
    ]
    for row in rows:
        cells = [_cell(row, column) for column in COLUMNS]
        lines.append(f"| {row.name} | {row.samples} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, column: str) -> str:
    outcome = row.outcomes.get(column)
    if outcome is None:
        return "-"
    right = row.share.get(column, 0)
    return f"{outcome} ({right}/{row.samples})" if outcome in (RAISES, NAN, WRONG, UNCHECKED) and right else outcome


def read(path: Path) -> dict[str, Row]:
    """Rows of a committed table, by name.

    Raises:
        DualInputError: There is no table for this torch.
    """
    if not path.exists():
        known = ", ".join(sorted(p.name for p in TABLES.glob("*.md")))
        raise DualInputError(f"no conformance table {path.name}: committed are {known or 'none'}")
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if not line.startswith("| ") or len(cells) != 2 + len(COLUMNS) or cells[0] == "name":
            continue
        row = Row(cells[0], int(cells[1]))
        for column, cell in zip(COLUMNS, cells[2:], strict=True):
            if cell != "-":
                row.outcomes[column] = cell.split(" ")[0]
        rows[row.name] = row
    return rows
