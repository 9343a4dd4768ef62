"""Results as text, one benchmark at a time, and as a Markdown page, one table for all sizes of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from dualnn.bench.benchmark import named
from dualnn.bench.result import Result, Timing


def text(result: Result) -> str:
    """One benchmark as lines of text."""
    width = max(map(len, result.benchmark.arms), default=0)
    lines = [f"\n{result.benchmark}; ratios to {result.reference}"]
    for t in result.timings:
        first = "" if t.first is None else f"  first call {t.first:.1f} s"
        spans = f"{duration(t.median):>8} {f'[{duration(t.low)}, {duration(t.high)}]':<20}"
        ratios = f"{number(t.ratio):>6} {f'[{number(t.ratio_low)}, {number(t.ratio_high)}]':<16}"
        remark = f"  ({t.remark})" if t.remark else ""
        lines.append(f"  {t.name:<{width}}  {spans}  {ratios}{first}{remark}".rstrip())
    lines += [f"  {name:<{width}}  {why}" for name, why in result.missing.items()]
    return "\n".join([*lines, f"  {result.verdict}"])


def markdown(results: Sequence[Result], header: str) -> str:
    """All results as a page."""
    lines = [f"{header}\n"]
    for group, members in groupby(results, lambda r: r.benchmark.group):
        lines.append(f"## {group}\n")
        for name, same in groupby(members, lambda r: r.benchmark.name):
            lines += _family(name, list(same))
    return "\n".join(lines)


def _family(name: str, results: list[Result]) -> list[str]:
    """One table: an arm a row, a set of parameters a column."""
    first = results[0].benchmark
    common = {k: v for k, v in first.parameters.items() if all(r.benchmark.parameters.get(k) == v for r in results)}
    lines = [f"### {name}\n"]
    given = f" Everywhere {named(common)}." if common else ""
    lines += [f"Time of a call, and its ratio to {results[0].reference} [smallest, largest of a round].{given}"]
    lines += [first.note] if first.note else []
    columns = [named({k: v for k, v in r.benchmark.parameters.items() if k not in common}) or "time" for r in results]
    lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in first.arms:
        lines.append(f"| {arm} | {' | '.join(_cell(r, arm) for r in results)} |")
    lines += [
        "",
        *(f"- {c}: {r.verdict}." if c != "time" else f"- {r.verdict}." for c, r in zip(columns, results, strict=True)),
    ]
    asides = {f"{n}: {why}" for r in results for n, why in r.missing.items()}
    asides |= {f"{t.name}: {t.remark}" for r in results for t in r.timings if t.remark}
    return [*lines, *(f"- {aside}." for aside in sorted(asides)), ""]


def _cell(result: Result, arm: str) -> str:
    found: Timing | None = next((t for t in result.timings if t.name == arm), None)
    if found is None:
        return "–"
    bold = "**" if arm == result.winner and result.benchmark.contest else ""
    first = "" if found.first is None else f"; first call {found.first:.1f} s"
    ratio = f"{number(found.ratio)} [{number(found.ratio_low)}, {number(found.ratio_high)}]"
    return f"{bold}{duration(found.median)}{bold}, {ratio}{first}"


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> duration(0.00123456), duration(2.5e-6), duration(0.25), duration(12)
        ('1.23 ms', '2.5 us', '250 ms', '12 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * 0.9995:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} us"


def number(value: float) -> str:
    """Three digits without an exponent.

    Example:
        >>> number(1234.5), number(0.01234), number(1.0)
        ('1234', '0.0123', '1')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
