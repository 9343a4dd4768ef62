"""Independent oracles for derivatives: differences in float64, and torch's own reverse mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, dual
from dualnn.engine.registry import OpSpec, Sample


def rand(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

    return draw


def separated(sample: Sample) -> tuple[list[Tensor], Callable[..., list[Tensor]], Callable]:
    """The differentiable tensors of a sample, and a function that rebuilds the call from others in their place."""
    args, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    constant = {id(t) for i in sample.constant if i < len(sample.args) for t in pytree.tree_leaves(sample.args[i])}
    where = [
        i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype.is_floating_point and id(a) not in constant
    ]

    def call(op: Callable, *tensors: Any) -> list[Any]:
        filled = [a.clone() if isinstance(a, Tensor) and type(a) is Tensor else a for a in args]
        for i, t in zip(where, tensors, strict=True):
            filled[i] = t
        call_args, kwargs = pytree.tree_unflatten(filled, spec)
        leaves = pytree.tree_leaves(op(*call_args, **kwargs))
        return [x for x in leaves if isinstance(x, Tensor) and x.dtype.is_floating_point]

    return [args[i] for i in where], call, spec


def five_point(fn: Callable[[float], list[Tensor]], step: float = 1e-3) -> list[Tensor]:
    """d/dh of a list of tensors at h = 0, to O(step^4); steps are halved until no kink lies between the points."""

    def difference(h: float) -> list[Tensor]:
        values = [fn(k * h) for k in (-2, -1, 1, 2)]
        return [(a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in zip(*values, strict=True)]

    coarse = difference(step)
    for _ in range(8):
        fine = difference(step / 2)
        if all(torch.allclose(c, f, rtol=1e-6, atol=1e-7, equal_nan=True) for c, f in zip(coarse, fine, strict=True)):
            return fine
        coarse, step = fine, step / 2
    raise AssertionError("the sample lies on a kink: differences do not settle")


def check_first(spec: OpSpec, sample: Sample, num: int = 3) -> None:
    """Value bit for bit; K directions against differences; K = 0."""
    inputs, call, _ = separated(sample)
    draw = rand(1)
    directions = [torch.stack([draw(*x.shape) for _ in range(num)]) for x in inputs]
    plain = call(spec.op, *inputs)
    duals = call(spec.op, *[dual(x, t) for x, t in zip(inputs, directions, strict=True)])
    for p, d in zip(plain, duals, strict=True):
        assert torch.equal(d.primal, p), f"{spec.name}: value differs from the plain op's"
        assert d.tangent.shape == (num, *p.shape)
    for k in range(num):
        oracle = five_point(
            lambda h, k=k: call(spec.op, *[x + h * t[k] for x, t in zip(inputs, directions, strict=True)])
        )
        for d, o in zip(duals, oracle, strict=True):
            torch.testing.assert_close(d.tangent[k], o, rtol=1e-6, atol=1e-7)
    empty = call(spec.op, *[dual(x, x.new_zeros((0, *x.shape))) for x in inputs])
    for p, d in zip(plain, empty, strict=True):
        assert d.tangent.shape == (0, *p.shape)


def check_second(spec: OpSpec, sample: Sample) -> None:
    """Forward over forward, and reverse over forward, against the difference of a reverse gradient."""
    inputs, call, _ = separated(sample)
    draw = rand(2)
    u = [draw(*x.shape) for x in inputs]
    v = [draw(*x.shape) for x in inputs]
    weights = [draw(*p.shape) for p in call(spec.op, *inputs)]

    def gradient_along_u(h: float) -> list[Tensor]:
        moved = [(x + h * d).requires_grad_() for x, d in zip(inputs, v, strict=True)]
        total = sum((w * y).sum() for w, y in zip(weights, call(spec.op, *moved), strict=True))
        grads = torch.autograd.grad(total, moved, allow_unused=True)
        return [sum(((g * d).sum() for g, d in zip(grads, u, strict=True) if g is not None), torch.zeros(()))]

    def slope_along_u(h: float) -> list[Tensor]:  # where torch has no reverse mode: ours, checked at first order
        pushed = call(spec.op, *[dual(x + h * d, e) for x, d, e in zip(inputs, v, u, strict=True)])
        return [sum((w * _tangent(y)).sum() for w, y in zip(weights, pushed, strict=True))]

    oracle = five_point(gradient_along_u if spec.reverse else slope_along_u)[0]

    inner = [dual(dual(x, a), torch.zeros_like(x) + b) for x, a, b in zip(inputs, v, u, strict=True)]
    out = call(spec.op, *inner)
    mixed = sum((w * _tangent(_tangent(y))).sum() for w, y in zip(weights, out, strict=True))
    torch.testing.assert_close(mixed, oracle.to(mixed.dtype), rtol=1e-5, atol=1e-6)

    if not spec.reverse:
        return
    leaves = [x.clone().requires_grad_() for x in inputs]
    pushed = call(spec.op, *[dual(x, d) for x, d in zip(leaves, u, strict=True)])
    total = sum((w * y.tangent[0]).sum() for w, y in zip(weights, pushed, strict=True))
    if total.requires_grad:
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        reverse = sum((g * d).sum() for g, d in zip(grads, v, strict=True) if g is not None)
    else:
        reverse = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(
        torch.as_tensor(reverse, dtype=mixed.dtype), oracle.to(mixed.dtype), rtol=1e-5, atol=1e-6
    )


def _tangent(x: Tensor) -> Tensor:
    """The only direction of a dual (zeros for a constant)."""
    return x.tangent[0] if isinstance(x, DualTensor) else torch.zeros_like(x)
