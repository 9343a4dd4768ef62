import pytest
import torch

from dualnn.activations.kepler import Kepler, eccentric_anomaly, solve
from dualnn.engine.errors import DualInputError


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_published_point() -> None:
    x, e = f64(0.1), f64(0.9)
    y = eccentric_anomaly(x, e)
    assert y.item() == pytest.approx(0.63084352756315343, abs=1e-15)
    dx, de = torch.autograd.grad(y, (x, e), create_graph=True)
    assert dx.item() == pytest.approx(3.6600171286016323, rel=1e-14)
    assert de.item() == pytest.approx(2.1587737816538381, rel=1e-14)
    (dxx,) = torch.autograd.grad(dx, x)
    assert dxx.item() == pytest.approx(-26.026506666141042, rel=1e-13)


@pytest.mark.parametrize("e", [0.0, 0.3, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converges_from_any_start(e: float, dtype: torch.dtype) -> None:
    small = torch.logspace(-14, 4, 500, dtype=dtype)
    x = torch.cat([torch.linspace(-20, 20, 4001, dtype=dtype), small, -small])
    eccentricity = torch.tensor(e, dtype=dtype)
    y = solve(x, eccentricity, max_steps=15)
    size = y.abs() + x.abs() + (eccentricity * torch.sin(y)).abs()
    eps = torch.finfo(dtype).eps
    assert ((y - eccentricity * torch.sin(y) - x).abs() <= 4 * eps * size).all()
    assert (y[:4001].diff() > 0).all()


def test_a_turn_more_is_a_turn_more() -> None:
    x, e = torch.linspace(-3, 3, 50, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    turn = 2 * torch.pi
    torch.testing.assert_close(solve(x + 5 * turn, e), solve(x, e) + 5 * turn, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("e", [-0.1, 1.0, 1.5])
def test_eccentricity_out_of_range(e: float) -> None:
    with pytest.raises(DualInputError, match="0 <= e < 1"):
        eccentric_anomaly(torch.zeros(3), torch.tensor([0.5, e, 0.2]))


@pytest.mark.parametrize("options", [{"eccentricity": 0.0}, {"eccentricity": 1.0}, {"margin": 0.0}, {"margin": 1.0}])
def test_bad_starting_values(options: dict) -> None:
    with pytest.raises(DualInputError, match="kepler"):
        Kepler(**options)


def test_parametrisation_stays_below_one() -> None:
    act = Kepler()
    with torch.no_grad():
        act.raw.fill_(1e3)
    assert act.natural()[0].item() == pytest.approx(0.999)
    assert act(torch.randn(10)).isfinite().all()
