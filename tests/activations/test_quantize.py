import pytest
import torch

import dualnn as dn
from dualnn.activations.quantize import PRIMITIVES, Quantize
from dualnn.engine.errors import DualInputError, UnknownNameError


def soft_staircase(act: Quantize, x: torch.Tensor) -> torch.Tensor:
    """The documented primitive, every step summed, differentiated by torch."""
    grid = act.grid
    i = torch.arange(1, grid.steps + 1, dtype=x.dtype)
    s = (x[..., None] - grid.low) / grid.width
    return grid.low + grid.width * torch.sigmoid((s - i + 0.5) / grid.temperature).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_levels(bits: int) -> None:
    act = Quantize(bits=bits, low=-2.0, high=5.0).double()
    x = torch.cat([torch.linspace(-4, 7, 20001, dtype=torch.float64), torch.tensor([-torch.inf, torch.inf])])
    y = act(x)
    levels = torch.linspace(-2, 5, 2**bits, dtype=torch.float64)
    assert torch.isin((y * 1e9).round(), (levels * 1e9).round()).all()
    assert ((y - x.clamp(-2, 5)).abs() <= 3.5 / (2**bits - 1) + 1e-12).all()
    assert y.min() == -2 and y.max() == 5
    torch.testing.assert_close(act(levels), levels)


@pytest.mark.parametrize(("bits", "temperature"), [(1, 0.3), (3, 0.05), (4, 0.25), (6, 2.0), (10, 0.2)])
def test_tangent_is_the_derivative_of_the_named_primitive(bits: int, temperature: float) -> None:
    act = Quantize(bits=bits, temperature=temperature)
    x = (3 * torch.rand(200, dtype=torch.float64) - 1.5).requires_grad_()
    (first,) = torch.autograd.grad(soft_staircase(act, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (mine,) = torch.autograd.grad(act(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(mine.sum(), x)
    torch.testing.assert_close(mine, first, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(curvature, second, rtol=1e-9, atol=1e-9)
    _, forward = dn.jvp(act, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(forward, mine.detach())


def test_primitive_tends_to_the_quantiser() -> None:
    x = torch.linspace(-1.3, 1.3, 400, dtype=torch.float64)
    act = Quantize(bits=3, temperature=1e-3)
    away = ((x - act.grid.low) / act.grid.width - 0.5).frac().abs().sub(0.5).abs() < 0.4
    torch.testing.assert_close(soft_staircase(act, x)[away], act(x)[away], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("primitive", "inside", "outside"), [("clipped_identity", 1.0, 0.0), ("identity", 1.0, 1.0)])
def test_straight_through(primitive: str, inside: float, outside: float) -> None:
    x = torch.tensor([-3.0, -1.0, 0.2, 1.0, 3.0], requires_grad=True)
    Quantize(primitive=primitive)(x).sum().backward()
    assert x.grad.tolist() == [outside, inside, inside, inside, outside]


def test_repr_says_what_is_biased() -> None:
    for primitive in PRIMITIVES:
        assert f"surrogate derivative of primitive='{primitive}'" in repr(Quantize(primitive=primitive))


@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 17}, {"bits": 2.0}, {"low": 1.0, "high": 1.0}, {"high": float("inf")}, {"temperature": 0.0}],
)
def test_bad_settings(options: dict) -> None:
    with pytest.raises(DualInputError, match="quantize"):
        Quantize(**options)


def test_misspelt_primitive() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'soft_staircase'"):
        Quantize(primitive="soft_stairs")
