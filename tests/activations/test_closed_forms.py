"""What sets each closed form apart: the members of torch that it contains, its limits, its bad arguments."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline as ScipySpline
from torch import nn

from dualnn import activations
from dualnn.engine.errors import DualInputError

X = torch.linspace(-6, 6, 241, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "known"),
    [
        ("swish_beta", {}, nn.SiLU()),
        ("swish_beta", {"beta": 0.0}, lambda x: x / 2),
        ("softplus_beta", {"beta": 2.0}, nn.Softplus(2.0)),
        ("pelu", {}, nn.ELU()),
        ("gaussian", {}, lambda x: torch.exp(-x * x / 2)),
        ("b_spline", {}, nn.SiLU()),
        ("logistic", {"rate": math.log(2)}, lambda x: 2 * nn.functional.softsign(x)),
    ],
)
def test_contains_what_torch_has(name, options, known) -> None:
    act = activations.get(name, **options)
    torch.testing.assert_close(act(X), known(X), rtol=1e-6, atol=1e-6)  # parameters are float32


def test_softplus_has_no_cut_off() -> None:
    x = torch.tensor([25.0, 300.0], dtype=torch.float64, requires_grad=True)
    y = activations.get("softplus_beta")(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature[0].item() == pytest.approx(np.exp(-25.0), rel=1e-6)  # torch.nn.Softplus: 0
    assert y[1] == 300


def test_the_spline_is_scipys() -> None:
    coefficients = [0.3, -1.0, 0.5, 0.1, 2.0, -0.4, 0.9, 0.2]
    act = activations.get("b_spline", coefficients=coefficients, weight=0.0).double()
    knots = -3 + 6 / 5 * np.arange(-3, 9)
    inside = X[(X >= -3) & (X < 3)]
    spline = ScipySpline(knots, coefficients, 3)
    torch.testing.assert_close(act(inside), torch.from_numpy(spline(inside.numpy())), rtol=1e-6, atol=1e-6)
    leaf = inside.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
    torch.testing.assert_close(slope, torch.from_numpy(spline(inside.numpy(), 1)), rtol=1e-6, atol=1e-6)


def test_rational_starts_as_a_leaky_relu() -> None:
    near = X[X.abs() <= 3]
    assert (activations.get("rational")(near) - nn.LeakyReLU(0.01)(near)).abs().max() < 0.035


def test_rational_has_no_pole() -> None:
    act = activations.get("rational", numerator=(1.0,), denominator=(-3.0, 1.0, 2.0))
    assert bool((act(X).abs() <= 1).all())


def test_maxout_is_convex_and_below_softplus_at_the_start() -> None:
    y = activations.get("maxout", pieces=5).double()(X)
    assert bool((y.diff().diff() >= -1e-12).all()) and bool((y <= nn.functional.softplus(X) + 1e-7).all())


def test_snake_never_falls() -> None:
    y = activations.get("snake", a=3.0).double()(X)
    assert bool((y.diff() >= 0).all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snake", {"a": 0.0}),
        ("gaussian", {"sigma": 0.0}),
        ("softplus_beta", {"beta": -1.0}),
        ("pelu", {"b": 0.0}),
        ("logistic", {"rate": 0.0}),
        ("maxout", {"pieces": 1}),
        ("rational", {"denominator": ()}),
        ("b_spline", {"grid": 0}),
        ("b_spline", {"low": 2.0, "high": 1.0}),
        ("b_spline", {"coefficients": (1.0, 2.0)}),
        ("monotone_root", {"steps": 0}),
        ("monotone_root", {"height": 0.0}),
        ("mixture_quantile", {"components": True}),
        ("mixture_quantile", {"scale": 0.0}),
    ],
)
def test_bad_starting_values(name, options) -> None:
    with pytest.raises(DualInputError, match=name):
        activations.get(name, **options)
