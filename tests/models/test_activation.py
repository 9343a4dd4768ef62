import pytest
from torch import nn

from dualnn import activations
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.models import MLP, make_activation


def test_torch_names():
    assert isinstance(make_activation("ReLU", 4), nn.ReLU)
    assert isinstance(make_activation("Identity", 4), nn.Identity)
    assert make_activation("LeakyReLU", 4, {"negative_slope": 0.3}).negative_slope == 0.3


@pytest.mark.parametrize("name", activations.available())
def test_registered_names(name):
    assert isinstance(make_activation(name, 4), activations.get_class(name))


def test_activations_that_learn_per_channel_get_the_layer_s_width():
    model = MLP(hidden=[8, 16], activation="implicit_tanh")
    assert [model.net.act0.num_channels, model.net.act1.num_channels] == [8, 16]
    shared = MLP(hidden=[8], activation="implicit_tanh", activation_kwargs={"num_channels": 1})
    assert shared.net.act0.num_channels == 1


def test_classes_functions_and_dotted_paths():
    assert isinstance(make_activation(nn.Tanh, 4), nn.Tanh)
    assert make_activation(lambda num_channels: nn.PReLU(num_channels), 4).num_parameters == 4
    assert isinstance(make_activation("torch.nn.GELU", 4), nn.GELU)
    assert make_activation("dualnn.models.NewtonTanh", 4, {"gradient": "unrolled"}).gradient == "unrolled"


def test_an_instance_is_copied_into_every_layer():
    prototype = nn.PReLU()
    model = MLP(activation=prototype)
    assert len({id(act.weight) for act in (prototype, model.net.act0, model.net.act1)}) == 3


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("keplr", {}, "unknown activation 'keplr': did you mean 'kepler'"),
        ("ReLu", {}, "unknown activation 'ReLu': did you mean 'ReLU"),
        ("LeakyReLU", {"negative_slop": 1}, "'negative_slop': did you mean 'negative_slope'"),
        ("kepler", {"margn": 1}, "unknown argument of activation 'kepler' 'margn': did you mean 'margin'"),
    ],
)
def test_misspelt_names(name, kwargs, message):
    with pytest.raises(UnknownNameError, match=message):
        make_activation(name, 4, kwargs)


def test_other_mistakes():
    with pytest.raises(DualInputError, match="'torch.nn.Nope' cannot be imported"):
        make_activation("torch.nn.Nope", 4)
    with pytest.raises(DualInputError, match="beside an instance"):
        make_activation(nn.ReLU(), 4, {"inplace": True})
    with pytest.raises(DualInputError, match="needs 'input'.*give a name, or a class"):
        make_activation("torch.nn.functional.relu", 4)
    with pytest.raises(DualInputError, match="returned int: give a name"):
        make_activation(lambda: 3, 4)
    with pytest.raises(DualInputError, match="give a name, or a class"):
        make_activation(3, 4)
