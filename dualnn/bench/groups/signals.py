"""What a training step costs under each signal, in units of one plain forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualnn.bench.benchmark import Arm, Benchmark, Group, Run, Settings
from dualnn.signals import ActivityPerturbation, Backprop, ForwardGradient, Signal, signal_loss


def step_cost(sizes: tuple[int, ...], batch: int, settings: Settings) -> Benchmark:
    """One step of an MLP, gradients written, without the optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for m, n in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(m, n), nn.ReLU()]
        net = nn.Sequential(*layers[:-1]).to(settings.device)
        x = torch.randn(batch, sizes[0]).to(settings.device)
        target = torch.randint(0, sizes[-1], (batch,)).to(settings.device)
    parameters = dict(net.named_parameters())

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(net(x), target)

    def forward() -> Any:
        with torch.no_grad():
            return {"loss": loss()}

    def under(signal: Signal | None, exact: bool = False) -> Run:
        keys = iter(range(1 << 62))

        def call() -> Any:
            for p in parameters.values():
                p.grad = None
            value = loss() if signal is None else signal_loss(loss, net, signal, key=next(keys))
            value.backward()
            if exact:
                return {"loss": value.detach(), "gradient": [p.grad for p in parameters.values()]}
            return {"loss": value.detach()}

        return call

    def by_torch_func() -> Run:
        values = {name: p.detach() for name, p in parameters.items()}

        def at(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(net, values, (x,)), target)

        def call() -> Any:
            direction = {name: torch.randn_like(p) for name, p in values.items()}
            value, slope = torch.func.jvp(at, (values,), (direction,))[:2]
            for name, p in parameters.items():
                p.grad = slope * direction[name]
            return {"loss": value}

        return call

    signals: dict[str, Signal] = {"dense Gaussian weights, K=1": ForwardGradient(1, "gaussian")}
    for k in (1, 8, 32) if not settings.quick else (1,):
        signals[f"rank-1 weights, K={k}"] = ForwardGradient(k, rank=1)
    for k in (1, 8) if not settings.quick else (1,):
        signals[f"activity, K={k}"] = ActivityPerturbation(k)
    arms = {
        "forward": Arm(lambda: forward, "floor"),
        "backprop": Arm(lambda: under(None, exact=True), "peer"),
        "backprop, checkpoint": Arm(lambda: under(Backprop(checkpoint=True), exact=True), "peer"),
        "torch.func.jvp, Gaussian weights": Arm(by_torch_func, "peer"),
        **{name: Arm(lambda s=signal: under(s), "ours") for name, signal in signals.items()},  # type: ignore[misc]
    }
    note = (
        "One training step (loss and .grad, no optimizer), float32, in units of one plain forward pass. All but "
        "backprop are random estimates of the gradient: a cheaper step is a noisier one."
    )
    shape = "-".join(map(str, sizes))
    return Benchmark("signals", "mlp", {"layers": shape, "batch": batch}, arms, "forward", 1e-4, note, contest=False)


def benchmarks(settings: Settings) -> list[Benchmark]:
    """All of the group."""
    return [step_cost((4, 6, 3), 5, settings) if settings.quick else step_cost((784, 1024, 1024, 10), 64, settings)]


SIGNALS = Group("the cost of a step under each signal", ("mlp",), benchmarks)
