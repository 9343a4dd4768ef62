import math

import mpmath as mp
import pytest
import torch
from scipy import special

from dualnn.activations.lambert_w import LambertW, lambertw, wright_omega
from dualnn.engine.errors import DualInputError, UnknownNameError

EPS = torch.finfo(torch.float64).eps


def test_principal_branch_equals_scipy() -> None:
    x = torch.cat(
        [torch.linspace(-0.3678, 5, 2001, dtype=torch.float64), torch.logspace(-300, 300, 601, dtype=torch.float64)]
    )
    expected = torch.from_numpy(special.lambertw(x.numpy()).real)
    torch.testing.assert_close(lambertw(x), expected, rtol=1e-14, atol=1e-15)


def test_omega_equals_scipy() -> None:
    x = torch.cat(
        [torch.linspace(-700, 20, 3001, dtype=torch.float64), torch.logspace(1, 300, 601, dtype=torch.float64)]
    )
    torch.testing.assert_close(wright_omega(x), torch.from_numpy(special.wrightomega(x.numpy())), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_next_to_the_branch_point(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    edge = torch.tensor(-1 / math.e, dtype=dtype)
    for distance in (4 * eps, 1e-6, 1e-3, 0.05):
        x = edge + torch.tensor(distance, dtype=dtype)
        with mp.workdps(30):
            expected = float(mp.lambertw(mp.mpf(x.item())).real)
        assert lambertw(x).item() == pytest.approx(expected, abs=2 * eps)


def test_branch_point_value_and_infinite_slope() -> None:
    x = torch.tensor(-1 / math.e, dtype=torch.float64, requires_grad=True)
    y = lambertw(x)
    y.backward()
    assert y.item() == -1 and x.grad.item() == math.inf


def test_zero_is_an_ordinary_point() -> None:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    derivative = lambertw(x)
    for expected in (1.0, -2.0, 9.0):  # (-n)^(n-1), Lagrange inversion
        (derivative,) = torch.autograd.grad(derivative, x, create_graph=True)
        assert derivative.item() == pytest.approx(expected, rel=1e-14)


def test_below_the_branch_point() -> None:
    with pytest.raises(
        DualInputError, match=r"x >= -1/e = -0\.367879441, got -0\.375 \(1 of 2 entries\).*argument='exp'"
    ):
        LambertW(argument="direct")(torch.tensor([0.0, -0.375]))
    assert lambertw(torch.tensor([float("nan")])).isnan().all()


def test_ends_of_the_line() -> None:
    x = torch.tensor([-math.inf, math.inf, -1e30, 1e30])
    assert wright_omega(x).tolist() == [0.0, math.inf, 0.0, pytest.approx(1e30)]


def test_misspelt_argument() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'direct'"):
        LambertW(argument="dirct")
