"""Learning from a stream: exact traces against backpropagation through time, whole and truncated.

    python experiments/online-stream/stream.py                # everything below; prints the tables, writes result.json
    python experiments/online-stream/stream.py --fast         # the same, shorter and without meaning

1. Digits pixel by pixel: 64 steps an image, one loss at the end, one update an image. The gradient of the online cell
   comes from windows of 8 steps, which keep nothing of the earlier ones but traces.
2. A delayed copy without end: the target is the input of 20 steps ago, the stream is never cut, 5 steps an
   update.
3. What a step costs at T = 100,000, for every cell.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualnn.data import Digits
from dualnn.layers import LRU, DiagonalLinear, ElementwiseLSTM, LeakyFire, MinGRU
from dualnn.training.meters import LiveBytes

SEEDS = (0, 1, 2)


class Reader(nn.Module):
    """A recurrent cell and a readout of what it knows in the end."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.cell, self.head = ElementwiseLSTM(1, hidden, forget_bias=3.0), nn.Linear(hidden, 10)


def whole(model: Reader, x: Tensor, y: Tensor, window: int) -> None:
    """Backpropagation through all steps."""
    h, _ = model.cell(x)
    nn.functional.cross_entropy(model.head(h[-1]), y).backward()


def truncated(model: Reader, x: Tensor, y: Tensor, window: int) -> None:
    """Backpropagation through the last window."""
    values = None
    for part in x.split(window):
        h, values = model.cell(part, values)
        values = tuple(v.detach() for v in values)
    nn.functional.cross_entropy(model.head(h[-1]), y).backward()


def traced(model: Reader, x: Tensor, y: Tensor, window: int) -> None:
    """The online cell, window by window; the last one's loss reaches back through the traces."""
    state = None
    for part in x.split(window):
        h, state = model.cell.window(part, state)
    nn.functional.cross_entropy(model.head(h[-1]), y).backward()


GRADIENTS = {
    "online, windows of 8": (traced, 8),
    "BPTT, all 64 steps": (whole, 64),
    "truncated BPTT, 8": (truncated, 8),
}


def pixels(x: Tensor) -> Tensor:
    """(B, 64) -> (64, B, 1)."""
    return x.flatten(1).T.unsqueeze(-1)


def read_digits(name: str, seed: int, lr: float, epochs: int) -> dict[str, float]:
    """Train one arm; validation and test accuracy, seconds, live bytes of an update."""
    gradient, window = GRADIENTS[name]
    torch.manual_seed(seed)
    data, model = Digits(shuffle_seed=seed), Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    peak, begin = 0, time.process_time()
    for epoch in range(epochs):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            if peak == 0 and epoch:
                with LiveBytes() as meter:
                    gradient(model, pixels(x), y, window)
                peak = meter.peak
            else:
                gradient(model, pixels(x), y, window)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    seconds = time.process_time() - begin
    found = {"seconds": seconds, "live bytes": float(peak)}
    with torch.no_grad():
        for part, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
            right = [model.head(model.cell(pixels(x))[0][-1]).argmax(1) == y for x, y in loader]
            found[part] = float(torch.cat(right).float().mean())
    return found


def digits(epochs: int, rates: tuple[float, ...]) -> dict[str, dict]:
    """Every arm at its best rate of the grid (by validation, seed 0), three seeds."""
    table = {}
    for name in GRADIENTS:
        tried = {lr: read_digits(name, SEEDS[0], lr, epochs) for lr in rates}
        best = max(rates, key=lambda lr: tried[lr]["validation"])
        runs = [tried[best], *(read_digits(name, seed, best, epochs) for seed in SEEDS[1:])]
        accuracy = [r["test"] for r in runs]
        table[name] = {
            "test accuracy": (statistics.mean(accuracy), statistics.stdev(accuracy)),
            "rate": best,
            "at the grid's edge": best in (rates[0], rates[-1]),
            "CPU seconds": statistics.median(r["seconds"] for r in runs),
            "live bytes of an update": runs[0]["live bytes"],
        }
        print(name, table[name], flush=True)
    return table


DELAY, EVERY = 20, 5


def copy_stream(name: str, seed: int, lr: float, updates: int) -> tuple[float, float]:
    """Mean squared error over the last tenth of an endless stream, and CPU seconds. Online or truncated."""
    torch.manual_seed(seed)
    model = LRU(1, 64, 1, r_min=0.8, r_max=0.99)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    length = {"online, windows of 5": EVERY, "truncated BPTT, 5": EVERY, "truncated BPTT, 40": 40}[name]
    x = torch.randn(updates * EVERY + 64, 4, 1)
    state, values, errors, begin = model.start(4), None, [], time.process_time()
    behind = None
    for k in range(updates):
        t = 64 + k * EVERY
        target = x[t - DELAY : t - DELAY + EVERY]
        if name.startswith("online"):
            y, state = model.window(x[t : t + EVERY], state)
        else:  # the loss is that of the last 5 steps; 40 steps of input are run again for every update
            start = t + EVERY - length
            if length > EVERY:
                if behind is None:
                    behind = [model.cell.start(4, traces=False).values]
                values = behind[-(length // EVERY)] if len(behind) >= length // EVERY else behind[0]
            y, after = model(x[start : t + EVERY], values)
            y = y[-EVERY:]
            if length > EVERY:
                # The state at the start of the next update's window is this run's, EVERY steps in.
                with torch.no_grad():
                    first = model.cell(x[start : start + EVERY], values)[1]
                behind = [tuple(v.detach() for v in first)]
            else:
                values = tuple(v.detach() for v in after)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.detach())
    return float(torch.stack(errors[-updates // 10 :]).mean()), time.process_time() - begin


def copies(updates: int, rates: tuple[float, ...]) -> dict[str, dict]:
    """Every arm at its best rate (seed 0), three seeds."""
    table = {}
    for name in ("online, windows of 5", "truncated BPTT, 5", "truncated BPTT, 40"):
        tried = {lr: copy_stream(name, SEEDS[0], lr, updates) for lr in rates}
        best = min(rates, key=lambda lr: tried[lr][0])
        runs = [tried[best], *(copy_stream(name, seed, best, updates) for seed in SEEDS[1:])]
        table[name] = {
            "mean squared error (1: nothing learned)": (
                statistics.mean(r[0] for r in runs),
                statistics.stdev(r[0] for r in runs),
            ),
            "rate": best,
            "at the grid's edge": best in (rates[0], rates[-1]),
            "CPU seconds": statistics.median(r[1] for r in runs),
        }
        print(name, table[name], flush=True)
    return table


def loop(cell: nn.Module, x: Tensor) -> None:
    """Forward and backward through the recorded loop."""
    cell(x)[0].square().mean().backward()


def checkpointed(cell: nn.Module, x: Tensor) -> None:
    """The same, recomputing blocks of about sqrt(T) steps."""
    block = round(len(x) ** 0.5)
    total, values = torch.zeros(()), cell.start(x.shape[1], traces=False).values

    def run(part: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        y, after = cell(part, values)
        return y.square().sum(), *after

    for part in x.split(block):
        found, *values = checkpoint(run, part, *values, use_reentrant=False)
        total = total + found
    (total / x.numel()).backward()


def windows(size: int) -> Callable[[nn.Module, Tensor], None]:
    """Online, a loss in every window."""

    def run(cell: nn.Module, x: Tensor) -> None:
        state = None
        for part in x.split(size):
            y, state = cell.window(part, state)
            (y.square().sum() / x.numel()).backward()

    return run


def timed(run: Callable, cell: nn.Module, x: Tensor) -> float:
    """CPU microseconds a step."""
    cell.zero_grad()
    begin = time.process_time()
    run(cell, x)
    return (time.process_time() - begin) / len(x) * 1e6


def costs(steps: int, repeats: int) -> list[dict]:
    """Every cell, N = 64, 16 inputs: interleaved, median of ``repeats``."""
    table = []
    for batch, length in ((1, steps), (16, steps // 10)):
        ways = {
            "BPTT, recorded loop": (loop, length),
            "online, windows of 256": (windows(256), length),
            "online, fused, windows of 256": (windows(256), length),
            "BPTT, checkpointed": (checkpointed, length // 50),  # a step costs the same however many there are
            "online, windows of 64": (windows(64), length // 10),
            "online, single steps": (windows(1), 256),
        }
        for kind in (DiagonalLinear, MinGRU, ElementwiseLSTM, LeakyFire):
            torch.manual_seed(0)
            cell, x = kind(16, 64), torch.randn(length, batch, 16)
            found: dict[str, list[float]] = {name: [] for name in ways}
            linear = kind in (DiagonalLinear, MinGRU)  # nothing in them goes step by step
            fused = copy.deepcopy(cell)
            if not linear:
                fused.fuse()
                fused.window(x[:256])  # compiles
            for _ in range(repeats):
                for name, (run, some) in ways.items():
                    if not (linear and "fused" in name):
                        found[name].append(timed(run, fused if "fused" in name else cell, x[:some]))
            row: dict = {"cell": kind.__name__, "B": batch, "T": length}
            row |= {name: statistics.median(v) for name, v in found.items() if v}
            for name in ("online, windows of 256", "online, fused, windows of 256"):
                if found[name]:
                    pairs = zip(found[name], found["BPTT, recorded loop"], strict=True)
                    row[f"{name} over BPTT"] = statistics.median(a / b for a, b in pairs)
            for name in ("BPTT, recorded loop", "BPTT, checkpointed", "online, windows of 256"):
                cell.zero_grad()
                few = x[: min(length, 2048)]
                with LiveBytes() as meter:
                    ways[name][0](cell, few)
                row[f"live bytes, {name}, T = {len(few)}"] = meter.peak
            row["state, bytes"] = cell.start(batch).nbytes
            table.append(row)
            print(row, flush=True)
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["digits", "copy", "costs"], default=None)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fast = options.fast
    parts: dict[str, Callable[[], object]] = {
        "costs": lambda: costs(1000 if fast else 100_000, options.repeats),
        "copy": lambda: copies(20 if fast else 3000, (1e-3, 3e-3, 1e-2, 3e-2)),
        "digits": lambda: digits(1 if fast else 8, (1e-3, 3e-3, 1e-2, 3e-2)),
    }
    file = options.folder / "result.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    for name, run in parts.items():
        if options.part in (None, name):
            result[name] = run()
            result["torch"] = torch.__version__
            file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
