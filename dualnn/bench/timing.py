"""Run a benchmark: the arms agree first, then they take turns on one thread."""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.bench.benchmark import Benchmark, Run, Settings, Unavailable
from dualnn.bench.result import Result, Timing
from dualnn.engine.errors import DualnnError

WARM_UP = 2
MOST_CALLS = 20_000


class DisagreementError(DualnnError, AssertionError):
    """Two arms of a benchmark computed different numbers: nothing is timed."""


def run(benchmark: Benchmark, settings: Settings = Settings()) -> Result:  # noqa: B008 - frozen
    """Time the arms of a benchmark side by side.

    Every arm is built and called once (which compiles it), and its numbers are compared. Then come rounds in which all
    arms take turns, forwards and backwards, so that a machine that slows down slows all of them; ratios are taken
    within a round.

    Raises:
        DisagreementError: Arms computed different numbers, or one computed nothing that could be compared.

    Example:
        >>> import torch
        >>> from dualnn.bench import Arm, Benchmark, Settings
        >>> x = torch.ones(3)
        >>> twice = {"add": Arm(lambda: lambda: x + x, "ours"), "mul": Arm(lambda: lambda: 2 * x, "peer")}
        >>> result = run(Benchmark("demo", "twice", {"n": 3}, twice, reference="mul"), Settings(quick=True))
        >>> [timing.name for timing in result.timings], result.timings[1].ratio
        (['add', 'mul'], 1.0)
    """
    calls: dict[str, Run] = {}
    numbers: dict[str, dict[str, list[Tensor]]] = {}
    first: dict[str, float] = {}
    missing: dict[str, str] = {}
    with one_thread(), _cold_compiler(benchmark):
        for name, arm in benchmark.arms.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.without):
                missing[name] = "left out"
                continue
            start = time.perf_counter()
            try:
                call = arm.make()
                returned = call()
            except Unavailable as reason:
                missing[name] = str(reason)
                continue
            except Exception as error:  # a peer that cannot is a row of the table; our own failures are failures
                if arm.side == "ours":
                    raise
                text = next(iter(str(error).strip().splitlines()), "")
                missing[name] = f"fails: {type(error).__name__}: {text}"[:160]
                continue
            _wait(settings)
            first[name] = time.perf_counter() - start
            calls[name], numbers[name] = call, as_numbers(returned)
            del returned
        agree(benchmark, numbers, bool(missing))
        spans = interleaved(calls, 1 if settings.quick else settings.rounds, settings)
    base = benchmark.reference if benchmark.reference in spans else next(iter(spans), "")
    timings = []
    for name, taken in spans.items():
        arm = benchmark.arms[name]
        ratios = [a / b for a, b in zip(taken, spans[base], strict=True)]
        timings.append(
            Timing(
                name,
                arm.side,
                statistics.median(taken),
                min(taken),
                max(taken),
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                first[name] if arm.compiled else None,
                getattr(calls[name], "remark", ""),
                taken,
            )
        )
    return Result(benchmark, base, timings, missing)


def interleaved(calls: Mapping[str, Run], rounds: int, settings: Settings) -> dict[str, list[float]]:
    """Seconds a call, by arm, one for each round."""
    now = time.process_time if settings.clock == "cpu" else time.perf_counter
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        taken = math.inf
        for _ in range(1 if settings.quick else WARM_UP):
            start = time.perf_counter()
            call()
            _wait(settings)
            taken = min(taken, time.perf_counter() - start)
        wanted = 1 if settings.quick else math.ceil(settings.seconds / taken)
        repeats[name] = min(max(wanted, 1), MOST_CALLS)
    spans: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                call, count = calls[name], repeats[name]
                _wait(settings)
                start = now()
                for _ in range(count):
                    call()
                _wait(settings)
                spans[name].append((now() - start) / count)
            order.reverse()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return spans


def as_numbers(returned: Any) -> dict[str, list[Tensor]]:
    """What an arm returned as named lists of float64 tensors."""
    import numpy as np

    entries = returned if isinstance(returned, dict) else {"result": returned}
    out: dict[str, list[Tensor]] = {}
    for name, value in entries.items():
        leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
        out[name] = [
            leaf.detach().to("cpu", torch.float64, copy=True)
            if isinstance(leaf, Tensor)
            else torch.from_numpy(np.array(leaf, dtype=np.float64))
            for leaf in leaves
        ]
    return out


def agree(benchmark: Benchmark, numbers: Mapping[str, Mapping[str, list[Tensor]]], incomplete: bool) -> None:
    """Raise where two arms differ; ``incomplete``: arms are missing, so that one may stand alone."""
    seen: dict[str, str] = {}
    shared: set[str] = set()
    for arm, entries in numbers.items():
        for key, mine in entries.items():
            other = seen.setdefault(key, arm)
            if other == arm:
                continue
            shared |= {arm, other}
            theirs = numbers[other][key]
            if [t.shape for t in mine] != [t.shape for t in theirs]:
                shapes = [[tuple(t.shape) for t in both] for both in (mine, theirs)]
                raise DisagreementError(
                    f"{benchmark}: {key} of {arm!r} has shapes {shapes[0]}, of {other!r} {shapes[1]}"
                )
            for a, b in zip(mine, theirs, strict=True):
                scale = float(b.abs().max()) if b.numel() else 0.0
                off = float((a - b).abs().max()) if b.numel() else 0.0
                if not off <= benchmark.rtol * scale:  # nan is not agreement
                    raise DisagreementError(
                        f"{benchmark}: {key} of {arm!r} and {other!r} differ by {off:.3g} at a size of {scale:.3g}, "
                        f"allowed is a fraction of {benchmark.rtol:g}"
                    )
    alone = [arm for arm in numbers if arm not in shared and benchmark.arms[arm].side != "floor"]
    if alone and len(numbers) > 1 and not incomplete:
        raise DisagreementError(f"{benchmark}: {alone} returned nothing that another arm returns: no way to check them")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _cold_compiler(benchmark: Benchmark) -> Iterator[None]:
    """Compile from nothing, so that the stated times do not depend on what an earlier run left."""
    if not any(arm.compiled for arm in benchmark.arms.values()):
        yield
        return
    torch.compiler.reset()  # programs of the same code object count towards a limit
    old = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if old is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = old


def _wait(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()
