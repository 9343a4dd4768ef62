"""The engine by itself: chains of elementwise operations, Jacobians, a Laplacian, networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.bench.benchmark import Arm, Benchmark, Group, Run, Settings
from dualnn.bench.groups.networks import NOTES, network, tridiagonal
from dualnn.bench.peers import Compiled, jax_arm, jax_pushed, pushed, torch_func
from dualnn.engine import compile, dual, jacobian, jvp, laplacian

REPEATS = 10  # of three operations (chain A), of four (chain B)


def ours(fn: Callable[[Tensor], Any], x: Tensor, t: Tensor, settings: Settings, fused: bool = True) -> dict[str, Arm]:
    """The arms of dualnn for the tangents of ``fn``."""

    def by_program() -> Run:
        program = compile(fn, backend=settings.backend)

        def call() -> Any:
            out = program(dual(x, t))
            return tuple(part.tangent for part in out) if isinstance(out, tuple) else out.tangent

        return call

    arms = {"dualnn": Arm(lambda: lambda: jvp(fn, (x,), (t,))[1], "ours")}
    if fused:
        arms["dualnn compiled"] = Arm(by_program, "ours", compiled=True)
    return arms


def chain(name: str, size: int, tangents: int, settings: Settings) -> Benchmark:
    """Chain A: y = sin(y) w + v, tensors only. Chain B: y = tanh(0.9 y) + 0.1 x, with Python numbers."""
    g = settings.generator()
    x, v = (torch.randn(size, generator=g).to(settings.device) for _ in range(2))
    w = torch.rand(size, generator=g).to(settings.device) + 0.5
    t = torch.randn(tangents, size, generator=g).to(settings.device)

    def chain_a(x: Any, sin: Callable = torch.sin, w: Any = w, v: Any = v) -> Any:
        y = x
        for _ in range(REPEATS):
            y = sin(y) * w + v
        return y

    def chain_b(x: Any, tanh: Callable = torch.tanh) -> Any:
        y = x
        for _ in range(REPEATS):
            y = tanh(0.9 * y) + 0.1 * x
        return y

    def in_jax(jax: Any) -> Callable:
        if name == "chain-B":
            return jax_pushed(jax, lambda z: chain_b(z, jax.numpy.tanh))
        return lambda x, t, w, v: jax_pushed(jax, lambda z: chain_a(z, jax.numpy.sin, w, v))(x, t)

    fn = {"chain-A": lambda x: chain_a(x), "chain-B": lambda x: chain_b(x)}[name]
    arms = {
        "plain function": Arm(lambda: lambda: {"value": fn(x)}, "floor"),
        **ours(fn, x, t, settings),
        **torch_func(fn, x, t, settings),
        "JAX jit": jax_arm(in_jax, (x, t) if name == "chain-B" else (x, t, w, v), settings),
    }
    note = {
        "chain-A": "30 elementwise operations on tensors: y = sin(y) w + v, ten times; float32.",
        "chain-B": "40 elementwise operations, half with Python numbers: y = tanh(0.9 y) + 0.1 x, ten times; float32.",
    }[name]
    return Benchmark("engine", name, {"N": size, "K": tangents}, arms, "torch.func", 1e-3, note)


def dense_jacobian(n: int, settings: Settings) -> Benchmark:
    """Both factors of LU by every entry of the matrix."""
    a = torch.randn(n, n, generator=settings.generator(), dtype=torch.float64).to(settings.device)

    def factors(a: Tensor) -> tuple[Tensor, ...]:
        return torch.linalg.lu(a)[1:]

    def in_chunks() -> tuple[Tensor, ...]:
        basis = torch.eye(n * n, dtype=a.dtype, device=a.device).view(-1, n, n)
        columns = pushed(factors, chunk=4 * n)(a, basis)
        return tuple(c.movedim(0, -1).reshape(*c.shape[1:], n, n) for c in columns)

    def in_jax(jax: Any) -> Callable:
        return jax.jacfwd(lambda a: jax.scipy.linalg.lu(a)[1:])

    arms = {
        "dualnn": Arm(lambda: lambda: jacobian(factors, a), "ours"),
        "dualnn, chunks": Arm(lambda: lambda: jacobian(factors, a, chunk=4 * n), "ours"),
        "torch.func": Arm(lambda: lambda: torch.func.jacfwd(factors)(a), "peer"),
        "torch.func, chunks": Arm(lambda: in_chunks, "peer"),
        "JAX jit": jax_arm(in_jax, (a,), settings),
    }
    note = f"dense Jacobian of torch.linalg.lu, {n * n} directions, float64; chunks of {4 * n}."
    return Benchmark("engine", "lu-jacobian", {"n": n}, arms, "torch.func", note=note)


def trace_of_hessian(size: int, width: int, settings: Settings) -> Benchmark:
    """The Laplacian of a small network."""
    g = settings.generator()
    x = torch.randn(size, generator=g, dtype=torch.float64).to(settings.device)
    weights = [
        (torch.randn(m, n, generator=g, dtype=torch.float64) / n**0.5).to(settings.device)
        for m, n in ((width, size), (width, width), (1, width))
    ]

    def network(x: Any, tanh: Callable = torch.tanh, weights: Any = weights) -> Any:
        first, second, last = weights
        return (last @ tanh(second @ tanh(first @ x))).sum()

    def by_hessian(x: Tensor) -> Tensor:
        return torch.func.hessian(network)(x).trace()

    def in_jax(jax: Any) -> Callable:
        return lambda x, *ws: jax.numpy.trace(jax.hessian(lambda z: network(z, jax.numpy.tanh, ws))(x))

    arms = {
        "dualnn, collapsed": Arm(lambda: lambda: laplacian(network, x), "ours"),
        "dualnn, nested": Arm(lambda: lambda: laplacian(network, x, method="nested"), "ours"),
        "torch.func": Arm(lambda: lambda: by_hessian(x), "peer"),
        "torch.func compiled": Arm(lambda: Compiled(by_hessian, (x,), settings.backend), "peer", compiled=True),
        "JAX jit": jax_arm(in_jax, (x, *weights), settings),
    }
    note = "trace of the Hessian of a tanh network with two hidden layers, float64; torch.func and JAX: their hessian."
    return Benchmark("engine", "laplacian", {"inputs": size, "width": width}, arms, "torch.func", note=note)


def benchmarks(settings: Settings) -> list[Benchmark]:
    """All of the group."""
    sizes = ((4, 2),) if settings.quick else ((16, 8), (65536, 32))
    chains = [chain(name, *size, settings) for name in ("chain-A", "chain-B") for size in sizes]
    small = settings.quick
    return [
        *chains,
        dense_jacobian(4 if small else 64, settings),
        trace_of_hessian(*((3, 4) if small else (64, 128)), settings),
        *(network(name, 2 if small else 8, settings) for name in NOTES),
        tridiagonal(6 if small else 10_000, settings),
    ]


ENGINE = Group(
    "the engine by itself", ("chain-A", "chain-B", "lu-jacobian", "laplacian", *NOTES, "tridiagonal"), benchmarks
)
