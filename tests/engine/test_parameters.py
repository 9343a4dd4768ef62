"""Swapping parameters: by identity, everywhere they occur, and back whatever happens."""

import copy
import io

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine import UnsupportedOpError
from dualnn.engine.parameters import swapped
from tests.engine.oracles import five_point


def duals_of(module, num=1):
    return {p: dn.dual(p, torch.ones(num, *p.shape, dtype=p.dtype)) for p in module.parameters()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.own = nn.Parameter(torch.ones(3))

    def forward(self, index):
        return self.head(self.embed(index) * self.own)


def snapshot(module):
    return {(name, key): p for name, sub in module.named_modules() for key, p in sub._parameters.items()}


def unchanged(module, before):
    after = snapshot(module)
    return after.keys() == before.keys() and all(after[k] is p for k, p in before.items())


def test_swaps_and_restores():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False))
    before = snapshot(net)
    with swapped(net, duals_of(net)):
        assert all(isinstance(p, dn.DualTensor) for p in net.parameters())
        assert isinstance(net(torch.ones(1, 2)), dn.DualTensor)
    assert unchanged(net, before) and type(net(torch.ones(1, 2))) is torch.Tensor


def test_restores_after_an_exception():
    net = nn.Linear(2, 2)
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), swapped(net, duals_of(net)):
        1 // 0  # noqa: B018
    assert unchanged(net, before)


def test_a_derivative_through_parameters():
    net = nn.Linear(2, 1, dtype=torch.float64)
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    with swapped(net, duals_of(net)):
        out = net(x)
    assert float(out.tangent) == pytest.approx(6.0)  # 2 + 3, and 1 from the bias


def test_tied_weights_are_one():
    net = Tied()
    before = snapshot(net)
    with swapped(net, duals_of(net)):
        assert net.head.weight is net.embed.weight and isinstance(net.head.weight, dn.DualTensor)
        pushed = net(torch.tensor([1])).tangent[0]
    assert unchanged(net, before) and net.head.weight is net.embed.weight
    eps, weights = 1e-3, [p.detach().double() for p in (net.embed.weight, net.own)]

    def value(h):
        w, own = (p + h for p in weights)
        return (w[1] * own) @ w.T

    torch.testing.assert_close(pushed[0].double(), (value(eps) - value(-eps)) / (2 * eps), rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for():
    net = nn.Linear(2, 2)
    with swapped(net, {net.bias: dn.dual(net.bias, torch.ones(2))}):
        assert type(net.weight) is nn.Parameter and isinstance(net.bias, dn.DualTensor)


RECURRENT = {
    "LSTM": (lambda: nn.LSTM(2, 3, num_layers=2), (4, 1, 2)),
    "GRU": (lambda: nn.GRU(2, 3), (4, 1, 2)),
    "RNN": (lambda: nn.RNN(2, 3), (4, 1, 2)),
    "LSTMCell": (lambda: nn.LSTMCell(2, 3), (1, 2)),
    "GRUCell": (lambda: nn.GRUCell(2, 3), (1, 2)),
    "RNNCell": (lambda: nn.RNNCell(2, 3), (1, 2)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_nets_are_right_or_raise(name):
    make, shape = RECURRENT[name]
    net, x = make().double(), torch.ones(shape, dtype=torch.float64)
    before, flat = snapshot(net), getattr(net, "_flat_weights", None)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    try:
        with torch.no_grad(), swapped(net, duals_of(net)):
            assert flat is None or all(isinstance(w, dn.DualTensor) for w in net._flat_weights)
            pushed = first(net(x)).tangent[0]
    except UnsupportedOpError as error:
        assert "lstm" in str(error) or "cell" in str(error) or "gru" in str(error) or "rnn" in str(error)
        pushed = None
    assert unchanged(net, before) and getattr(net, "_flat_weights", None) is flat
    if pushed is not None:
        # Last: torch's functional_call leaves its own weights in _flat_weights.
        named = {n: p.detach() for n, p in net.named_parameters()}
        oracle = five_point(
            lambda h: [first(torch.func.functional_call(net, {n: p + h for n, p in named.items()}, (x,))).detach()]
        )[0]
        torch.testing.assert_close(pushed, oracle, rtol=1e-7, atol=1e-8)


def test_state_dict_while_swapped_has_plain_values():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    reference = copy.deepcopy(net.state_dict())
    with swapped(net, duals_of(net)):
        state = net.state_dict()
    for key, value in reference.items():
        assert type(state[key]) is torch.Tensor and torch.equal(state[key], value)


def test_copies_and_moves_while_swapped_raise():
    net = nn.Linear(2, 2)
    before, values = snapshot(net), [p.detach().clone() for p in net.parameters()]
    with swapped(net, duals_of(net)):
        with pytest.raises(UnsupportedOpError):
            copy.deepcopy(net)
        with pytest.raises(UnsupportedOpError):
            torch.save(net, io.BytesIO())
        with pytest.raises(UnsupportedOpError):
            net.to(torch.float64)
    assert unchanged(net, before)
    assert all(torch.equal(p, v) for p, v in zip(net.parameters(), values, strict=True))


@pytest.mark.parametrize(
    "write",
    [
        lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
        lambda net: net.weight.clamp_(-0.1, 0.1),
        lambda net: net.weight.mul_(2.0),
    ],
)
def test_a_write_to_a_swapped_parameter_raises(write):
    net = nn.Linear(2, 2)
    before, values = snapshot(net), [p.detach().clone() for p in net.parameters()]
    with pytest.raises(UnsupportedOpError, match="weight.*written"), torch.no_grad():
        with swapped(net, duals_of(net)):
            write(net)
    assert unchanged(net, before)
    assert all(torch.equal(p, v) for p, v in zip(net.parameters(), values, strict=True))


def test_nested_swaps():
    net = nn.Linear(1, 1)
    before = snapshot(net)
    with swapped(net, duals_of(net)):
        outer = net.weight
        with swapped(net, {net.weight: torch.zeros(1, 1)}):
            assert type(net.weight) is torch.Tensor
        assert net.weight is outer
    assert unchanged(net, before)
