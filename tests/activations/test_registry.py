import pytest

from dualnn import activations
from dualnn.activations.base import Activation
from dualnn.activations.registry import get_class, register
from dualnn.engine.errors import DualnnError, UnknownNameError


def test_some_of_every_kind_are_there() -> None:
    kinds = {"snake", "kepler", "gamma_cdf", "quantize", "sparsemax"}  # formula, equation, special, hard, on rows
    assert set(activations.available()) >= kinds
    assert activations.available() == sorted(activations.available())


def test_misspelt_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'keplr': did you mean 'kepler'"):
        activations.get("keplr")


def test_misspelt_argument_lists_the_accepted_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"argument of activation 'kepler' 'excentricity': did you mean "
                       r"'eccentricity'.*num_channels"):  # fmt: skip
        activations.get("kepler", excentricity=0.3)
    with pytest.raises(UnknownNameError, match="num_channels"):  # it has no parameters
        activations.get("lambert_w", num_channels=3)


def test_a_duplicate_raises() -> None:
    with pytest.raises(DualnnError, match="'kepler' is already registered by dualnn.activations.kepler.Kepler"):

        @register("kepler")
        class Other(Activation):
            pass

    assert get_class("kepler").__name__ == "Kepler"


def test_arguments_reach_the_class() -> None:
    act = activations.get("implicit_tanh", a=2.0, b=0.5, num_channels=4, tol=0.0, max_steps=7)
    assert (act.tol, act.max_steps, act.num_channels) == (0.0, 7, 4)
    assert [p.tolist() for p in act.natural()] == [pytest.approx([2.0] * 4), pytest.approx([0.5] * 4)]
