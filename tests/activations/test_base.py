import pytest
import torch

from dualnn import activations
from dualnn.activations.base import inverse_softplus
from dualnn.engine.errors import DualInputError, DualShapeError
from tests.activations.oracles import ELEMENTWISE

PARAMETRISED = [n for n in ELEMENTWISE if list(activations.get(n).parameters())]


@pytest.mark.parametrize("name", PARAMETRISED)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3, 4)])
def test_parameters_go_along_the_channels(name: str, shape: tuple[int, ...]) -> None:
    act = activations.get(name, num_channels=3).double()
    with torch.no_grad():
        for parameter in act.parameters():
            parameter += torch.tensor([-0.3, 0.0, 0.4]).reshape(3, *(1,) * (parameter.ndim - 1))
    x = torch.rand(shape, dtype=torch.float64)
    y = act(x)
    assert y.shape == x.shape
    dim = 0 if x.ndim == 1 else 1
    for channel in range(3):
        single = activations.get(name).double()
        with torch.no_grad():
            for mine, theirs in zip(single.parameters(), act.parameters(), strict=True):
                mine.copy_(theirs[channel : channel + 1])
        torch.testing.assert_close(single(x.select(dim, channel)), y.select(dim, channel), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", PARAMETRISED)
@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (3, 2, 3)])
def test_another_number_of_channels_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DualShapeError, match=r"num_channels=3\) needs an input of shape \(N, 3, \*\)"):
        activations.get(name, num_channels=3)(torch.zeros(shape))


@pytest.mark.parametrize("channels", [0, -1, 1.0, True])
def test_num_channels_is_checked(channels: object) -> None:
    with pytest.raises(DualInputError, match="num_channels must be an integer >= 1"):
        activations.get("kepler", num_channels=channels)


def test_result_has_the_input_dtype_and_is_computed_in_the_wider_one() -> None:
    act = activations.get("implicit_tanh").double()
    x = torch.randn(5)
    assert act(x).dtype == torch.float32
    assert torch.equal(act(x), act(x.double()).float())


@pytest.mark.parametrize("value", [1e-6, 0.1, 1.0, 30.0])
def test_inverse_softplus(value: float) -> None:
    raw = torch.tensor(inverse_softplus(value), dtype=torch.float64)
    assert torch.log1p(torch.exp(raw)).item() == pytest.approx(value, rel=1e-12)
