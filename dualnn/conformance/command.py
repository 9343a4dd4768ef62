"""The command `dualnn conformance`: run PyTorch's op and module databases through the engine, print the table."""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dualnn.conformance.boundary import boundary_cases, boundary_entries
from dualnn.conformance.case import Case
from dualnn.conformance.opinfo import (
    complex_cases,
    complex_entries,
    module_cases,
    module_entries,
    op_cases,
    op_entries,
)
from dualnn.conformance.sweep import COLUMNS, Row, judge
from dualnn.conformance.table import committed, markdown, totals
from dualnn.conformance.verdicts import WRONG
from dualnn.engine.errors import unknown_name

LIMIT = 8
KINDS: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[..., Iterator[Case]]]] = {
    "ops": ("Ops of PyTorch's OpInfo database", op_entries, op_cases),
    "complex": ("The same ops on complex numbers", complex_entries, complex_cases),
    "boundary": ("Boundary samples", boundary_entries, boundary_cases),
    "modules": ("Modules of PyTorch's module database", module_entries, module_cases),
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dualnn conformance",
        description="Check derivatives of every op and module of PyTorch's own databases against differences.",
        allow_abbrev=False,
    )
    options.add_argument("names", nargs="*", metavar="NAME", help="ops or modules, globs allowed (default: all)")
    options.add_argument("--kind", choices=(*KINDS, "all"), default="all", help="which database (default: all)")
    options.add_argument("--samples", type=int, default=LIMIT, metavar="N", help=f"samples an entry, 0: all ({LIMIT})")
    options.add_argument("--no-torch", action="store_true", help="do not judge torch.func.jvp beside it")
    options.add_argument("--write", action="store_true", help="write the tables for the installed torch")
    return options


def check(argv: Sequence[str]) -> int:
    """Run `dualnn conformance`.

    Args:
        argv: The words after `conformance`.

    Returns:
        0, or 1 if a derivative is silently wrong.

    Raises:
        UnknownNameError: A name matches nothing.
    """
    options = parser().parse_args(argv)
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    found: dict[str, list[Row]] = {}
    for kind in kinds:
        rows = run(kind, options.names, options.samples or None, not options.no_torch, progress=True)
        if not rows:
            continue
        found[kind] = rows
        print(f"\n{KINDS[kind][0]}\n{totals(rows)}")
        if options.write:
            committed(kind).parent.mkdir(exist_ok=True)
            committed(kind).write_text(markdown(KINDS[kind][0], rows), encoding="utf-8")
            print(f"wrote {committed(kind).name}")
    if not found:
        raise unknown_name("op or module", options.names[0], [n for k in kinds for n in KINDS[k][1]()])
    return int(any(silently_wrong(row) for rows in found.values() for row in rows))


def run(
    kind: str,
    names: Sequence[str] = (),
    limit: int | None = LIMIT,
    torch_too: bool = True,
    progress: bool = False,
) -> list[Row]:
    """Judge the entries of a database whose names match.

    Args:
        kind: ``"ops"`` or ``"modules"``.
        names: Globs; none means all.
        limit: Samples an entry at most, evenly spread (None: all).
        torch_too: Also judge torch.func.jvp and jvp of jvp.
        progress: Print each row as it is done.
    """
    _, entries, cases = KINDS[kind]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the samples are tiny, and a sum split otherwise rounds otherwise
    rows = []
    try:
        for name, entry in entries().items():
            if names and not any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
                continue
            start = time.perf_counter()
            row = judge(name, cases(entry, limit), torch_too)
            if row.samples:
                rows.append(row)
                if progress:
                    print(line(row), f"{time.perf_counter() - start:.1f} s", flush=True)
    finally:
        torch.set_num_threads(threads)
    return rows


def line(row: Row) -> str:
    """One row as text, with the reason of whatever is not right."""
    cells = " ".join(f"{row.outcomes.get(c, '-'):>9}" for c in COLUMNS)
    why = next((row.why[c] for c in COLUMNS[:4] if row.why.get(c)), "")
    return f"{row.name[:48]:<48} {row.samples:>4} {cells}  {why}".rstrip()


def silently_wrong(row: Row) -> bool:
    """Whether one of dualnn's own columns is wrong."""
    return any(row.outcomes.get(column) == WRONG for column in COLUMNS[:4])
