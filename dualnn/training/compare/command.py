"""The command `dualnn compare`."""

import argparse
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import NoReturn

import torch

from dualnn.training.cli import EXIT_FAILED
from dualnn.training.compare.costs import step_costs
from dualnn.training.compare.experiment import Arm, Experiment, load_experiment
from dualnn.training.compare.fresh import FreshProcesses
from dualnn.training.compare.results import Results, versions, write_atomically
from dualnn.training.compare.run import build, run_folder, train
from dualnn.training.compare.status import Status, quiet
from dualnn.training.compare.table import failure, percent, row, tables
from dualnn.training.compare.tune import proposal, tune
from dualnn.training.compare.verdict import verdict
from dualnn.training.errors import RunError, UsageError
from dualnn.training.suggest import did_you_mean


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        found = re.search(r"unrecognized arguments: (\S+)", message)
        if found:
            message = f"unknown option {found[1]!r}{did_you_mean(found[1], self._option_string_actions)}"
        raise UsageError(f"compare: {message}")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = _Parser(
        prog="dualnn compare",
        description="Train the arms of an experiment on the same data in the same order, and say which wins.",
        allow_abbrev=False,
    )
    add = options.add_argument
    add("-c", "--config", required=True, help="the experiment, such as experiments/digits/compare.yaml")
    add("--fast", action="store_true", help="the experiment's short version")
    add("--only", nargs="+", metavar="ARM", help="train these arms only; the others keep their results")
    add("--seeds", nargs="+", type=int, metavar="N", help="other seeds than the experiment's")
    add("--out", default="logs", metavar="FOLDER", help="where logs and results go (default: logs)")
    add("--tune", action="store_true", help="find the learning rates by the experiment's grid instead")
    add("--write", action="store_true", help="write RESULT.md beside the experiment even after a short run")
    return options


def compare(argv: Sequence[str]) -> int:
    """Run `dualnn compare`.

    Args:
        argv: The words after `compare`.

    Returns:
        0 if all arms finished (and those failed that are there to fail), 1 if not.

    Raises:
        DualnnError: What was asked for is not possible.
    """
    options = parser().parse_args(argv)
    experiment = load_experiment(options.config, options.fast)
    if options.seeds:
        experiment = experiment.with_seeds(options.seeds)
    arms = list((experiment.only(options.only) if options.only else experiment).arms.values())
    logs = Path(options.out)
    for arm in arms:  # before anything runs
        for seed in experiment.seeds:
            run_folder(experiment, arm, seed, logs)
    quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        if options.tune:
            return _tune(experiment, arms, logs)
        results = _run(experiment, arms, logs)
    finally:
        torch.set_num_threads(threads)
    report = _report(experiment, results)
    print("\n" + report)
    folder = logs / experiment.name
    write_atomically(folder / "RESULT.md", report)
    print(f"Results: {results.path}, {folder / 'RESULT.md'}. Curves: tensorboard --logdir {folder}")
    complete = all(name in results.arms for name in experiment.arms) and not options.seeds
    if options.write or (complete and experiment.mode == "full"):
        write_atomically(experiment.file.parent / "RESULT.md", report)
        print(f"Written: {experiment.file.parent / 'RESULT.md'}")
    return EXIT_FAILED if any(results.failed(arm) != arm.fails for arm in arms) else 0


def _run(experiment: Experiment, arms: Sequence[Arm], logs: Path) -> Results:
    status = Status(len(arms) * (1 + len(experiment.seeds)))
    for arm in arms:  # a mistake in the last arm's configuration is to show before the first arm trains
        build(arm, experiment.seeds[0], {}, [])
    results = Results(experiment, logs / experiment.name / "results.json")
    fresh = FreshProcesses(experiment, [arm.name for arm in arms])
    try:
        for arm in arms:
            results.start(arm)
            status.doing(f"measuring a step of {arm.label}")
            with _kept(results, arm, experiment.seeds[0], logs, status):
                results.add_costs(arm, step_costs(arm, experiment.seeds[0]))
            status.advance()
        # Nothing else may run while training is timed.
        status.doing("measuring the memory of a fresh process for each arm")
        while fresh.running:
            time.sleep(0.05)
    finally:
        fresh.close()
    # Seeds outside, arms inside: if the machine slows down for a while, it slows all arms down.
    for seed in experiment.seeds:
        for arm in arms:
            if not results.failed(arm):
                status.doing(f"{arm.label}, seed {seed}")
                with _kept(results, arm, seed, logs, status):
                    run = train(experiment, arm, seed, logs)
                    results.add_run(arm, seed, run)
                    status.say(
                        f"{arm.name:<24} seed {seed}   {percent(run['test']):>7}   {run['steps']} steps   "
                        f"{run['seconds']:.1f} s"
                    )
            status.advance()
    for arm in arms:  # last: a process that fails for the reason that ended the arm is no news
        if not results.failed(arm):
            with _kept(results, arm, experiment.seeds[0], logs, status):
                results.add_costs(arm, {"resident_bytes": fresh.peak(arm.name), "idle_bytes": fresh.idle()})
    status.end()
    return results


@contextmanager
def _kept(results: Results, arm: Arm, seed: int, logs: Path, status: Status) -> Iterator[None]:
    """Keep a failure as the arm's result: the other arms go on, and the exit code tells."""
    try:
        yield
    except UsageError:
        raise  # written wrongly: nothing goes on
    except Exception as error:
        file = run_folder(results.experiment, arm, seed, logs) / "error.txt"
        write_atomically(file, "".join(traceback.format_exception(error)))
        what = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}".splitlines()[0]
        step = error.step if isinstance(error, RunError) else None
        results.fail(arm, {"error": what, "step": step, "seed": seed, "traceback": str(file)})
        status.say(f"{arm.name:<24} seed {seed}   {failure(results.arms[arm.name]['failure'])}")


def _tune(experiment: Experiment, arms: Sequence[Arm], logs: Path) -> int:
    grid = ", ".join(f"{lr:g}" for lr in experiment.tuning.grid)
    seeds = ", ".join(map(str, experiment.tuning.seeds))
    print(f"{experiment.name}: learning rates {grid}; seeds {seeds}; shown: mean val/loss (val/{experiment.metric})")
    status = Status(len(arms) * len(experiment.tuning.grid) * len(experiment.tuning.seeds))
    outcome = tune(experiment, arms, status)
    status.end()
    edges = [tuned.arm.name for tuned in outcome if tuned.at_edge]
    print(f"Edge hits: {', '.join(edges) if edges else 'none'}")
    file = logs / experiment.name / "lr.yaml"
    write_atomically(file, proposal(experiment, outcome))
    print(f"Proposed learning rates: {file}. To commit them, copy each lr into {experiment.file}")
    return 0


def _report(experiment: Experiment, results: Results) -> str:
    rows = [row(arm, results.arms[name]) for name, arm in experiment.arms.items() if name in results.arms]
    made = ", ".join(f"{name} {version}" for name, version in versions(experiment.threads).items())
    head = f"# {experiment.name}" + ("" if experiment.mode == "full" else f" ({experiment.mode} version)")
    lines = verdict(rows, experiment.reference) + _same_input(experiment, results)
    return "\n\n".join(
        [
            head,
            *([experiment.question] if experiment.question else []),
            tables(experiment, rows),
            "## Verdict\n\n" + "\n".join(f"- {text}" for text in lines),
            f"Made by `dualnn compare --config {experiment.file.as_posix()}"
            f"{' --fast' if experiment.mode == 'fast' else ''}` on {date.today().isoformat()}: {made}.\n",
        ]
    )


def _same_input(experiment: Experiment, results: Results) -> list[str]:
    """Say whether all arms of a seed really saw the same batches and began with the same shared weights."""
    base = results.arms.get(experiment.reference, {}).get("runs", {})
    wrong = []
    for name, record in results.arms.items():
        for seed, run in record["runs"].items():
            if seed not in base:
                continue
            if run["batches"] != base[seed]["batches"]:
                wrong.append(f"{name} saw other batches than {experiment.reference} with seed {seed}")
            common = run["weights"].keys() & base[seed]["weights"].keys()
            if any(run["weights"][weight] != base[seed]["weights"][weight] for weight in common):
                wrong.append(f"{name} began with other weights than {experiment.reference} with seed {seed}")
    if wrong:
        return [f"NOT A FAIR COMPARISON: {text}." for text in wrong]
    return ["Checked: with each seed all arms saw the same batches in the same order and began with the same weights."]
