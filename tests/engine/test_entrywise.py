"""Programs taken apart into entries: the results of torch's own kernels."""

import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dualnn.engine.entrywise import entrywise

F64 = torch.float64


def recorded(fn, *inputs):
    with torch.no_grad():
        return make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def check(fn, inputs, batched, **tolerance):
    """``fn`` returns a tuple of tensors whose last axis is the batch, if there is one."""
    program = entrywise(recorded(fn, *inputs), batched)
    assert program is not None
    for got, wanted in zip(program(*inputs), fn(*inputs), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, **{"rtol": 1e-13, "atol": 1e-15, **tolerance})


def special(dtype=F64):
    """Ordinary numbers, zeros of both signs, and what is not finite."""
    return torch.tensor([0.3, -1.7, 0.0, -0.0, 2.0, math.inf, -math.inf, math.nan, 0.5, 1.0, -1.0], dtype=dtype)


UNARY = {
    "abs": torch.abs, "neg": torch.neg, "reciprocal": torch.reciprocal, "sqrt": torch.sqrt, "exp": torch.exp,
    "log": torch.log, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "expm1": torch.expm1, "log1p": torch.log1p, "rsqrt": torch.rsqrt, "relu": torch.relu,
    "sign": torch.sign, "floor": torch.floor, "power": lambda x: x**2.5, "square": lambda x: x**2,
    "base": lambda x: 2.0**x, "isfinite": lambda x: torch.isfinite(x).to(x.dtype),
    "clamp": lambda x: x.clamp(-0.5, 0.7), "clamp_min": lambda x: x.clamp_min(0.1),
    "nan_to_num": lambda x: torch.nan_to_num(x, 0.2, 6.0, -3.0),
}  # fmt: skip
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "atan2": torch.atan2, "where": lambda x, y: torch.where((x > y) | (y <= 0), x, y),
    "compare": lambda x, y: (x >= y).to(x.dtype) + (x == y).to(x.dtype) * 2 + (x != y).to(x.dtype) * 4,
    "logic": lambda x, y: torch.where((x < y) & ~(y < 1), 3.0, y),
    "count": lambda x, y: (torch.ones_like(x, dtype=torch.int64) + (x < y)).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("many", [True, False])
def test_every_operation(many, dtype):
    """On ordinary and special numbers, in vectors of eight (with a rest) and one by one."""
    x = special(dtype)
    x, y = (v.contiguous() for v in torch.meshgrid(x, x, indexing="ij"))
    if many:
        x, y = x.reshape(-1), y.reshape(-1)
    else:
        x, y = (torch.cat([v.reshape(-1)[::9]]) for v in (x, y))

    def fn(x, y):
        one, two = [g(x) for g in UNARY.values()], [g(x, y) for g in BINARY.values()]
        return torch.stack(one), torch.stack(two)

    tolerance = {"rtol": 1e-13, "atol": 1e-15} if dtype == F64 else {"rtol": 2e-6, "atol": 1e-7}
    check(fn, (x, y), (many, many), **tolerance)


def test_a_captured_tensor_is_as_it_was():
    matrix = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=F64)
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 11.0]], dtype=F64)
    check(lambda x: (torch.stack([(r.unsqueeze(-1) * x).sum(0) for r in matrix.unbind(0)]),), (x,), (True,))


def test_moving_entries():
    def fn(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        y = x.movedim(-1, 0)  # (B, 2, 3)
        a, b = y.unbind(1)
        joined = torch.cat([a, b, torch.zeros_like(a)], -1)
        seeds = torch.eye(3, dtype=x.dtype).reshape(3, 1, 3).expand(3, len(y), 3)
        pushed = (seeds * a).sum(-1) + y[:, 0, 1:].amax(-1) - y.transpose(1, 2).reshape(len(y), 6)[:, 2]
        size = torch.linalg.vector_norm(joined, dim=-1)
        mixed = (p @ a.unsqueeze(-1)).squeeze(-1)
        return joined.T.contiguous(), pushed, size, mixed.movedim(0, -1).contiguous(), (a > 0).all(-1) | (b < 0).any(-1)

    generator = torch.Generator().manual_seed(0)
    x, p = torch.randn(2, 3, 11, dtype=F64, generator=generator), torch.randn(3, 3, dtype=F64, generator=generator)
    check(fn, (x, p), (True, False))


@pytest.mark.parametrize("n", [1, 4, 7])
def test_linear_systems(n):
    """Pivots that differ from sample to sample, zeros among them, and a singular one, which spoils no other."""
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(9, *shape, dtype=F64, generator=generator) for shape in ((n, n), (n, 2)))
    a[0] = torch.eye(n, dtype=F64).flip(0)
    a[1] = 0

    def fn(a, b):
        lu, pivots, _ = torch.linalg.lu_factor_ex(a.movedim(-1, 0))
        return (torch.linalg.lu_solve(lu, pivots, b.movedim(-1, 0)).movedim(0, -1).contiguous(),)

    inputs = tuple(x.movedim(0, -1).contiguous() for x in (a, b))
    program = entrywise(recorded(fn, *inputs), (True, True))
    assert program is not None
    found = program(*inputs)[0].movedim(-1, 0)
    torch.testing.assert_close(found[0], torch.linalg.solve(a[0], b[0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2:], torch.linalg.solve(a[2:], b[2:]), rtol=1e-10, atol=1e-10)
    assert not bool(found[1].isfinite().any())


def test_structural_zeros():
    """A seed's zero times an infinite factor stays 0, as in a tangent that is structurally zero."""

    def fn(x):
        return (torch.eye(2, dtype=F64) * (1 / x),)

    program = entrywise(recorded(fn, torch.ones(2, dtype=F64)), (False,))
    torch.testing.assert_close(
        program(torch.tensor([0.0, 2.0], dtype=F64))[0], torch.tensor([[math.inf, 0], [0, 0.5]]).to(F64)
    )


def test_repeating():
    """Until an answer changes; the state before and after the last run, whichever memory holds them."""

    def fn(x, limit):
        new = x + 1
        return new, torch.stack([new < limit, new == 4])

    x = torch.zeros(3, dtype=F64)
    for limit, runs in ((1, 1), (2, 2), (3, 3), (9, 4)):
        inputs = (x + torch.tensor([0.0, 0.5, -0.5]), torch.tensor([limit, limit - 1.5, 0]).to(F64))
        program = entrywise(recorded(fn, *inputs), (True, True))
        count, old, (new, flags) = program.repeat(inputs, 1, 100)
        assert count == runs
        torch.testing.assert_close(new, inputs[0] + runs)
        torch.testing.assert_close(old[0], inputs[0] + runs - 1)
        assert bool(flags[1].any()) == (runs == 4)
    assert program.repeat(inputs, 1, 2)[0] == 2


CAPTURED = torch.zeros(5000, 1, dtype=F64)
LEFT = {
    "a sum over the batch": lambda x: (x - x.sum(-1, keepdim=True),),
    "a function that is not in the tables": lambda x: (torch.digamma(x),),
    "an operation without a rule": lambda x: (x.cumsum(0),),
    "a captured tensor that is large": lambda x: (x + CAPTURED[:3],),
    "the batch merged with another axis": lambda x: (x.reshape(-1).flip(0).reshape(3, 5),),
    "a dtype that is not in the tables": lambda x: (x.to(torch.float16),),
    "numbers that differ from sample to sample": lambda x: (x * torch.arange(5.0, dtype=F64),),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_others(name):
    assert entrywise(recorded(LEFT[name], torch.ones(3, 5, dtype=F64)), (True,)) is None


def test_large_tensors_are_left_to_others():
    assert entrywise(recorded(lambda x: (x + 1,), torch.ones(5000, dtype=F64)), (False,)) is None
