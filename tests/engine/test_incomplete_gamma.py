"""P(a, x) and its derivatives in the shape, over the ranges that GammaCDF states."""

import random

import mpmath as mp
import pytest
import torch
from scipy import special

from dualnn.engine.bridge import elementwise
from dualnn.engine.errors import ConvergenceError
from dualnn.engine.incomplete_gamma import log_gamma, lower_gamma, shape_derivative

DIGITS = 40
STEP = "1e-10"


def points() -> list[tuple[float, float]]:
    draw = random.Random(0)
    found = [(a, a + d) for a in (0.05, 1.0, 2.0, 20.0, 100.0, 200.0) for d in (0.0, 0.95, 1.0, 1.05, 2.9, 3.1)]
    for _ in range(60):
        a = draw.choice([draw.uniform(0.05, 2), draw.uniform(2, 200), 10 ** draw.uniform(-1.3, 2.3)])
        found.append((a, draw.choice([draw.uniform(0, 2 * a + 1), draw.uniform(0, 500), 10 ** draw.uniform(-6, 2)])))
    return found


def reference(order: int, a: mp.mpf, x: mp.mpf) -> mp.mpf:
    def p(shape: mp.mpf) -> mp.mpf:
        if x < a + 1:
            return mp.gammainc(shape, 0, x, regularized=True)
        upper = mp.gammainc(shape, x, mp.inf, regularized=True)  # exp(-500) would drown in 1 - Q
        return 1 - upper if order == 0 else -upper

    h = mp.mpf(STEP)
    if order == 0:
        return p(a)
    f = [p(a + k * h) for k in (-2, -1, 0, 1, 2)]
    if order == 1:
        return (f[0] - 8 * f[1] + 8 * f[3] - f[4]) / (12 * h)
    return (-f[0] + 16 * f[1] - 30 * f[2] + 16 * f[3] - f[4]) / (12 * h * h)


@pytest.mark.parametrize(("order", "tolerance"), [(0, 1e-12), (1, 1e-12), (2, 1e-9)])
def test_derivatives_in_the_shape_equal_mpmath(order: int, tolerance: float) -> None:
    a, x = (torch.tensor(column, dtype=torch.float64) for column in zip(*points(), strict=True))
    u = torch.log(x)
    values = shape_derivative(order, u, a)
    with mp.workdps(DIGITS):
        for value, shape, log_x in zip(values.tolist(), a.tolist(), u.tolist(), strict=True):
            expected = reference(order, mp.mpf(shape), mp.exp(mp.mpf(log_x)))
            if abs(expected) > 1e-300:
                # order 2 has a zero between: relative to the value nearly everywhere, and never off by more than this
                assert float(abs(value - expected) / abs(expected)) < tolerance, (shape, float(mp.exp(log_x)))


def test_value_equals_scipy_where_torch_does_not() -> None:
    a = torch.linspace(0.05, 200, 80, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 500, 301, dtype=torch.float64)
    expected = torch.from_numpy(special.gammainc(a.numpy(), x.numpy()))
    torch.testing.assert_close(shape_derivative(0, torch.log(x), a), expected, rtol=1e-12, atol=1e-300)


def test_ends() -> None:
    u = torch.tensor([-torch.inf, torch.inf, -800.0, torch.nan], dtype=torch.float64)
    a = torch.tensor(0.05, dtype=torch.float64)
    for order, limits in ((0, [0.0, 1.0]), (1, [0.0, 0.0]), (2, [0.0, 0.0])):
        got = shape_derivative(order, u, a)
        assert got[:2].tolist() == limits and got[2].isfinite() and got[3].isnan()
    # P -> exp(a u) / Gamma(a + 1) although exp(u) underflows
    assert shape_derivative(0, u, a)[2].item() == pytest.approx(float(mp.exp(-40) / mp.gamma(1.05)), rel=1e-12)


def test_large_shapes_stay_finite() -> None:
    a = torch.tensor([1e3, 1e4, 1e6], dtype=torch.float64)
    for order in range(3):
        assert shape_derivative(order, torch.log(a), a).isfinite().all()
    expected = torch.from_numpy(special.gammainc(a.numpy(), a.numpy()))
    torch.testing.assert_close(shape_derivative(0, torch.log(a), a), expected, rtol=1e-8, atol=0)


def test_giving_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualnn.engine.incomplete_gamma.MAX_STEPS", 5)
    for log_x, method in ((0.0, "series"), (1.2, "continued fraction")):
        with pytest.raises(ConvergenceError, match=f"the {method} did not converge in 5 steps"):
            shape_derivative(0, torch.tensor([log_x]).double(), torch.tensor([1.5]).double())


def test_third_order_through_the_bridge() -> None:
    u, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 1.7))
    value = elementwise(lower_gamma(), u, a)
    for _ in range(3):
        (value,) = torch.autograd.grad(value, a, create_graph=True)
    with mp.workdps(DIGITS):
        x = mp.exp(mp.mpf(0.4))
        expected = mp.diff(lambda s: mp.gammainc(s, 0, x, regularized=True), mp.mpf(1.7), 3)
    assert value.item() == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("order", range(4))
def test_log_gamma_derivatives(order: int) -> None:
    a = torch.tensor([0.05, 0.7, 3.0, 200.0], dtype=torch.float64)
    exact = [mp.loggamma(v) if order == 0 else mp.polygamma(order - 1, v) for v in a.tolist()]
    expected = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    torch.testing.assert_close(elementwise(log_gamma(order), a), expected, rtol=1e-13, atol=1e-14)
