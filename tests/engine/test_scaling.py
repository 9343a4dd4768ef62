"""Products of directions with derivatives: equal to the plain formula, owned, formed late only where it is the same."""

import itertools

import pytest
import torch
from torch import Tensor

import dualnn as dn
from dualnn.engine.bridge import slopes
from dualnn.engine.scaling import number, one_minus_square, product, sum_of_products, surely_finite, times
from dualnn.engine.tangents import Dense, Separate
from tests.engine.oracles import five_point, rand

F64 = torch.float64
OPERANDS = {
    "one": lambda seed: 1.0,
    "minus": lambda seed: -1.0,
    "number": lambda seed: 0.3 * seed,
    "full": lambda seed: rand(seed)(4, 3),
    "row": lambda seed: rand(seed)(3),
    "scalar": lambda seed: rand(seed)(),
}
FACTORS = {**OPERANDS, "mask": lambda seed: rand(seed)(4, 3) > 0}


def plain(x):
    return x.to(F64) if isinstance(x, Tensor) else x


PAIRS = list(itertools.product(OPERANDS, FACTORS))


@pytest.mark.parametrize(("part", "factor"), PAIRS)
def test_product(part, factor):
    p, f = OPERANDS[part](1), FACTORS[factor](2)
    out = product(p, f, F64)
    torch.testing.assert_close(torch.as_tensor(out, dtype=F64), torch.as_tensor(plain(p) * plain(f), dtype=F64))
    if isinstance(out, Tensor):
        assert out.dtype == F64 and (not isinstance(f, Tensor) or out.data_ptr() != f.data_ptr())


@pytest.mark.parametrize(("pa", "fa"), PAIRS)
def test_sum_of_products(pa, fa):
    for pb, fb in PAIRS:
        operands = OPERANDS[pa](1), FACTORS[fa](2), OPERANDS[pb](3), FACTORS[fb](4)
        before = [o.clone() if isinstance(o, Tensor) else o for o in operands]
        a, x, b, y = (plain(o) for o in operands)
        out = sum_of_products(*operands, F64)
        torch.testing.assert_close(torch.as_tensor(out, dtype=F64), torch.as_tensor(a * x + b * y, dtype=F64))
        for o, kept in zip(operands, before, strict=True):
            if isinstance(o, Tensor):
                assert torch.equal(o, kept) and out.data_ptr() != o.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, -1.0, 1e-30, 0.0, -0.0, 1e300, float("inf")])
def test_a_number_multiplies_as_torch_multiplies_it(value, dtype):
    t = rand(1)(5).to(dtype)
    torch.testing.assert_close(times(t, value), t * value, rtol=0, atol=0, equal_nan=True)
    assert times(t, value).dtype == dtype
    assert isinstance(number(value, t), Tensor) == (dtype in (torch.float32, F64) and value != 0)


def test_numbers_stay_numbers_inside_a_transform():
    seen = []

    def look(t):
        seen.append(number(2.0, t))
        return t

    torch.vmap(look)(rand(1)(2, 3))
    assert seen == [2.0]


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16])
def test_one_minus_square(dtype):
    y = rand(1)(7, low=-1.0, high=1.0).to(dtype)
    torch.testing.assert_close(one_minus_square(y), 1 - y * y)
    assert torch.equal(one_minus_square(torch.ones(2)), torch.zeros(2))


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ([1.0, -2.0], True),
        ([torch.inf, 1.0], False),
        ([torch.inf, -torch.inf], False),
        ([torch.nan, 1.0], False),
        ([3e38, 3e38], False),  # finite, but the sum is not: the slow way is taken, which is right as well
        ([], True),
    ],
)
def test_surely_finite(factor, expected):
    assert surely_finite(torch.tensor(factor)) is expected
    assert surely_finite(torch.tensor(factor).requires_grad_()) is expected
    assert surely_finite(torch.tensor(factor).to(torch.complex64)) is expected


def test_surely_finite_of_numbers_and_inside_transforms():
    assert surely_finite(2.0) and not surely_finite(float("nan")) and surely_finite(1j)
    seen = []
    torch.vmap(lambda t: (seen.append(surely_finite(t)), t)[1])(torch.ones(2, 3))
    assert seen == [False]


def program(w):
    """Signs and quotients wait in it; ``w`` is a constant that the caller may overwrite later."""

    def fn(x, a, b):
        t = torch.tanh(b * x)
        y = x - (x + a * t - w) / (1 + a * b * (1 - t * t))
        return -(-(y / (1 + x * x)) * w) - y

    return fn


ARGS = (rand(1)(4, 3), rand(2)(3), rand(3)(3))


def test_what_waits_equals_finite_differences():
    fn = program(rand(5)(4, 3))
    _, partials = slopes(fn, ARGS)
    for i in range(3):
        moved = lambda h, i=i: [fn(*(x + h * (j == i) for j, x in enumerate(ARGS)))]  # noqa: E731
        torch.testing.assert_close(partials[i], five_point(moved)[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("write", [lambda w: w.fill_(7.0), lambda w: w.data.fill_(7.0)])
def test_an_operand_overwritten_after_the_op(write):
    def fn(w, late):
        def run(x, a):
            y = x * w / (a * w)  # everything that has w as a factor
            if late:
                write(w)
            return -y

        return run

    args = ARGS[0], ARGS[1] ** 2 + 1
    for late, early in zip(
        slopes(fn(rand(5)(4, 3), True), args)[1], slopes(fn(rand(5)(4, 3), False), args)[1], strict=True
    ):
        assert torch.equal(late, early)


def test_nothing_waits_that_autograd_records():
    x = rand(1)(3).requires_grad_()
    tan = Separate(2, {0: x}, x.shape).scale(-1.0, x.shape)
    with torch.no_grad():
        part = tan.parts[0]
    assert part.requires_grad  # it was formed where it was written, not where it was read
    factor = (x * 2).detach().requires_grad_()
    held = Separate(2, {0: rand(2)(3)}, x.shape).delayed(factor, x.shape)
    with torch.no_grad():
        assert held.parts[0].requires_grad


def test_a_delayed_factor_does_not_meet_another():
    """Their product vanishes, the derivative does not."""
    small = torch.full((2,), 1e-30)
    tan = Separate(2, {0: torch.full((2,), 1e38), 1: 1.0}, small.shape)
    out = tan.delayed(small, small.shape).delayed(small, small.shape)
    torch.testing.assert_close(out.parts[0], torch.full((2,), 1e-22))
    assert set(out.parts) == {0, 1}


def test_zero_directions_at_a_pole_stay_zero():
    a, b = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.0, 4.0], dtype=F64)
    none, one = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)
    _, pushed = dn.jvp(lambda a, b: a / b, (a, b), (torch.stack([none, one]), torch.stack([none, none])))
    assert torch.equal(pushed, torch.tensor([[0.0, 0.0], [torch.inf, 0.25]], dtype=F64))


@pytest.mark.parametrize("op", [torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.logaddexp, torch.pow])
def test_one_dual_as_both_operands(op):
    x = rand(1)(3, low=0.5, high=2.0)
    v = rand(2)(3)
    _, first = dn.jvp(lambda x: op(x, x), (x,), (v,))
    _, apart = dn.jvp(lambda x, y: op(x, y), (x, x.clone()), (v, v))
    torch.testing.assert_close(first, apart)
    second = lambda f: dn.jvp(lambda x: dn.jvp(f, (x,), (v,))[1], (x,), (v,))[1]  # noqa: E731
    torch.testing.assert_close(second(lambda x: op(x, x)), second(lambda x: op(x, x * 1.0)))


@pytest.mark.parametrize("kind", ["dense", "separate"])
def test_sums_leave_their_terms_alone(kind):
    """Products are added in place into temporaries only."""
    new = (lambda s: Dense(rand(s)(2, 3))) if kind == "dense" else (lambda s: Separate(2, {0: rand(s)(3)}, (3,)))
    a, b, fa, fb = new(1), new(2), rand(3)(3), rand(4)(3)
    before = [t.clone() for t in (a.dense(), b.dense(), fa, fb)]
    a.joined(fa, b, fb, torch.Size((3,)))
    a.joined(1.0, b, fb, torch.Size((3,)))
    for t, kept in zip((a.dense(), b.dense(), fa, fb), before, strict=True):
        assert torch.equal(t, kept)
