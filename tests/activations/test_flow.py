"""The flows with error control, against scipy's integrator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from dualnn import activations
from dualnn.activations.base import Activation, apply
from dualnn.activations.fitzhugh_nagumo import rest
from dualnn.engine.errors import ConvergenceError, DualInputError, UnknownNameError
from tests.activations.oracles import central_difference

F64 = torch.float64


def van_der_pol(x: float, damping: float, span: float) -> tuple[Callable, list[float], float]:
    return lambda t, s: [s[1], damping * (1 - s[0] ** 2) * s[1] - s[0]], [x, 0.0], span


def fitzhugh_nagumo(x: float, a: float, b: float, tau: float, span: float) -> tuple[Callable, list[float], float]:
    roots = np.roots([1 / 3, 0, 1 / b - 1, a / b])
    v = float(roots[np.abs(roots.imag).argmin()].real)

    def field(t: float, s: Sequence[float]) -> list[float]:
        return [v + s[0] - (v + s[0]) ** 3 / 3 - s[1] + x, (v + s[0] + a - b * s[1]) / tau]

    return field, [0.0, (v + a) / b], span


def learned_flow(x: float, *parameters: float) -> tuple[Callable, list[float], float]:
    a, b, c = np.reshape(parameters, (3, -1))
    return lambda t, s: [float((a * np.tanh(b * (s[0] - c))).sum())], [x], 1.0


EQUATIONS = {"van_der_pol": van_der_pol, "fitzhugh_nagumo": fitzhugh_nagumo, "learned_flow": learned_flow}
CASES = [
    ("van_der_pol", {}, (-1.7, 0.4)),
    ("van_der_pol", {"damping": 5.0, "method": "rodas5p"}, (2.5,)),
    ("fitzhugh_nagumo", {}, (0.3, 1.5)),
    ("fitzhugh_nagumo", {"tau": 0.2, "b": 0.4, "method": "radau"}, (0.7,)),
    ("learned_flow", {}, (-2.2, 0.3)),
    ("learned_flow", {"units": 3, "strength": 1.5, "method": "radau"}, (0.4,)),
]
EVERY_CASE = pytest.mark.parametrize(("name", "options", "points"), CASES)
EVERY_FLOW = pytest.mark.parametrize("name", EQUATIONS)


def by_scipy(name: str, *args: float, method: str = "DOP853") -> float:
    field, start, span = EQUATIONS[name](*args)
    found = solve_ivp(field, (0, span), start, method, rtol=1e-13, atol=1e-13)
    assert found.success
    return float(found.y[0, -1])


def with_arguments(act: Activation, x: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=F64, requires_grad=True) for v in (x, *(p.item() for p in act.natural()))]


@EVERY_CASE
def test_value_and_derivatives_are_those_of_the_equation(name: str, options: dict, points: tuple[float, ...]) -> None:
    act = activations.get(name, tol=1e-10, **options).double()
    for x in points:
        args = with_arguments(act, x)
        y = apply(act.local, *args)
        at = [a.item() for a in args]
        assert y.item() == pytest.approx(by_scipy(name, *at), rel=1e-8, abs=1e-9)
        first = torch.autograd.grad(y, args, create_graph=True)
        second = torch.autograd.grad(first[0], args)
        for i in range(len(args)):

            def moved(h: float, k: float = 0.0, at: Sequence[float] = at, i: int = i) -> Tensor:
                there = [v + h * (i == j) + k * (j == 0) for j, v in enumerate(at)]
                return torch.tensor(by_scipy(name, *there), dtype=F64)

            expected = central_difference(moved, 1e-3)
            assert first[i].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
            if i > 1 or options:
                continue  # scipy is slow: the curvature and one mixed derivative
            expected = central_difference(lambda k: central_difference(lambda h: moved(h, k), 5e-3), 5e-3)  # noqa: B023
            assert second[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


@EVERY_FLOW
def test_the_tolerance_is_met_in_both_precisions(name: str) -> None:
    x = torch.linspace(-4, 4, 9)
    exact = activations.get(name, tol=1e-11, method="radau").double()(x.double())
    for dtype, error in ((torch.float32, 2e-4), (F64, 2e-7)):
        y = activations.get(name).to(dtype)(x.to(dtype))
        torch.testing.assert_close(y.double(), exact, rtol=error, atol=error)


def test_large_inputs_are_stiff_and_hardly_move() -> None:
    act = activations.get("van_der_pol", damping=2.0)
    x = torch.tensor([30.0, -1e3, 1e5], requires_grad=True)
    y = act(x)
    y.sum().backward()
    torch.testing.assert_close(y, x - 1 / (2 * x), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad, torch.ones(3), rtol=2e-3, atol=0)


def test_a_neuron_rests_without_current_and_fires_above_its_threshold() -> None:
    act = activations.get("fitzhugh_nagumo", span=6.0).double()
    y = act(torch.tensor([0.0, 0.1, 1.0], dtype=F64))
    assert y[0] == 0 and 0 < y[1] < 0.4 and y[2] > 2


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.8), (-3.0, 0.011), (0.0, 0.5), (1e4, 0.989)])
def test_the_rest_solves_its_equation(a: float, b: float) -> None:
    a_, b_ = torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)
    v = rest(a_, b_)
    torch.testing.assert_close(v - v**3 / 3, (v + a_) / b_, rtol=1e-10, atol=1e-12)


def test_a_learned_flow_increases_and_has_an_inverse_whatever_its_parameters() -> None:
    torch.manual_seed(0)
    act = activations.get("learned_flow", units=3, num_channels=4, tol=1e-9).double()
    with torch.no_grad():
        for p in act.parameters():
            p.copy_(2 * torch.randn_like(p))
    x = torch.linspace(-4, 4, 33, dtype=F64).unsqueeze(1).expand(33, 4).clone().requires_grad_()
    y = act(x)
    assert bool((y.diff(dim=0) > 0).all())
    torch.testing.assert_close(act.inverse(y), x, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (back,) = torch.autograd.grad(act.inverse(y).sum(), y)
    torch.testing.assert_close(back * slope, torch.ones_like(slope), rtol=1e-5, atol=1e-5)
    assert act.inverse(y.float()).dtype == torch.float32


@EVERY_FLOW
def test_channels_have_equations_of_their_own_and_entries_steps_of_their_own(name: str) -> None:
    act = activations.get(name, num_channels=3).double()
    with torch.no_grad():
        for p in act.parameters():
            p += 0.2 * torch.randn_like(p)
    x = torch.randn(2, 3, 4, dtype=F64)
    moved = x.clone()
    moved[0, 0, 0] = 50.0
    torch.testing.assert_close(act(moved).flatten()[1:], act(x).flatten()[1:], rtol=1e-12, atol=1e-13)


@EVERY_FLOW
def test_under_autocast_as_without(name: str) -> None:
    act, x = activations.get(name), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = act(x)
    torch.testing.assert_close(y, act(x), rtol=0, atol=0)


@EVERY_FLOW
def test_trains_with_error_control(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), activations.get(name, num_channels=4), nn.Linear(4, 1))
    x, losses = torch.randn(16, 2), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - x.square().sum(1, keepdim=True) / 2).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


BAD: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"tol": 0.0}, "tol must lie between 0 and 1, got 0.0") for name in EQUATIONS),
    ("van_der_pol", {"steps": 0}, "steps must be an integer >= 1, got 0"),
    ("learned_flow", {"max_steps": 2.0}, "max_steps must be an integer >= 1, got 2.0"),
    ("van_der_pol", {"damping": 0.0}, "damping and span must exceed 0.01, got 0.0, 1.0"),
    ("fitzhugh_nagumo", {"b": 1.0}, r"b must lie in \(0.01, 0.99\), got 1.0"),
    ("fitzhugh_nagumo", {"tau": -1.0}, "tau and span must exceed 0.01, got -1.0"),
    ("learned_flow", {"units": 0}, "units must be an integer >= 1, got 0"),
    ("learned_flow", {"strength": 0.0}, "strength must not be 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_settings_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        activations.get(name, **options)


def test_what_cannot_be_integrated_is_named() -> None:
    with pytest.raises(UnknownNameError, match="method of van_der_pol 'dopri': did you mean 'dopri5'"):
        activations.get("van_der_pol", method="dopri")
    with pytest.raises(ConvergenceError, match="max_steps"):
        activations.get("van_der_pol", max_steps=1)(torch.tensor([1.0, 2.0]))
