"""A small neural vector field on a stiff oscillator, trained by Lightning through `odeint`.

    python experiments/stiff-kinetics/oscillator.py           # everything below; writes oscillator.json
    python experiments/stiff-kinetics/oscillator.py --fast    # the same, shorter and without meaning

Known is eps y2' = g(y1) y2 - y1, y1' = y2; g is a network, and the truth is van der Pol's g = 1 - y1^2. Only positions
y1 are observed, at a few times after each start, during the fast transient and after it, so the loss goes through the
solver.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dualnn.bench.ivp import van_der_pol
from dualnn.solvers import odeint
from dualnn.training.meters import LiveBytes

F64 = torch.float64
EPS = 1e-3
FAST, END = (0.5, 2.0, 10.0), 0.2  # times of observation: in units of eps, and the last
METHODS = ("radau", "rodas5p", "bdf", "dopri5")
RTOL = ATOL = 1e-5


def times(eps: float = EPS) -> Tensor:
    """When positions are observed, after the start."""
    return torch.tensor([0.0, *(eps * t for t in FAST), END], dtype=F64)


class Damped(nn.Module):
    """``y1' = y2, eps y2' = g(y1) y2 - y1``."""

    def __init__(self, eps: float = EPS, width: int = 16) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.double()
        with torch.no_grad():
            self.g[-1].bias.fill_(-1.0)  # damped everywhere: no oscillation yet

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side."""
        position, speed = y[..., :1], y[..., 1:]
        return torch.cat([speed, (self.g(position) * speed - position) / self.eps], -1)


class Oscillator(L.LightningModule):
    """Fits the damping to observed positions."""

    def __init__(self, method: str, lr: float = 2e-2) -> None:
        super().__init__()
        self.field, self.method, self.lr = Damped(), method, lr

    def positions(self, start: Tensor) -> Tensor:
        """At the times of observation, ``(B, T)``."""
        return odeint(self.field, start, times(), (), self.method, RTOL, ATOL)[1:, :, 0].T

    def training_step(self, batch: Any, index: int) -> Tensor:
        """One batch of starts."""
        start, seen = batch
        # Huber's: a sample that still jumps to the wrong side must not drown the others.
        loss = nn.functional.smooth_l1_loss(self.positions(start), seen, beta=0.05)
        self.log("loss/train", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Adam, cooled down."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trajectories(count: int, seed: int, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Starts all over the phase plane, and the positions observed after each, 0.01 off."""
    g = torch.Generator().manual_seed(seed)
    start = (2 * torch.rand(count, 2, generator=g, dtype=F64) - 1) * torch.tensor([2.0, 0.5 / eps], dtype=F64)
    rates = torch.full((count, 1), eps, dtype=F64)
    seen = odeint(van_der_pol, start, times(eps), (rates,), "radau", 1e-8, 1e-8)[1:, :, 0].T
    return start, seen + 0.01 * torch.randn(seen.shape, generator=g, dtype=F64)


def train(method: str, seed: int, epochs: int) -> dict[str, float]:
    """Error of the learned damping, loss on fresh trajectories, CPU seconds."""
    torch.manual_seed(seed)
    model = Oscillator(method)
    loader = DataLoader(TensorDataset(*trajectories(128, seed)), 32, shuffle=True)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, log_every_n_steps=1,
        logger=TensorBoardLogger("logs", name=f"stiff-kinetics/{method}", version=seed),
    )  # fmt: skip
    begin = time.process_time()
    trainer.fit(model, loader)
    seconds = time.process_time() - begin
    with torch.no_grad():
        grid = torch.linspace(-2, 2, 81, dtype=F64)[:, None]
        off = (model.field.g(grid) - (1 - grid**2)).square().mean().sqrt()
        start, seen = trajectories(128, 1000 + seed)
        miss = (model.positions(start) - seen).abs()
    return {
        "damping, root mean square error": float(off),
        "fresh starts, median error": float(miss.median()),
        "fresh starts, missed by more than 0.1": float((miss.amax(1) > 0.1).double().mean()),
        "CPU seconds": seconds,
    }


def one_step(method: str, eps: float, repeats: int) -> dict[str, float]:
    """Cost of one gradient of a batch of 32, at the start of training."""
    torch.manual_seed(0)
    field = Damped(eps)
    start, seen = trajectories(32, 0, eps)

    def step() -> None:
        options = {"max_steps": 1_000_000}
        y = odeint(field, start, times(eps), (), method, RTOL, ATOL, options)
        field.zero_grad()
        (y[1:, :, 0].T - seen).square().mean().backward()

    with LiveBytes() as meter:
        step()
    spans = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        spans.append(time.process_time() - begin)
    return {"CPU seconds": statistics.median(spans), "live bytes": meter.peak}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.folder / "oscillator.json"
    result: dict = {"torch": torch.__version__, "a step": {}, "training": {}}
    for eps in (1e-2,) if options.fast else (1e-2, 1e-3, 1e-4):
        for method in METHODS:
            row = one_step(method, eps, 1 if options.fast or (method == "dopri5" and eps < 1e-3) else 3)
            result["a step"][f"{method}, eps = {eps:g}"] = row
            print(method, eps, row, flush=True)
    for method in ("radau", "dopri5"):
        runs = [train(method, seed, 1 if options.fast else options.epochs) for seed in options.seeds]
        row = {name: [run[name] for run in runs] for name in runs[0]}
        result["training"][method] = row
        print(method, row, flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
