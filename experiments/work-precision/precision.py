"""How much work every method of `odeint` needs for how exact a result: states and sensitivities, four problems.

    python experiments/work-precision/precision.py           # everything below; writes result.json and figure.svg
    python experiments/work-precision/precision.py --fast    # the same, shorter and without meaning

At a ladder of tolerances: the achieved error beside the tolerance, the processor's time and the right-hand sides. Two
methods at their tightest give the reference, and must agree.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import dualnn as dn
from dualnn.bench.ivp import PROBLEMS, hires, robertson, van_der_pol
from dualnn.engine.errors import ConvergenceError
from dualnn.solvers import odeint
from dualnn.solvers.ode.odeint import METHODS

F64 = torch.float64
LADDER = [10.0**-k for k in range(3, 11)]
EXPLICIT = ("dopri5", "dop853")
MOST_STEPS = 4_000  # an explicit method that needs more is given up


class Case(NamedTuple):
    """A problem; sensitivities are taken in the logarithms of its parameters."""

    fn: Callable[[Tensor, Tensor, Tensor], Tensor]
    y0: Tensor
    end: float
    p: Tensor
    smallest: float  # absolute tolerance over relative tolerance


def predators(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Lotka and Volterra: prey and predators, nothing stiff."""
    a, b = y.unbind(-1)
    p1, p2, p3, p4 = p.unbind(-1)
    return torch.stack([p1 * a - p2 * a * b, p3 * a * b - p4 * b], -1)


CASES = {
    "Robertson, t = 40": Case(robertson, PROBLEMS["robertson"].y0, 40.0, PROBLEMS["robertson"].p, 1e-6),
    "van der Pol, eps = 1e-3, t = 2": Case(
        van_der_pol, PROBLEMS["van_der_pol"].y0, 2.0, torch.tensor([1e-3], dtype=F64), 1.0
    ),
    "HIRES": Case(hires, PROBLEMS["hires"].y0, 321.8122, PROBLEMS["hires"].p, 1e-4),
    "Lotka-Volterra, t = 10": Case(
        predators, torch.tensor([1.0, 1.0], dtype=F64), 10.0, torch.tensor([1.5, 1.0, 1.0, 3.0], dtype=F64), 1.0
    ),
}


def solved(case: Case, method: str, rtol: float, tested: bool, most: int = 10**6) -> tuple[Tensor, Tensor, int]:
    """End state, its derivatives in log p, and right-hand sides."""
    t = torch.tensor([0.0, case.end], dtype=F64)
    count = []

    def end(logs: Tensor) -> Tensor:
        options = {"sensitivities": tested, "max_steps": most}
        y, stats = odeint(
            case.fn, case.y0, t, (logs.exp(),), method, rtol, rtol * case.smallest, options, full_output=True
        )
        count.append(stats.evaluations)
        return y[-1]

    logs = case.p.log()
    y, dy = dn.jvp(end, (logs,), (torch.eye(len(logs), dtype=F64),))
    return y, dy, count[0]


def error(got: Tensor, exact: Tensor, smallest: float) -> float:
    """Largest error in units of the tolerance's scale: ``|e| / (smallest + |y|)``."""
    return float(((got - exact).abs() / (smallest + exact.abs())).max())


def measured(case: Case, exact: tuple[Tensor, Tensor], ladder: list[float], methods: list[str]) -> list[dict]:
    """One row for each method and tolerance."""
    y, dy = exact
    largest = dy.abs().amax(0)  # of a state's sensitivities: small ones count beside it
    rows = []
    for method in methods:
        for tested in (False, True):
            for rtol in ladder:
                begin = time.process_time()
                try:
                    got, moved, count = solved(case, method, rtol, tested, MOST_STEPS if method in EXPLICIT else 10**6)
                except ConvergenceError as reason:
                    rows.append({"method": method, "tested": tested, "rtol": rtol, "failed": str(reason)[:120]})
                    print(rows[-1], flush=True)
                    break
                row = {
                    "method": method,
                    "tested": tested,
                    "rtol": rtol,
                    "state error": error(got, y, case.smallest),
                    "sensitivity error": float(((moved - dy).abs() / (case.smallest + largest)).max()),
                    "CPU seconds": time.process_time() - begin,
                    "right-hand sides": count,
                }
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"torch": torch.__version__, "cases": {}}
    for name, case in CASES.items():
        if options.fast:
            case = case._replace(end=case.end / 100)
        y, dy, _ = solved(case, "radau", 1e-12, True)
        again, moved, _ = solved(case, "rodas5p", 1e-11, True)
        doubt = max(
            error(again, y, case.smallest), float(((moved - dy).abs() / (case.smallest + dy.abs().amax(0))).max())
        )
        print(f"{name}: two references differ by {doubt:.1e}", flush=True)
        rows = measured(case, (y, dy), LADDER[:2] if options.fast else LADDER, list(METHODS))
        result["cases"][name] = {"references differ by": doubt, "rows": rows}
        (options.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, options.folder / "figure.svg")


def draw(result: dict, file: pathlib.Path) -> None:
    """A row of panels for each problem: states and sensitivities, against time and right-hand sides."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dualnn"  # the same file from the same numbers
    from matplotlib import pyplot

    names = list(result["cases"])
    figure, axes = pyplot.subplots(len(names), 4, figsize=(16, 3.2 * len(names)), squeeze=False)
    for panels, name in zip(axes, names, strict=True):
        rows = [row for row in result["cases"][name]["rows"] if "failed" not in row]
        for column, (kind, work) in enumerate(
            (kind, work)
            for kind in ("state error", "sensitivity error")
            for work in ("CPU seconds", "right-hand sides")
        ):
            panel = panels[column]
            for index, method in enumerate(METHODS):
                for tested in (False, True):
                    mine = [row for row in rows if row["method"] == method and row["tested"] == tested]
                    panel.loglog(
                        [row[kind] for row in mine], [row[work] for row in mine], "o--" if tested else "o-",
                        color=f"C{index}", markersize=3, label=method + (", tangents tested" if tested else ""),
                    )  # fmt: skip
            panel.invert_xaxis()
            panel.set_xlabel(kind)
            panel.set_ylabel(work)
            panel.set_title(name, fontsize=9)
            panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
