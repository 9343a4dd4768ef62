"""Hard decisions: the value is hard, the derivative that of the primitive which the repr names, in every mode."""

import pytest
import torch

import dualnn as dn
from dualnn import activations
from dualnn.activations.surrogates import PRIMITIVES
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.layers import Surrogate

HARD = ["heaviside", "sign", "spike", "round"]


@pytest.mark.parametrize("name", [*HARD, "quantize", "hard_topk", "rank"])
def test_the_repr_names_what_is_biased(name: str) -> None:
    text = repr(activations.get(name))
    assert "primitive='" in text and ("biased gradient" in text or "surrogate derivative" in text)


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("name", ["heaviside", "sign", "spike"])
def test_every_primitive_serves(name: str, primitive: str) -> None:
    act = activations.get(name, primitive=primitive, sharpness=1.5).double()
    x = torch.linspace(-2, 2, 38, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(PRIMITIVES[primitive].value(1.5 * leaf).sum(), leaf)
    torch.testing.assert_close(dn.jvp(act, (x,), (torch.ones_like(x),))[1].detach(), slope)
    (reverse,) = torch.autograd.grad(act(leaf).sum(), leaf)
    torch.testing.assert_close(reverse, slope)
    layer = Surrogate(lambda v: v >= 0, primitive, 1.5)
    torch.testing.assert_close(torch.autograd.grad(layer(leaf).sum(), leaf)[0], slope)


def test_values() -> None:
    x = torch.tensor([-1.5, -0.2, 0.0, 0.5, 2.5])
    assert activations.get("heaviside")(x).tolist() == [0, 0, 1, 1, 1]
    assert activations.get("sign")(x).tolist() == [-1, -1, 0, 1, 1]
    assert activations.get("round")(x).tolist() == [-2, 0, 0, 0, 2]
    assert activations.get("spike", threshold=0.5)(x).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", HARD)
def test_bad_arguments(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"primitive of {name}"):
        activations.get(name, primitive="sigmoidal")
    if name != "round":
        with pytest.raises(DualInputError, match="sharpness must be positive, got 0"):
            activations.get(name, sharpness=0)


def test_topk_and_ranks() -> None:
    x = torch.tensor([[3.0, -1.0, 2.0, 0.0]])
    assert activations.get("hard_topk", k=2)(x).tolist() == [[1, 0, 1, 0]]
    assert activations.get("rank")(x).tolist() == [[1, 4, 2, 3]]
    assert activations.get("rank")(torch.zeros(1, 3)).tolist() == [[1, 2, 3]]
