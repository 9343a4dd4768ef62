"""A figure of the results: one panel for each benchmark, bars of the ratio to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualnn.bench.benchmark import Unavailable, named
from dualnn.bench.result import Result

COLOURS = {"ours": "tab:blue", "peer": "tab:orange", "floor": "lightgrey"}


def plot(results: Sequence[Result], file: Path) -> None:
    """Write the figure; the suffix decides on the format.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no backend, no global state
    except ModuleNotFoundError as error:
        raise Unavailable("a plot needs matplotlib: pip install 'dualnn[bench]'") from error

    columns = min(3, len(results))
    rows = -(-len(results) // max(columns, 1))
    most = max(len(r.timings) for r in results)
    figure = Figure(figsize=(5.2 * columns, (0.9 + 0.28 * most) * rows), layout="constrained")
    for axes, result in zip(figure.subplots(rows, columns, squeeze=False).flat, results, strict=False):
        timings = result.timings[::-1]
        middle = [t.ratio for t in timings]
        below = [t.ratio - t.ratio_low for t in timings]
        above = [t.ratio_high - t.ratio for t in timings]
        axes.barh([t.name for t in timings], middle, xerr=[below, above], color=[COLOURS[t.side] for t in timings])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        b = result.benchmark
        axes.set_title(f"{b.group}/{b.name}\n{named(b.parameters)}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel(f"time / {result.reference}", fontsize=7)
    for axes in figure.axes[len(results) :]:
        axes.remove()
    figure.savefig(file, dpi=120)
