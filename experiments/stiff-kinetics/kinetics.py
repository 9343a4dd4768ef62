"""Robertson's three rate constants, nine orders of magnitude apart, from noisy data with an ordinary optimizer.

    python experiments/stiff-kinetics/kinetics.py           # everything below; prints the tables, writes result.json
    python experiments/stiff-kinetics/kinetics.py --fast    # the same, shorter and without meaning

L-BFGS learns the logarithms of the rates from a start ten times off. Every arm computes the same gradient in another
way: tangents carried by `odeint`, its backward pass, differences of scipy, backpropagation through a fixed-step
implicit solver and through an explicit one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dualnn as dn
from dualnn.bench.ivp import robertson
from dualnn.solvers import odeint
from dualnn.training.meters import LiveBytes

F64 = torch.float64
RATES = torch.tensor([0.04, 1e4, 3e7], dtype=F64)
START = (RATES * torch.tensor([10.0, 0.1, 10.0], dtype=F64)).log()
Y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
T = torch.cat([torch.zeros(1, dtype=F64), torch.logspace(-3, 1.6, 24, dtype=F64)])
NOISE = 0.02
SEEDS = (0, 1, 2)
RTOL = 1e-6
LONG = 20.0  # seconds: measured once
SLOW = 5.0  # no fit

Gradient = Callable[[Tensor, Tensor], tuple[float, Tensor]]  # logarithms of the rates, data -> loss, its gradient


def data(seed: int) -> Tensor:
    """The solution at all times but the first, each number 2 % off."""
    exact = odeint(robertson, Y0, T, (RATES,), "radau", rtol=1e-10, atol=1e-16)[1:]
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return exact * (1 + NOISE * noise)


def misfit(y: Tensor, observed: Tensor) -> Tensor:
    """Mean square of the relative errors, in units of the noise: 1 where everything is understood."""
    return (((y - observed) / observed) / NOISE).square().mean()


def integrated(logs: Tensor, observed: Tensor, method: str, rtol: float = RTOL, **options: object) -> Tensor:
    """The misfit by `odeint`."""
    y = odeint(robertson, Y0, T, (logs.exp(),), method, rtol, rtol * 1e-6, options)
    return misfit(y[1:], observed)


def carried(method: str, rtol: float = RTOL, **options: object) -> Gradient:
    """Three tangents through the solver."""

    def gradient(logs: Tensor, observed: Tensor) -> tuple[float, Tensor]:
        seeds = torch.eye(3, dtype=F64)
        loss, slopes = dn.jvp(lambda q: integrated(q, observed, method, rtol, **options), (logs,), (seeds,))
        return float(loss), slopes

    return gradient


def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
    """By autograd."""

    def gradient(logs: Tensor, observed: Tensor) -> tuple[float, Tensor]:
        leaf = logs.clone().requires_grad_()
        value = loss(leaf, observed)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    return gradient


def differences(logs: Tensor, observed: Tensor, step: float = 1e-4) -> tuple[float, Tensor]:
    """Central differences of scipy's Radau, six solves beside the value's."""

    def loss(logs: Tensor) -> float:
        p1, p2, p3 = logs.exp().tolist()

        def rhs(t: float, y: np.ndarray) -> list[float]:
            y1, y2, y3 = y.tolist()
            slow, middle, fast = p1 * y1, p2 * y2 * y3, p3 * y2 * y2
            return [middle - slow, slow - middle - fast, fast]

        def jacobian(t: float, y: np.ndarray) -> list[list[float]]:
            _, y2, y3 = y.tolist()
            b2, b3, c2 = p2 * y3, p2 * y2, 2 * p3 * y2
            return [[-p1, b2, b3], [p1, -b2 - c2, -b3], [0.0, c2, 0.0]]

        rtol = RTOL * 1e-2  # what the solver leaves must be small beside the step
        found = solve_ivp(
            rhs, (0, float(T[-1])), Y0.numpy(), "Radau", T.numpy(), rtol=rtol, atol=rtol * 1e-6, jac=jacobian
        )
        return float(misfit(torch.from_numpy(found.y.T[1:]), observed))

    e = step * torch.eye(3, dtype=F64)
    return loss(logs), torch.tensor([(loss(logs + d) - loss(logs - d)) / (2 * step) for d in e], dtype=F64)


def euler_step(y: Tensor, h: Tensor, p: Tensor) -> Tensor:
    """Implicit Euler by eight Newton steps, with the Jacobian by hand, every operation recorded."""
    p1, p2, p3 = p.unbind()
    x, eye = y, torch.eye(3, dtype=F64)
    zero = torch.zeros_like(p1)
    for _ in range(8):
        _, x2, x3 = x.unbind()
        b2, b3, c2 = p2 * x3, p2 * x2, 2 * p3 * x2
        jacobian = torch.stack([-p1, b2, b3, p1, -b2 - c2, -b3, zero, c2, zero]).reshape(3, 3)
        x = x - torch.linalg.solve(eye - h * jacobian, x - y - h * robertson(h, x, p))
    return x


def fixed_implicit(between: int) -> Callable[[Tensor, Tensor], Tensor]:
    """So many implicit Euler steps between two data, of which only those at the data are kept."""

    def stretch(y: Tensor, start: Tensor, end: Tensor, p: Tensor) -> Tensor:
        for _ in range(between):
            y = euler_step(y, (end - start) / between, p)
        return y

    def loss(logs: Tensor, observed: Tensor) -> Tensor:
        y, rows = Y0, []
        for start, end in zip(T[:-1], T[1:], strict=True):
            y = checkpoint(stretch, y, start, end, logs.exp(), use_reentrant=False)
            rows.append(y)
        return misfit(torch.stack(rows), observed)

    return loss


def fixed_explicit(longest: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The classical Runge-Kutta method, steps as short as stability asks, checkpointed every square root of them."""

    def stretch(y: Tensor, h: Tensor, count: int, p: Tensor) -> Tensor:
        for _ in range(count):
            k1 = robertson(h, y, p)
            k2 = robertson(h, y + h / 2 * k1, p)
            k3 = robertson(h, y + h / 2 * k2, p)
            k4 = robertson(h, y + h * k3, p)
            y = y + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        return y

    def loss(logs: Tensor, observed: Tensor) -> Tensor:
        y, rows = Y0, []
        for start, end in zip(T[:-1], T[1:], strict=True):
            count = max(1, int(((end - start) / longest).ceil()))
            block, done = int(count**0.5) + 1, 0
            while done < count:
                some = min(block, count - done)
                y = checkpoint(stretch, y, (end - start) / count, some, logs.exp(), use_reentrant=False)
                done += some
            rows.append(y)
        return misfit(torch.stack(rows), observed)

    return loss


def arms() -> dict[str, Gradient]:
    """Those that are fast enough to fit with."""
    return {
        "tangents, radau": carried("radau"),
        "tangents, bdf": carried("bdf", RTOL / 10),
        "tangents, rodas5p": carried("rodas5p"),
        "tangents, rodas5p compiled": carried("rodas5p", compile=True),
        "backward, radau": backward(lambda q, y: integrated(q, y, "radau")),
        "differences, scipy Radau": differences,
        "backprop, implicit Euler, 10 steps a datum, checkpointed": backward(fixed_implicit(10)),
        "backprop, implicit Euler, 40 steps a datum, checkpointed": backward(fixed_implicit(40)),
    }


def fit(gradient: Gradient, observed: Tensor, most: int) -> tuple[Tensor, list[float], float]:
    """Rates, losses, seconds of the processor."""
    logs = START.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=most, line_search_fn="strong_wolfe")
    losses, begin = [], time.process_time()

    def closure() -> Tensor:
        loss, logs.grad = gradient(logs.detach(), observed)
        losses.append(loss)
        return torch.tensor(loss)

    optimizer.step(closure)
    return logs.detach().exp(), losses, time.process_time() - begin


def fits(chosen: dict[str, Gradient], most: int) -> Iterator[tuple[str, dict]]:
    """Every arm that is not too slow, three sets of noise."""
    for name, gradient in chosen.items():
        gradient(START, data(0))  # compiles
        begin = time.process_time()
        gradient(START, data(0))
        if time.process_time() - begin > SLOW:
            continue
        runs = [fit(gradient, data(seed), most) for seed in SEEDS]
        off = torch.stack([(rates / RATES - 1).abs() for rates, _, _ in runs])
        yield (
            name,
            {
                "relative error of the rates, mean over the noises": off.mean(0).tolist(),
                "final misfit": [losses[-1] for _, losses, _ in runs],
                "first misfit": runs[0][1][0],
                "CPU seconds of a fit": statistics.median(seconds for _, _, seconds in runs),
                "gradients": [len(losses) for _, losses, _ in runs],
            },
        )


def gradients(chosen: dict[str, Gradient], repeats: int) -> dict[str, dict]:
    """At the true rates: how exact, how long, how much memory; interleaved medians."""
    observed = data(0)
    _, exact = carried("radau", 1e-11)(RATES.log(), observed)
    spans: dict[str, list[float]] = {name: [] for name in chosen}
    table: dict[str, dict] = {}
    for name, gradient in chosen.items():
        if "compiled" in name:
            gradient(RATES.log(), observed)  # what the compiler holds meanwhile is not the gradient's
        begin = time.process_time()
        _, slopes = gradient(RATES.log(), observed)
        spans[name].append(time.process_time() - begin)
        table[name] = {"relative error": float((slopes - exact).norm() / exact.norm())}
        if spans[name][0] < LONG:  # counting takes several times as long
            with LiveBytes() as meter:
                gradient(RATES.log(), observed)
            table[name]["live bytes"] = meter.peak
    for _ in range(repeats - 1):
        for name, gradient in chosen.items():
            if spans[name][0] < LONG:
                begin = time.process_time()
                gradient(RATES.log(), observed)
                spans[name].append(time.process_time() - begin)
    for name in chosen:
        table[name]["CPU seconds"] = statistics.median(spans[name])
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arms()
    if options.fast:
        chosen = {name: g for name, g in chosen.items() if "compiled" not in name and "40 steps" not in name}
    # 3e3 is the fastest rate of the solution at t = 40 beside 2.8, where the method's stability ends.
    explicit = fixed_explicit(0.05 if options.fast else 8e-4)
    with_explicit = {**chosen, "backprop, explicit Runge-Kutta, checkpointed": backward(explicit)}
    result: dict = {"torch": torch.__version__, "fits": {}}
    result["gradients"] = gradients(with_explicit, 1 if options.fast else 3)
    for name, row in result["gradients"].items():
        print(f"{name:58s} {row}", flush=True)
    for name, row in fits(chosen, 3 if options.fast else 100):
        result["fits"][name] = row
        print(f"{name:58s} {row}", flush=True)
        (options.folder / "kinetics.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
