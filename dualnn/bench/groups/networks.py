"""Whole networks with directions in their input, and a sparse Jacobian: parts of the engine's group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualnn.bench.benchmark import Arm, Benchmark, Run, Settings
from dualnn.bench.peers import jax_arm, pushed, torch_func
from dualnn.engine import detect, jacobian, jvp


def network(name: str, tangents: int, settings: Settings) -> Benchmark:
    """A convolutional network or a transformer block, with directions in its input."""
    small = settings.quick
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, shape = _transformer_block(small) if name == "transformer-block" else _convnet(small)
        net = net.to(settings.device).eval().requires_grad_(False)
        x = torch.randn(shape).to(settings.device)
        t = torch.randn(tangents, *shape).to(settings.device)
    arms = {
        "plain forward": Arm(lambda: lambda: {"value": net(x)}, "floor"),
        "dualnn": Arm(lambda: lambda: jvp(net, (x,), (t,))[1], "ours"),
        **torch_func(net, x, t, settings),
    }
    if name == "transformer-block":
        # torch's forward mode has no rule for the fused block, nor for fused attention: the plain products it has.
        push = pushed(net)

        def unfused() -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return push(x, t)

        arms["torch.func, unfused"] = Arm(lambda: without_fused_block(unfused), "peer")
    note = (
        f"{NOTES[name]}, float32, no gradients; {tangents} directions of the input. The ratio to the plain forward "
        "pass, less one, over K is what a tangent costs."
    )
    sizes = {"batch": shape[0], "K": tangents}
    return Benchmark("engine", name, sizes, arms, "plain forward", 1e-3, note)


def without_fused_block(run: Run) -> Run:
    """The same with nn.TransformerEncoderLayer's fused kernel turned off."""

    def call() -> Any:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return run()
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return call


NOTES = {
    "convnet": "three 3x3 convolutions (32, 64, 64 channels), ReLU, pooling, a linear layer; images of 3x32x32",
    "transformer-block": "nn.TransformerEncoderLayer, width 256, 8 heads, 64 tokens, GELU, normalised first",
}


def _convnet(small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    size, width = (8, 4) if small else (32, 32)
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.Linear(2 * width * (size // 8) ** 2, 10)
    return nn.Sequential(*layers, nn.Flatten(), head), (2 if small else 16, 3, size, size)


def _transformer_block(small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    width, heads, tokens, batch = (8, 2, 3, 2) if small else (256, 8, 64, 4)
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return block, (batch, tokens, width)


def tridiagonal(n: int, settings: Settings) -> Benchmark:
    """The Jacobian of a reaction-diffusion right-hand side on a line."""
    x = torch.randn(n, generator=settings.generator(), dtype=torch.float64).to(settings.device)
    edge = torch.zeros(1, dtype=x.dtype, device=x.device)

    def rhs(x: Tensor) -> Tensor:
        return torch.cat([edge, x[:-1]]) - 2 * x + torch.cat([x[1:], edge]) + torch.sin(x) - x**3

    pattern, push = detect(rhs, x), pushed(rhs)

    def bands(dense: Tensor) -> list[Tensor]:
        return [dense.diagonal(k) for k in (-1, 0, 1)]

    def of(values: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
        return [values[columns - rows == k] for k in (-1, 0, 1)]

    def by_pattern() -> Any:
        found = jacobian(rhs, x, pattern)
        return of(found.values(), *found.indices())

    def by_search() -> Any:
        found = jacobian(rhs, x, "sparse")
        return of(found.values(), *found.indices())

    def by_jacfwd() -> Any:  # torch.func.jacfwd itself has no chunks
        columns = [push(x, basis) for basis in torch.eye(n, dtype=x.dtype, device=x.device).split(500)]
        return bands(torch.cat(columns).T)

    def in_jax(jax: Any) -> Any:
        numpy = jax.numpy

        def function(x: Any) -> Any:
            zero = numpy.zeros(1)
            left, right = numpy.concatenate([zero, x[:-1]]), numpy.concatenate([x[1:], zero])
            return left - 2 * x + right + numpy.sin(x) - x**3

        def call(x: Any) -> Any:
            dense = jax.jacfwd(function)(x)
            return [numpy.diagonal(dense, k) for k in (-1, 0, 1)]

        return call

    arms = {
        "pattern known": Arm(lambda: by_pattern, "ours"),
        "pattern looked for": Arm(lambda: by_search, "ours"),
        "torch.func": Arm(lambda: by_jacfwd, "peer"),
        "JAX jacfwd jit": jax_arm(in_jax, (x,), settings),
    }
    note = (
        "u_t = u_xx + sin u - u^3 on a line, float64. Every arm gives the three diagonals; the peers compute all n^2 "
        "entries (torch.func 500 columns at a time)."
    )
    return Benchmark("engine", "tridiagonal", {"n": n}, arms, "torch.func", 1e-10, note)
