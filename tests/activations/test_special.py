"""The special functions over their stated ranges, against mpmath: value, first and second derivatives."""

from collections.abc import Callable
from itertools import product

import mpmath as mp
import pytest
import torch
from scipy.special import j0

from dualnn import activations
from dualnn.activations.bessel import bessel_i, bessel_j
from dualnn.activations.beta_cdf import beta_i, betainc
from dualnn.activations.zeta import hurwitz_zeta
from dualnn.engine.errors import DualInputError, UnknownNameError
from tests.activations.oracles import mp_derivative

F64 = torch.float64


def derivatives(fn: Callable, at: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    """Value, first and second derivatives by (double) backward."""
    args = [torch.tensor(a, dtype=F64, requires_grad=True) for a in at]
    y = fn(*args)
    n = len(args)
    found = {(0,) * n: y.item()}
    first = torch.autograd.grad(y, args, create_graph=True)
    for i, d in enumerate(first):
        orders = tuple(int(i == k) for k in range(n))
        found[orders] = d.item()
        for j, e in enumerate(torch.autograd.grad(d, args, retain_graph=True)):
            found[tuple(o + int(j == k) for k, o in enumerate(orders))] = e.item()
    return found


def beta_reference(a, b, x):
    if x < mp.log(a / b):
        return mp.betainc(a, b, 0, 1 / (1 + mp.exp(-x)), regularized=True)
    return 1 - mp.betainc(b, a, 0, 1 / (1 + mp.exp(x)), regularized=True)


CASES = {
    # function, oracle, points, relative and absolute error
    "zeta": (hurwitz_zeta, mp.zeta, product((1.01, 1.5, 7.3, 50.0), (0.05, 1.0, 12.0)), 5e-12, 0.0),
    "zeta far out": (hurwitz_zeta, mp.zeta, product((1.01, 3.0), (300.0, 1e4)), 5e-12, 0.0),
    "beta": (beta_i, beta_reference, product((0.05, 3.3, 200.0), (0.05, 2.0, 200.0), (-7.0, 0.4, 5.0)), 1e-12, 1e-12),
    "J": (bessel_j, mp.besselj, product((0.0, 0.5, 2.7, 100.0), (0.1, 2.0, 40.0, 500.0)), 0.0, 1e-11),
    "I": (
        bessel_i,
        lambda order, x: mp.exp(-x) * mp.besseli(order, x),
        product((0.0, 0.5, 2.7, 100.0), (0.1, 2.0, 40.0, 500.0)),
        0.0,
        1e-11,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_over_the_stated_range(case: str) -> None:
    fn, oracle, points, relative, absolute = CASES[case]
    for at in points:
        for orders, found in derivatives(fn, at).items():
            expected = mp_derivative(oracle, at, orders)
            assert found == pytest.approx(expected, rel=relative, abs=absolute), (at, orders)


def test_known_values() -> None:
    one = torch.ones((), dtype=F64)
    assert hurwitz_zeta(2 * one, one).item() == pytest.approx(torch.pi**2 / 6, rel=1e-14)
    assert beta_i(one, one, 3 * one).item() == pytest.approx(torch.sigmoid(3 * one).item(), rel=1e-14)
    x = torch.linspace(0.2, 60, 50, dtype=F64)
    torch.testing.assert_close(bessel_j(0 * x, x), torch.from_numpy(j0(x.numpy())), rtol=0, atol=1e-13)
    torch.testing.assert_close(bessel_i(0 * x + 1, x), torch.special.i1e(x), rtol=1e-12, atol=0)


def test_the_tails_of_the_beta_distribution_keep_their_digits() -> None:
    a, b = torch.tensor(0.3, dtype=F64), torch.tensor(4.0, dtype=F64)
    x = torch.tensor([-500.0, -100.0, torch.inf, -torch.inf], dtype=F64)
    y = beta_i(a, b, x)
    assert y[0].item() == pytest.approx(mp_derivative(beta_reference, (0.3, 4.0, -500.0), (0, 0, 0)), rel=1e-12)
    assert y[2:].tolist() == [1.0, 0.0]


def test_learns_the_exponent_of_a_power_law() -> None:
    n = torch.arange(1, 4000, dtype=F64)
    probability = n**-2.5 / n.pow(-2.5).sum()
    mean_log = (probability * n.log()).sum()
    s = torch.tensor(1.5, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([s], max_iter=50, tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = s * mean_log + torch.log(hurwitz_zeta(s, torch.ones_like(s)))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert s.item() == pytest.approx(2.5, abs=2e-3)  # the sum above ends at 4000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: hurwitz_zeta(t(1.0), t(1.0)), "need s > 1 and q > 0, got s >= 1"),
        (lambda t: hurwitz_zeta(t(2.0), t(0.0)), "q >= 0"),
        (lambda t: beta_i(t(0.0), t(1.0), t(0.0)), "a and b must be positive, got 0"),
        (lambda t: betainc(t(1.0), t(1.0), t(1.0)), "need 0 < z < 1, got 1"),
        (lambda t: bessel_j(t(1.0), t(0.01)), r"need 0.1 <= x <= 500 .* got x from 0.01"),
        (lambda t: bessel_i(t(-1.0), t(1.0)), "order from -1"),
        (lambda t: activations.get("zeta", s=1.0), "s must exceed 1.01, got 1.0"),
        (lambda t: activations.get("beta_cdf", a=0.01), "need 0 < minimum < a, b"),
        (lambda t: activations.get("bessel", order=0.0), "order must lie in"),
    ],
)
def test_bad_input_is_named(call: Callable, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        call(lambda v: torch.tensor(v, dtype=F64))


@pytest.mark.parametrize("options", [{"kind": "k"}, {"argument": "exp"}])
def test_unknown_options(options: dict) -> None:
    with pytest.raises(UnknownNameError, match="bessel"):
        activations.get("bessel", **options)
