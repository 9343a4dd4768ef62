import pytest
import torch

from dualnn.activations.implicit_tanh import ImplicitTanh
from dualnn.engine.errors import ConvergenceError, UnknownNameError
from dualnn.models import MLP, NewtonTanh

SETTINGS = [{}, {"a": -0.7, "b": 1.3}, {"a": 3.0, "b": 4.0}, {"a": -0.99, "b": 1.0}, {"a": 50.0, "b": 20.0}]


def inputs(channels, *rest):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(40, channels, *rest, generator=generator, dtype=torch.float64) * 5).requires_grad_()


def gradients(module, x):
    y = module(x)
    torch.manual_seed(1)
    return y, torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])


@pytest.mark.parametrize("rest", [(), (3, 2)], ids=["(B, C)", "(B, C, H, W)"])
@pytest.mark.parametrize("options", SETTINGS)
def test_unrolled_equals_the_exact_activation(options, rest):
    exact = ImplicitTanh(num_channels=3, **options).double()
    unrolled = NewtonTanh(num_channels=3, gradient="unrolled", **options).double()
    with torch.no_grad():  # channels that differ
        for parameter in exact.parameters():
            parameter += torch.linspace(0, 0.3, 3)
    unrolled.load_state_dict(exact.state_dict())
    x = inputs(3, *rest)
    (y, expected), (z, got) = gradients(exact, x), gradients(unrolled, x)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


def test_no_grad_has_the_value_and_cuts_the_graph():
    module = NewtonTanh(num_channels=3).double()
    x = inputs(3)
    y = module(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, NewtonTanh(num_channels=3, gradient="unrolled").double()(x).detach())


def test_layers_before_a_no_grad_loop_get_no_gradient_and_no_error():
    model = MLP(hidden=[16], activation=NewtonTanh)
    torch.nn.functional.cross_entropy(model(torch.randn(8, 64)), torch.zeros(8).long()).backward()
    assert model.net.head.weight.grad.abs().sum() > 0
    assert model.net.linear0.weight.grad is None and model.net.act0.raw_slope.grad is None


def test_first_layer_without_input_gradient():
    module = NewtonTanh(gradient="unrolled")
    module(torch.randn(4, 1)).sum().backward()
    assert torch.isfinite(module.raw_product.grad).all()


def test_half_precision_keeps_its_dtype():
    x = torch.randn(8, 1).bfloat16()
    y = NewtonTanh()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), NewtonTanh()(x.float()), rtol=1e-2, atol=1e-2)


def test_nan_stays_where_it_is():
    x = torch.tensor([[1.0], [float("nan")], [-2.0]])
    y = NewtonTanh()(x)
    assert y.isnan().flatten().tolist() == [False, True, False]
    assert torch.equal(y[[0, 2]], NewtonTanh()(x[[0, 2]]))


def test_input_is_not_modified():
    x = torch.randn(5, 1)
    before = x.clone()
    NewtonTanh()(x)
    assert torch.equal(x, before)


def test_too_few_steps():
    with pytest.raises(ConvergenceError, match="not converged after 1 steps"):
        NewtonTanh(max_steps=1)(torch.tensor([[3.0]]))


def test_misspelt_gradient():
    with pytest.raises(UnknownNameError, match="did you mean 'unrolled'"):
        NewtonTanh(gradient="unroled")
