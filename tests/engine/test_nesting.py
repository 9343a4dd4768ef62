"""Nested derivatives: levels keep infinitesimals apart, and the tests of that are alive."""

import contextlib
import itertools
import math

import pytest
import torch

import dualnn as dn
from dualnn.engine import levels, transforms
from tests.engine.oracles import five_point

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")  # torch's own import

ONE = torch.tensor(1.0, dtype=torch.float64)


def d(fn, x):
    """Derivative of a scalar function, by dualnn.jvp."""
    x = x if isinstance(x, torch.Tensor) else torch.tensor(float(x), dtype=torch.float64)
    return dn.jvp(fn, (x,), (torch.ones_like(x),))[1]


def nth(fn, x, order):
    for _ in range(order):
        fn = (lambda g: lambda t: d(g, t))(fn)
    return float(fn(torch.tensor(float(x), dtype=torch.float64)))


def confusion_sum():
    return float(d(lambda x: x * d(lambda y: x + y, 1.0), 1.0))


def confusion_product():
    return float(d(lambda x: x * d(lambda y: x * y, 1.0), 4.0))


def test_perturbation_confusion():
    assert confusion_sum() == 1.0
    assert confusion_product() == 8.0


def test_with_one_level_for_all_the_confusion_tests_would_fail(monkeypatch):
    @contextlib.contextmanager
    def one_level():
        yield 1

    monkeypatch.setattr(transforms, "fresh_level", one_level)
    assert confusion_sum() == 2.0  # the well-known wrong answer: y's derivative has picked up x's tangent


def test_levels_grow_and_hand_made_duals_sit_above_their_context():
    with levels.fresh_level() as outer:
        assert dn.dual(ONE, ONE).level > outer
        with levels.fresh_level() as inner:
            assert inner > outer and dn.dual(ONE, ONE).level > inner
        assert outer < dn.dual(ONE, ONE).level < inner
    assert dn.dual(ONE, ONE).level == dn.dual(ONE, ONE).level < outer


def test_a_dual_of_a_dual_gets_a_level_of_its_own():
    inner = dn.dual(ONE * 2, ONE)
    outer = dn.dual(inner, ONE)
    y = outer**3
    assert outer.level > inner.level
    assert float(y.tangent[0].tangent[0]) == 12.0  # 6 x
    assert float(y.primal.tangent[0]) == float(y.tangent[0].primal) == 12.0  # 3 x^2


def test_seeds_may_be_dual():
    def directional(v):  # a derivative that is linear in its direction
        return dn.jvp(torch.sin, (ONE,), (v,))[1]

    assert float(d(directional, 2.0)) == pytest.approx(math.cos(1.0))


@pytest.mark.parametrize(
    ("order", "expected"),
    [(0, 4.497780053946162), (1, 4.053427893898621), (2, 9.463073681596603), (3, 32.16790451368894)],
)
def test_num_duals_example(order, expected):
    def fn(x):
        return torch.exp(x) / torch.sqrt(torch.sin(x) ** 3 + torch.cos(x) ** 3)

    assert nth(fn, 1.5, order) == pytest.approx(expected, rel=1e-13)


def test_third_derivatives():
    assert nth(lambda x: torch.cos(x) ** 3, 1.0, 3) == pytest.approx(1.5836632930100278, rel=1e-13)
    assert nth(lambda x: torch.digamma(x), 2.5, 3) == pytest.approx(float(torch.polygamma(3, ONE * 2.5)), rel=1e-12)
    assert nth(lambda x: x**5, 2.0, 5) == pytest.approx(120.0)
    assert nth(torch.tanh, 0.3, 4) == pytest.approx(
        float(five_point(lambda h: [torch.tensor(nth(torch.tanh, 0.3 + h, 3), dtype=torch.float64)])[0]), rel=1e-7
    )


def test_layer_norm_second_derivative():
    def fn(t):
        return torch.nn.functional.layer_norm(torch.stack([-t, t]), (2,), eps=1.0)[0]

    assert nth(fn, 0.7, 2) == pytest.approx(0.7749142079590942, rel=1e-13)


def test_digamma_derivative_is_good_to_rounding():
    # torch.polygamma(1, .) itself is off by 5e-10; trigamma(1) = pi^2 / 6, trigamma(1/2) = pi^2 / 2
    assert nth(torch.digamma, 1.0, 1) == pytest.approx(math.pi**2 / 6, rel=1e-15)
    assert nth(torch.digamma, 0.5, 1) == pytest.approx(math.pi**2 / 2, rel=1e-15)
    assert nth(torch.lgamma, 0.5, 2) == pytest.approx(math.pi**2 / 2, rel=1e-15)
    assert nth(lambda x: torch.polygamma(0, x), 0.5, 1) == pytest.approx(math.pi**2 / 2, rel=1e-15)
    # Left of 0 by reflection: trigamma(-3/2) = pi^2 - trigamma(5/2), with trigamma(5/2) = pi^2 / 2 - 4 (1 + 1/9)
    assert nth(torch.digamma, -1.5, 1) == pytest.approx(math.pi**2 / 2 + 4 * (1 + 1 / 9), rel=1e-8)


def test_a_structural_zero_meets_infinity():
    x = torch.tensor([0.0, 0.0])
    assert torch.equal(torch.log(dn.dual(x, torch.tensor([0.0, 1.0]))).tangent[0], torch.tensor([0.0, torch.inf]))
    assert torch.equal(torch.sqrt(dn.dual(x, torch.tensor([0.0, 1.0]))).tangent[0], torch.tensor([0.0, torch.inf]))
    constant = dn.jvp(lambda x, y: torch.log(x) + y, (x, x), (torch.zeros(2), torch.ones(2)))[1]
    assert torch.equal(constant, torch.ones(2))


def test_where_selects_and_never_multiplies():
    x = dn.dual(torch.tensor([0.0, 4.0]), torch.ones(2))
    out = torch.where(x > 0, torch.sqrt(x), x)
    assert torch.equal(out.tangent[0], torch.tensor([1.0, 0.25]))
    out = torch.where(x > 0, torch.log(x), 0.0)
    assert torch.equal(out.tangent[0], torch.tensor([0.0, 0.25]))
    out = torch.sqrt(x).masked_fill(x == 0, 0.0)
    assert torch.equal(out.tangent[0], torch.tensor([0.0, 0.25]))


def test_reverse_over_dual_and_dual_over_reverse():
    w = torch.tensor([0.3, -0.7], dtype=torch.float64)

    def fn(x):
        return (torch.sin(x) * x.flip(0) ** 2).sum()

    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    leaf = w.clone().requires_grad_()
    _, pushed = dn.jvp(fn, (leaf,), (v,))
    (reverse_over_dual,) = torch.autograd.grad(pushed, leaf)
    oracle = torch.func.hessian(fn)(w) @ v
    torch.testing.assert_close(reverse_over_dual, oracle)
    torch.testing.assert_close(dn.jvp(lambda x: dn.jvp(fn, (x,), (v,))[1], (w,), (w,))[1], w @ oracle)
    torch.testing.assert_close(torch.func.grad(lambda x: dn.jvp(fn, (x,), (v,))[1])(w), oracle)


def test_mixed_partials_commute():
    def fn(x, y):
        return torch.exp(x * y) * torch.sin(y)

    xy = d(lambda x: d(lambda y: fn(x, y), 0.4), 0.9)
    yx = d(lambda y: d(lambda x: fn(x, y), 0.9), 0.4)
    assert float(xy) == pytest.approx(float(yx), rel=1e-14)


def test_detach_cuts_every_level_as_in_torch():
    def fn(x):
        return x * x.detach()

    assert nth(fn, 3.0, 1) == 3.0
    assert nth(fn, 3.0, 2) == 0.0 == float(torch.func.grad(torch.func.grad(fn))(ONE * 3))

    def mixed(diff):
        return lambda z: diff(lambda w: w * (w * z).detach(), ONE) * z

    ours = d(mixed(d), 3.0)
    torchs = torch.func.grad(mixed(lambda f, x: torch.func.grad(f)(x)))(ONE * 3)
    assert float(ours) == float(torchs) == 3.0


def test_a_function_that_returns_its_own_dual_raises():
    with pytest.raises(dn.UnsupportedOpError, match="primal"):
        dn.jvp(lambda x: dn.dual(x, torch.ones_like(x)), (ONE,), (ONE,))


def test_failure_inside_leaves_the_levels_clean():
    before = levels.user_level()
    with pytest.raises(ZeroDivisionError):
        dn.jvp(lambda x: 1 // 0, (ONE,), (ONE,))
    assert levels.user_level() == before


def test_orders_of_a_polynomial_by_brute_force():
    for order, power in itertools.product(range(1, 4), range(1, 5)):
        expected = math.perm(power, order) * 1.5 ** max(power - order, 0) if power >= order else 0.0
        assert nth(lambda x, p=power: x**p, 1.5, order) == pytest.approx(expected)
