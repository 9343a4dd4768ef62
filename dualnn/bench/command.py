"""The command `dualnn bench`: time the library beside its peers, in one process, on one thread."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dualnn.bench.benchmark import Benchmark, Settings
from dualnn.bench.groups import GROUPS
from dualnn.bench.machine import header, machine, versions
from dualnn.bench.plot import plot
from dualnn.bench.result import Result
from dualnn.bench.table import markdown, text
from dualnn.bench.timing import run
from dualnn.engine.errors import DualInputError, unknown_name


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dualnn bench",
        description="Time dualnn beside its peers: the arms of a benchmark agree first, then take turns on one thread.",
        epilog="Peers other than torch come with: pip install 'dualnn[bench]'",
        allow_abbrev=False,
    )
    options.add_argument("names", nargs="*", metavar="NAME", help="GROUP or GROUP/NAME, globs allowed (default: all)")
    options.add_argument("--list", action="store_true", help="say what there is, and stop")
    options.add_argument("--quick", action="store_true", help="tiny sizes, one round: whether it runs, not how fast")
    options.add_argument("--without", action="append", default=[], metavar="ARM", help="leave out arms, globs allowed")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    options.add_argument("--rounds", type=int, default=9, metavar="N", help="in each, every arm is timed once (9)")
    options.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a machine in use (wall)"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    options.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    return options


def bench_command(argv: Sequence[str]) -> int:
    """Run `dualnn bench`.

    Args:
        argv: The words after `bench`.

    Returns:
        0.

    Raises:
        UnknownNameError: A name matches nothing.
        DualInputError: No rounds, or a device that is not there.
        DisagreementError: Arms of a benchmark computed different numbers.
    """
    options = parser().parse_args(argv)
    if options.list:
        for group, members in GROUPS.items():
            print(f"{group}: {members.title}\n  " + " ".join(f"{group}/{name}" for name in members.names))
        return 0
    if options.rounds < 1:
        raise DualInputError(f"--rounds must be at least 1, got {options.rounds}")
    if options.device == "cuda" and options.clock == "cpu":
        raise DualInputError("--clock cpu does not see what a GPU does: leave it out with --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DualInputError("--device cuda: torch sees no GPU here")
    settings = Settings(
        options.device, options.quick, options.rounds, clock=options.clock, without=tuple(options.without)
    )
    chosen = selected(options.names, settings)
    about = header(settings)
    conditions = {"machine": machine(settings), "versions": versions()}
    print(about)
    results: list[Result] = []
    for benchmark in chosen:
        results.append(run(benchmark, settings))
        print(text(results[-1]), flush=True)
        if options.json:  # after each, so that an interrupted run leaves what it found
            data = {**conditions, "device": settings.device, "quick": settings.quick, "rounds": settings.rounds}
            data["benchmarks"] = [result.as_data() for result in results]
            options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(markdown(results, about), encoding="utf-8")
    if options.plot:
        plot(results, options.plot)
    return 0


def selected(patterns: Sequence[str], settings: Settings) -> list[Benchmark]:
    """The benchmarks whose group or ``group/name`` matches one of the patterns; without patterns all.

    Raises:
        UnknownNameError: A pattern matches nothing.
    """
    names = [*GROUPS, *(f"{group}/{name}" for group, members in GROUPS.items() for name in members.names)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise unknown_name("benchmark", pattern, names)

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)

    found = []
    for group, members in GROUPS.items():
        if wanted(group) or any(wanted(f"{group}/{name}") for name in members.names):
            made = members.benchmarks(settings)
            found += [b for b in made if wanted(group) or wanted(f"{group}/{b.name}")]
    return found
