"""A million solved equations in a row, with tangents through every one of them.

    python experiments/newton-chain/chain.py                  # everything below; writes figure.svg and prints the table
    python experiments/newton-chain/chain.py --steps 10000    # shorter

Step m of a stiff mechanical system is implicit: its state solves ``F(x_m, x_{m-1}, p) = 0`` (backward Euler for two
coupled, driven Duffing oscillators, n = 4, 8 parameters) by Newton with line search and LU. The sensitivities of x_m to
the parameters go through every step. Compared: the plain loop on duals, the same with its step compiled, forward mode
of torch (vmap of jvp) and backprop, each as far as it goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import dualnn as dn

F64 = torch.float64
H, OMEGA = 0.05, 1.3
# Damping, stiffness and hardening of the first oscillator, the same of the second, coupling, amplitude of the force.
P = torch.tensor([0.3, 1.0, 0.6, 0.5, 40.0, 2.0, 0.8, 0.9], dtype=F64)
X0 = torch.zeros(4, dtype=F64)


def residual(x: Tensor, before: Tensor, phase: Tensor, p: Tensor) -> Tensor:
    """Backward Euler for two coupled, driven Duffing oscillators: x = (q1, v1, q2, v2)."""
    q1, v1, q2, v2 = x.unbind()
    c1, k1, b1, c2, k2, b2, coupling, force = p.unbind()
    pull = coupling * (q1 - q2)
    a1 = force * torch.cos(phase) - c1 * v1 - k1 * q1 - b1 * q1**3 - pull
    a2 = pull - c2 * v2 - k2 * q2 - b2 * q2**3
    return x - before - H * torch.stack([v1, a1, v2, a2])


def chain(p: Tensor, steps: int, start: Tensor = X0, compile: bool = False, watch: Callable | None = None) -> Tensor:
    """The state after so many steps; ``p`` may be a dual, or recorded by autograd."""
    x = start
    for m in range(steps):
        phase = torch.tensor(OMEGA * H * (m + 1), dtype=F64)
        x = dn.solvers.root(residual, x, (x, phase, p), compile=compile)
        if watch is not None:
            watch(m, x)
    return x


def jacobian(x: Tensor, p: Tensor) -> Tensor:
    """Of the residual in x, by hand."""
    q1, _, q2, _ = x.unbind()
    c1, k1, b1, c2, k2, b2, coupling, _ = p.unbind()
    zero, one = torch.zeros_like(q1), torch.ones_like(q1)
    rows = (
        (one, -H * one, zero, zero),
        (H * (k1 + 3 * b1 * q1**2 + coupling), 1 + H * c1, -H * coupling, zero),
        (zero, zero, one, -H * one),
        (-H * coupling, zero, H * (k2 + 3 * b2 * q2**2 + coupling), 1 + H * c2),
    )
    return torch.stack([torch.stack(row) for row in rows])


def by_hand(p: Tensor, steps: int, start: Tensor = X0) -> Tensor:
    """The same loop in plain torch, for autograd and torch.func, with the Jacobian written out."""
    x = start
    for m in range(steps):
        before, phase = x, torch.tensor(OMEGA * H * (m + 1), dtype=F64)
        for _ in range(20):
            f = residual(x, before, phase, p)
            if float(f.detach().abs().max()) <= 1.8e-12:
                break
            direction = -torch.linalg.solve(jacobian(x, p), f)
            t = 1.0
            while not (residual(x + t * direction, before, phase, p) ** 2).sum() <= (1 - 2e-4 * t) * (f**2).sum():
                t /= 2
            x = x + t * direction
    return x


def duals(p: Tensor, steps: int, compile: bool, watch: Callable | None = None) -> tuple[Tensor, Tensor]:
    """End state and its sensitivities (8, 4) by the loop on duals."""
    seeded = dn.dual(p, torch.eye(len(p), dtype=F64))
    end = chain(seeded, steps, compile=compile, watch=watch)
    return end.primal, end.tangent


def forward_mode(p: Tensor, steps: int) -> Tensor:
    """Sensitivities by torch's forward mode."""
    pushed = torch.vmap(lambda v: torch.func.jvp(lambda q: by_hand(q, steps), (p,), (v,))[1])
    return pushed(torch.eye(len(p), dtype=F64))


def backprop(p: Tensor, steps: int) -> Tensor:
    """Sensitivities (4, 8) by four backward passes through the recorded loop."""
    leaf = p.clone().requires_grad_()
    end = by_hand(leaf, steps)
    return torch.stack([torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in end])


def per_step(run: Callable[[int], object], steps: int, repeats: int = 3) -> tuple[float, float]:
    """Median seconds a step, and the spread (largest over smallest)."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(steps)
        times.append((time.perf_counter() - begin) / steps)
    return statistics.median(times), max(times) / min(times)


def resident() -> int:
    """Bytes of memory that the process holds now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def tensors() -> list[Tensor]:
    """All tensors that live now."""
    gc.collect()
    kinds = (Tensor, torch.nn.Parameter)
    return [t for t in gc.get_objects() if type(t) in kinds and t.layout is torch.strided]


def living(others: list[Tensor]) -> int:
    """Bytes of the tensors that live now beside ``others``, each storage once."""
    known = {t.untyped_storage()._cdata for t in others}
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors()}
    return sum(size for storage, size in sizes.items() if storage not in known)


def memory(steps: int, compile: bool) -> list[tuple[int, int, int]]:
    """(step, live bytes of tensors, resident bytes) along one run on duals."""
    seen: list[tuple[int, int, int]] = []
    others = tensors()  # held, so that what the process frees meanwhile is not taken for ours
    marks = {m for e in range(2, 7) for m in (10**e - 1, 3 * 10**e - 1)} | {steps - 1}

    def watch(m: int, x: Tensor) -> None:
        if m in marks:
            seen.append((m + 1, living(others), resident()))

    duals(P, steps, compile, watch)
    return seen


def recorded_bytes(steps: int) -> float:
    """Resident bytes that autograd's record of the loop takes, a step."""
    leaf = P.clone().requires_grad_()
    by_hand(leaf, 200)  # allocators are warm
    before = resident()
    end = by_hand(leaf, steps)
    grown = resident() - before
    assert end.requires_grad  # the record is alive until here
    return grown / steps


def sensitivity_error(steps: int) -> float:
    """Largest difference between the tangents and 5-point differences of the end state, over the largest tangent."""
    _, tangent = duals(P, steps, compile=True)
    worst = 0.0
    for i in range(len(P)):
        h = torch.zeros_like(P)
        h[i] = 1e-3 * P[i]
        ends = [chain(P + k * h, steps, compile=True) for k in (-2, -1, 1, 2)]
        slope = (8 * (ends[2] - ends[1]) - (ends[3] - ends[0])) / (12 * h[i])
        worst = max(worst, float((slope - tangent[i]).abs().max() / tangent[i].abs().max()))
    return worst


def main() -> None:
    """Measure, print a table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"torch": torch.__version__, "steps": options.steps}

    begin = time.perf_counter()
    duals(P, 1, compile=True)
    result["seconds to compile"] = time.perf_counter() - begin
    rows: dict[str, tuple[float, float]] = {}
    for _ in range(2):  # interleaved: twice each, the second counts
        rows["duals, step compiled"] = per_step(lambda n: duals(P, n, True), 2000)
        rows["duals"] = per_step(lambda n: duals(P, n, False), 200)
        rows["vmap(jvp)"] = per_step(lambda n: forward_mode(P, n), 30)
        rows["backprop"] = per_step(lambda n: backprop(P, n), 100)
        rows["the loop alone, by hand"] = per_step(lambda n: by_hand(P, n), 200)
        rows["the loop alone, compiled"] = per_step(lambda n: chain(P, n, compile=True), 2000)
    result["seconds a step"] = rows
    pushed = forward_mode(P, 100)  # through Newton's iterations: as exact as their last one
    result["largest difference to vmap(jvp), 100 steps"] = float((duals(P, 100, True)[1] - pushed).abs().max())
    result["backprop, bytes a step"] = recorded_bytes(2000)
    result["relative difference to 5-point differences, 20,000 steps"] = sensitivity_error(min(20_000, options.steps))
    begin = time.perf_counter()
    result["memory"] = memory(options.steps, compile=True)
    result["seconds for all steps"] = time.perf_counter() - begin
    (options.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    draw(result, options.folder / "figure.svg")


def draw(result: dict, path: pathlib.Path) -> None:
    """Live bytes over steps: duals are flat, backprop's line ends at the machine's memory."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dualnn"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    steps, live, _ = zip(*result["memory"], strict=True)
    axes.loglog(steps, live, "o-", label="duals, 8 tangents (measured)")
    reach = [1, result["steps"]]
    axes.loglog(reach, [n * result["backprop, bytes a step"] for n in reach], "--", label="backprop (measured a step)")
    axes.axhline(24 * 2**30, color="0.6", linewidth=1)
    axes.text(1, 15 * 2**30, "24 GiB", color="0.4", fontsize=8)
    axes.set_xlabel("implicit steps (Newton, line search, LU)")
    axes.set_ylabel("bytes of live tensors")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
