import math

import pytest
import torch

from dualnn.activations.gamma_cdf import LOG_SOFTPLUS, GammaCDF, gamma_p, parametrise
from dualnn.engine.bridge import elementwise
from dualnn.engine.errors import DualInputError, UnknownNameError


def test_shape_one_is_the_sigmoid() -> None:
    x = torch.linspace(-30, 30, 200, dtype=torch.float64, requires_grad=True)
    y = GammaCDF().double()(x)
    torch.testing.assert_close(y, torch.sigmoid(x), rtol=1e-5, atol=0)  # alpha passes through float32
    y = elementwise(GammaCDF().local, x, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(y, torch.sigmoid(x), rtol=1e-13, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, torch.sigmoid(x) * torch.sigmoid(-x), rtol=1e-13, atol=0)


def test_learns_the_shape_of_a_gamma_distribution() -> None:
    act = GammaCDF(alpha=1.0, argument="direct").double()
    t = torch.linspace(0.1, 12, 200, dtype=torch.float64)
    with torch.no_grad():
        target = gamma_p(torch.tensor(3.5, dtype=torch.float64), t)
    optimizer = torch.optim.LBFGS(act.parameters(), max_iter=50, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((act(t) - target) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert act.natural()[0].item() == pytest.approx(3.5, rel=1e-6)


@pytest.mark.parametrize(("alpha", "slope"), [(0.5, math.inf), (1.0, 1.0), (1.5, 0.0), (3.0, 0.0)])
def test_at_zero_the_slope_is_its_limit(alpha: float, slope: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    y = gamma_p(a, x)
    dx, da = torch.autograd.grad(y.sum(), (x, a))
    assert (y.item(), dx.item(), da.item()) == (0.0, slope, 0.0)


@pytest.mark.parametrize(("alpha", "curvature"), [(1.0, -1.0), (2.0, 1.0), (3.0, 0.0)])
def test_at_zero_the_curvature_is_its_limit(alpha: float, curvature: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(gamma_p(torch.tensor(alpha, dtype=torch.float64), x).sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].item() == pytest.approx(curvature, abs=1e-14)


def test_no_nan_on_the_far_left_and_right() -> None:
    x = torch.tensor([-1e4, -800.0, -100.0, 100.0, 800.0, 1e4], requires_grad=True)
    for alpha in (0.1, 1.0, 50.0):
        act = GammaCDF(alpha=alpha)
        y = act(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        (shape,) = torch.autograd.grad(act(x).sum(), act.raw)
        assert all(bool(t.isfinite().all()) for t in (y, first, second, shape))
    assert y[-1] == 1


def test_log_softplus() -> None:
    x = torch.tensor([-1e3, -40.0, -30.0, -20.0, -1.0, 0.0, 1.0, 30.0, 1e3], dtype=torch.float64, requires_grad=True)
    y = elementwise(LOG_SOFTPLUS, x)
    middle = slice(2, 8)
    torch.testing.assert_close(y[middle], torch.log(torch.log1p(torch.exp(x[middle]))), rtol=1e-14, atol=1e-15)
    assert y[0] == -1e3 and y[-1].item() == pytest.approx(math.log(1e3))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope[0] == 1 and slope[-1].item() == pytest.approx(1e-3)


def test_domain_is_named() -> None:
    with pytest.raises(DualInputError, match=r"needs x >= 0, got -0\.5 \(1 of 2 entries\)"):
        GammaCDF(argument="direct")(torch.tensor([1.0, -0.5]))
    with pytest.raises(DualInputError, match="shape must be positive, got -1"):
        gamma_p(torch.tensor(-1.0), torch.ones(2))
    with pytest.raises(DualInputError, match="0 < minimum < alpha"):
        GammaCDF(alpha=0.01)
    with pytest.raises(UnknownNameError, match="did you mean 'softplus'"):
        GammaCDF(argument="softmax")


def test_parametrisation_keeps_its_minimum() -> None:
    assert parametrise(torch.tensor([-1e4]), 0.05).item() == pytest.approx(0.05)
