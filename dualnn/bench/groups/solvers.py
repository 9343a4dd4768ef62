"""Solvers with tangents: linear algebra, roots, fixed points and minima, for one system and for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.bench.benchmark import Arm, Benchmark, Group, Settings
from dualnn.bench.groups.engine import ours
from dualnn.bench.peers import jax_arm, jax_pushed, require, torch_func
from dualnn.engine import jvp
from dualnn.solvers import fixed_point, minimize, root

# Of the unrolled peers: a data-dependent stop would not go through vmap. Six steps to the root are 1e-6 off in the
# hardest of 256 systems.
NEWTON_STEPS = {"root": 8, "minimize": 6}
PICARD_STEPS = 40
TOLERANCE = 1e-12  # of optimistix
SHARED = "float64; tangents of all parameters."


def _randn(settings: Settings, g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(settings.device)


def linear_algebra(name: str, n: int, systems: int, tangents: int, settings: Settings) -> Benchmark:
    """A solve or a factorisation, with tangents of the matrix."""
    g = settings.generator()
    batch = () if systems == 1 else (systems,)
    a = _randn(settings, g, *batch, n, n) + 4 * torch.eye(n, dtype=torch.float64, device=settings.device)
    b, t = _randn(settings, g, *batch, n, 1), _randn(settings, g, tangents, *batch, n, n)
    fn: Callable[[Tensor], Any] = {
        "solve": lambda a: torch.linalg.solve(a, b),
        "lu": lambda a: tuple(torch.linalg.lu(a))[1:],
        "qr": lambda a: tuple(torch.linalg.qr(a)),
    }[name]

    def in_jax(jax: Any) -> Callable:
        if name == "solve":
            return lambda a, t, b: jax_pushed(jax, lambda m: jax.numpy.linalg.solve(m, b))(a, t)
        if name == "lu":
            factors = lambda m: jax.scipy.linalg.lu(m)[1:]  # noqa: E731 - of one matrix only
            return jax_pushed(jax, jax.vmap(factors) if batch else factors)
        return jax_pushed(jax, lambda m: tuple(jax.numpy.linalg.qr(m)))

    arms = {
        **ours(fn, a, t, settings),
        **torch_func(fn, a, t, settings),
        "JAX jit": jax_arm(in_jax, (a, t, b) if name == "solve" else (a, t), settings),
    }
    return _benchmark(name, n, systems, tangents, arms, f"torch.linalg.{name} of n x n matrices; {SHARED}")


def _benchmark(name: str, n: int, systems: int, tangents: int, arms: dict[str, Arm], note: str) -> Benchmark:
    sizes = {"n": n, "systems": systems, "K": tangents}
    return Benchmark("solvers", name, sizes, arms, "torch.func", 1e-7, note)


def nonlinear(name: str, n: int, systems: int, tangents: int, settings: Settings) -> Benchmark:
    """A root, a fixed point or a minimum, with tangents of the parameters p, n a system."""
    g = settings.generator()
    matrix = _randn(settings, g, n, n) / (3 * n**0.5)
    p, t = _randn(settings, g, systems, n), _randn(settings, g, tangents, systems, n)
    start = torch.zeros_like(p)
    make = {"root": _root, "fixed-point": _fixed_point, "minimize": _minimize}[name]
    steps = NEWTON_STEPS.get(name, 0)
    if settings.quick:  # near the start few steps are enough
        p, steps = p / 100, 3
    fn, fast, unrolled, in_jax, note = make(matrix, start, steps)
    arms = {"dualnn": Arm(lambda: lambda: jvp(fn, (p,), (t,))[1], "ours")}
    if fast is not None and not settings.quick:
        arms["dualnn compiled"] = Arm(lambda: lambda: jvp(fast, (p,), (t,))[1], "ours", compiled=True)
    arms |= torch_func(unrolled, p, t, settings)

    def with_optimistix(jax: Any) -> Callable:
        solve = in_jax(jax, require("optimistix"))
        return lambda p, t, m: jax_pushed(jax, jax.vmap(lambda one: solve(one, m)))(p, t)

    arms["optimistix jit"] = jax_arm(with_optimistix, (p, t, matrix), settings)
    return _benchmark(name, n, systems, tangents, arms, f"{note} {SHARED}")


def _root(matrix: Tensor, start: Tensor, steps: int) -> tuple[Any, ...]:
    def residual(x: Any, p: Any, sin: Callable = torch.sin, matrix: Any = matrix) -> Any:
        return x + 0.1 * x**3 + sin(x @ matrix) - p

    def equations(x: Tensor, p: Tensor) -> Tensor:
        return residual(x, p)

    def unrolled(p: Tensor) -> Tensor:
        x = start
        for _ in range(steps):
            jacobian = torch.vmap(torch.func.jacfwd(equations))(x, p)
            x = x - torch.linalg.solve(jacobian, equations(x, p))
        return x

    def in_jax(jax: Any, optx: Any) -> Callable:
        def solve(p: Any, matrix: Any) -> Any:
            method = optx.Newton(rtol=TOLERANCE, atol=TOLERANCE)
            args = (p, matrix)
            return optx.root_find(
                lambda x, a: residual(x, a[0], jax.numpy.sin, a[1]), method, jax.numpy.zeros_like(p), args
            ).value

        return solve

    note = (
        f"x + 0.1 x^3 + sin(x A) = p by Newton's method; torch.func goes through {steps} plain Newton steps "
        "(no test of convergence, no line search), optimistix and dualnn differentiate the solution."
    )
    return (
        lambda p: root(equations, start, (p,)),
        lambda p: root(equations, start, (p,), compile=True),
        unrolled,
        in_jax,
        note,
    )


def _fixed_point(matrix: Tensor, start: Tensor, steps: int) -> tuple[Any, ...]:
    def step(z: Any, p: Any, tanh: Callable = torch.tanh, matrix: Any = matrix) -> Any:
        return tanh(z @ matrix + p)

    def unrolled(p: Tensor) -> Tensor:
        z = start
        for _ in range(PICARD_STEPS):
            z = step(z, p)
        return z

    def in_jax(jax: Any, optx: Any) -> Callable:
        def solve(p: Any, matrix: Any) -> Any:
            method = optx.FixedPointIteration(rtol=TOLERANCE, atol=TOLERANCE)
            args = (p, matrix)
            return optx.fixed_point(
                lambda z, a: step(z, a[0], jax.numpy.tanh, a[1]), method, jax.numpy.zeros_like(p), args
            ).value

        return solve

    note = (
        f"z = tanh(z A + p); torch.func goes through {PICARD_STEPS} plain iterations, dualnn (Anderson acceleration) "
        "and optimistix (plain iteration) differentiate the solution."
    )
    return lambda p: fixed_point(step, start, (p,)), None, unrolled, in_jax, note


def _minimize(matrix: Tensor, start: Tensor, steps: int) -> tuple[Any, ...]:
    def objective(x: Any, p: Any, matrix: Any = matrix) -> Any:
        return 0.5 * ((x - p) ** 2).sum(-1) + 0.25 * ((x @ matrix) ** 4).sum(-1)

    def unrolled(p: Tensor) -> Tensor:
        x = start
        for _ in range(steps):
            slope = torch.vmap(torch.func.grad(objective))(x, p)
            curvature = torch.vmap(torch.func.hessian(objective))(x, p)
            x = x - torch.linalg.solve(curvature, slope)
        return x

    def in_jax(jax: Any, optx: Any) -> Callable:
        def solve(p: Any, matrix: Any) -> Any:
            method = optx.BFGS(rtol=TOLERANCE, atol=TOLERANCE)
            args = (p, matrix)
            return optx.minimise(lambda x, a: objective(x, a[0], a[1]), method, jax.numpy.zeros_like(p), args).value

        return solve

    note = (
        f"0.5 |x - p|^2 + 0.25 sum (x A)^4 by Newton's method; torch.func goes through {steps} plain Newton "
        "steps, dualnn and optimistix (BFGS) differentiate the minimum."
    )
    return lambda p: minimize(objective, start, (p,)), None, unrolled, in_jax, note


def benchmarks(settings: Settings) -> list[Benchmark]:
    """All of the group."""
    sizes = [(2, 2)] if settings.quick else [(systems, k) for systems in (1, 256) for k in (1, 8, 64)]
    n = 3 if settings.quick else 16
    made = [linear_algebra(name, n, *size, settings) for name in ("solve", "lu", "qr") for size in sizes]
    for name, unknowns in (("root", 4), ("fixed-point", 8), ("minimize", 4)):
        made += [nonlinear(name, min(n, unknowns), *size, settings) for size in sizes]
    return made


SOLVERS = Group("solvers with tangents", ("solve", "lu", "qr", "root", "fixed-point", "minimize"), benchmarks)
