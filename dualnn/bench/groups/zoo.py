"""Layers against backprop through the same code: an implicit activation, an opaque loop, a long simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.implicit_tanh import implicit_tanh
from dualnn.bench.benchmark import Arm, Benchmark, Group, Run, Settings
from dualnn.bench.peers import checkpointed, gradients
from dualnn.engine import compile, jvp
from dualnn.layers import Dual

Activation = Callable[[Tensor, Tensor, Tensor], Tensor]
AT_ONCE = 10  # steps of the oscillator in one program


def newton_step(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One Newton step for y + a tanh(b y) = x."""
    t = torch.tanh(b * y)
    return y - (y + a * t - x) / (1 + a * b * (1 - t * t))


class ByHand(torch.autograd.Function):
    """The derivative of that solution, as an expert writes it, with the loop in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, steps: int) -> Tensor:
        """The solution."""
        y, ab = x.clone(), a * b
        t, s = torch.empty_like(y), torch.empty_like(y)
        for _ in range(steps):
            torch.mul(b, y, out=t).tanh_()
            torch.mul(t, t, out=s).neg_().add_(1).mul_(ab).add_(1)
            y.sub_(t.mul_(a).add_(y).sub_(x).div_(s))
        ctx.save_for_backward(y, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """By the implicit function theorem."""
        y, a, b = ctx.saved_tensors
        t = torch.tanh(b * y)
        s = 1 - t * t
        w = grads[0] / (1 + a * b * s)
        return w, -(t * w).sum(0), -(a * y * s * w).sum(0), None


def _mlp_step(sizes: tuple[int, int, int], batch: int, settings: Settings) -> tuple[Callable, tuple[Tensor, Tensor]]:
    """``step(activation) -> run``: an MLP with that activation, loss and gradient; and the activation's a, b."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = (nn.Linear(m, n).to(settings.device) for m, n in zip(sizes, sizes[1:], strict=False))
        a, b = ((1 + 0.1 * torch.rand(sizes[1])).to(settings.device).requires_grad_() for _ in range(2))
        x = torch.randn(batch, sizes[0]).to(settings.device)
        target = torch.randint(0, sizes[2], (batch,)).to(settings.device)
    parameters = [*first.parameters(), *last.parameters(), a, b]

    def step(activation: Callable[[Tensor], Tensor], learn: bool = True) -> Run:
        used = parameters if learn else parameters[:-2]
        return lambda: gradients(nn.functional.cross_entropy(last(activation(first(x))), target), used)

    return step, (a, b)


def implicit_activation(sizes: tuple[int, int, int], batch: int, steps: int, settings: Settings) -> Benchmark:
    """The activation that is an equation's solution."""
    step, (a, b) = _mlp_step(sizes, batch, settings)
    segment = max(round(steps**0.5), 1)

    def unrolled(x: Tensor) -> Tensor:
        y = x
        for _ in range(steps):
            y = newton_step(y, x, a, b)
        return y

    arms = {
        "implicit_tanh": Arm(lambda: step(lambda x: implicit_tanh(x, a, b, tol=0, max_steps=steps)), "ours"),
        "implicit_tanh, stops when solved": Arm(lambda: step(lambda x: implicit_tanh(x, a, b)), "ours"),
        "unrolled backprop": Arm(lambda: step(unrolled), "peer"),
        "unrolled, checkpoint": Arm(
            lambda: step(lambda x: checkpointed(newton_step, x, steps, segment, x, a, b)), "peer"
        ),
        "Function by hand": Arm(lambda: step(lambda x: ByHand.apply(x, a, b, steps)), "peer"),
    }
    note = (
        f"y + a tanh(b y) = x inside an MLP's training step, float32. All run {steps} Newton steps but the arm that "
        "stops when solved."
    )
    parameters = {"hidden": sizes[1], "batch": batch, "steps": steps}
    return Benchmark("zoo", "implicit-tanh", parameters, arms, "unrolled backprop", 1e-3, note)


def opaque_loop(sizes: tuple[int, int, int], batch: int, steps: int, arguments: int, settings: Settings) -> Benchmark:
    """The same loop, of which the layer knows nothing."""
    step, (a, b) = _mlp_step(sizes, batch, settings)
    one = torch.ones((), device=settings.device)
    rest = (a, b) if arguments == 3 else ()
    segment = max(round(steps**0.5), 1)

    def loop(x: Tensor, *rest: Tensor) -> Tensor:
        y = x
        for _ in range(steps):
            y = newton_step(y, x, *(rest or (one, one)))
        return y

    layer = Dual(loop, "elementwise")
    arms = {
        "Dual": Arm(lambda: step(lambda x: layer(x, *rest), bool(rest)), "ours"),
        "backprop": Arm(lambda: step(lambda x: loop(x, *rest), bool(rest)), "peer"),
        "backprop, checkpoint": Arm(
            lambda: step(lambda x: checkpointed(newton_step, x, steps, segment, x, *(rest or (one, one))), bool(rest)),
            "peer",
        ),
    }
    note = (
        "A Newton loop whose equation nobody states, inside an MLP's training step, float32: duals through every step "
        "(memory independent of the steps) beside backprop through every step."
    )
    parameters = {"hidden": sizes[1], "batch": batch, "steps": steps, "arguments": arguments}
    return Benchmark("zoo", "opaque-loop", parameters, arms, "backprop", 1e-3, note)


def oscillator(trajectories: int, steps: int, settings: Settings) -> Benchmark:
    """Duffing's oscillator x'' = -d x' - a x - b x^3 + g cos t, by Euler's method: four parameters, many steps."""
    g = settings.generator()
    x0, v0 = (torch.randn(trajectories, generator=g, dtype=torch.float64).to(settings.device) for _ in range(2))
    parameters = torch.tensor([0.3, -1.0, 1.0, 0.37], dtype=torch.float64, device=settings.device)
    times = torch.arange(steps, dtype=torch.float64, device=settings.device) * 1e-3
    drive = torch.cos(times).unbind()
    leaf = parameters.clone().requires_grad_()

    def step(state: tuple[Tensor, Tensor, int], p: Tensor) -> tuple[Tensor, Tensor, int]:
        x, v, i = state
        d, a, b, gamma = p.unbind()
        force = gamma * drive[i] - d * v - x * (a + b * x * x)
        return x + 1e-3 * v, v + 1e-3 * force, i + 1

    def energy(p: Tensor) -> Tensor:
        state: tuple[Tensor, Tensor, int] = (x0, v0, 0)
        for _ in range(steps):
            state = step(state, p)
        return (state[0] ** 2 + state[1] ** 2).mean()

    def several(x: Tensor, v: Tensor, drives: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        d, a, b, gamma = p.unbind()
        for w in drives.unbind():
            x, v = x + 1e-3 * v, v + 1e-3 * (gamma * w - d * v - x * (a + b * x * x))
        return x, v

    def by_program(program: Callable, p: Tensor) -> Tensor:
        x, v = x0, v0
        for drives in torch.cos(times).split(AT_ONCE):
            x, v = program(x, v, drives, p)
        return (x**2 + v**2).mean()

    def by_duals(energy: Callable[[Tensor], Tensor] = energy) -> Any:
        value, slope = jvp(energy, (parameters,), (torch.eye(4, dtype=torch.float64, device=settings.device),))
        return {"loss": value, "gradient": [slope]}

    def duals_compiled() -> Run:
        program = compile(several, backend=settings.backend)
        return lambda: by_duals(lambda p: by_program(program, p))

    def backprop_compiled() -> Run:
        program = torch.compile(several, fullgraph=True, dynamic=False, backend=settings.backend)
        return lambda: gradients(by_program(program, leaf), [leaf])

    def by_checkpoints() -> Any:
        x, v, _ = checkpointed(step, (x0, v0, 0), steps, max(round(steps**0.5), 1), leaf)
        return gradients((x**2 + v**2).mean(), [leaf])

    arms = {
        "dualnn": Arm(lambda: by_duals, "ours"),
        f"dualnn, {AT_ONCE} steps compiled": Arm(duals_compiled, "ours", compiled=True),
        "backprop": Arm(lambda: lambda: gradients(energy(leaf), [leaf]), "peer"),
        "backprop, checkpoint": Arm(lambda: by_checkpoints, "peer"),
        f"backprop, {AT_ONCE} steps compiled": Arm(backprop_compiled, "peer", compiled=True),
    }
    note = f"four parameters, {steps:,} Euler steps (backprop's memory grows with them), float64."
    sizes = {"trajectories": trajectories, "steps": steps}
    return Benchmark("zoo", "duffing", sizes, arms, "backprop", 1e-8, note)


def benchmarks(settings: Settings) -> list[Benchmark]:
    """All of the group."""
    sizes, batch, steps = ((5, 6, 3), 4, 8) if settings.quick else ((784, 1024, 10), 256, 200)
    return [
        implicit_activation(sizes, batch, steps, settings),
        *(opaque_loop(sizes, batch, steps, arguments, settings) for arguments in (1, 3)),
        oscillator(*((3, 20) if settings.quick else (64, 10_000)), settings),
    ]


ZOO = Group("layers against backprop through the same code", ("implicit-tanh", "opaque-loop", "duffing"), benchmarks)
