import copy
import pickle

import pytest
import torch
from torch import nn

from dualnn.engine.errors import DualnnError, StructureError, UnknownNameError
from dualnn.layers import restore_forward, swap_forward
from dualnn.models import MLP, NewtonTanh
from tests.layers.functions import Channels

F64 = torch.float64


def newton(gradient):
    """An MLP whose activation is a Newton loop; the same weights whatever the gradient."""
    torch.manual_seed(0)
    return MLP(4, [5, 6], 3, NewtonTanh, {"gradient": gradient}).double()


def grads(module, x):
    module.zero_grad()
    module(x).square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def test_upstream_gradients_come_back():
    x = torch.randn(7, 4, dtype=F64)
    net, control = newton("no_grad"), newton("unrolled")
    naive = grads(net, x)
    assert [name for name, g in naive.items() if g is not None] == ["net.head.weight", "net.head.bias"]
    assert swap_forward(net, ["net.act*"]) == ["net.act0", "net.act1"]
    ours, theirs = grads(net, x), grads(control, x)
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-9, atol=1e-9, msg=name)


def test_restore_leaves_nothing_behind():
    net = newton("no_grad")
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    keys, shown = list(net.state_dict()), repr(net)
    swap_forward(net, ["net.act0", "net.linear1"])
    assert list(net.state_dict()) == keys and repr(net) == shown
    restore_forward(net)
    assert all(m.__dict__.keys() == before[name].keys() for name, m in net.named_modules())
    assert grads(net, torch.randn(2, 4, dtype=F64))["net.linear0.weight"] is None


def test_a_patch_that_was_there_is_put_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    calls = []
    net[1].forward = lambda x: (calls.append(1), torch.tanh(x))[1]
    patch = net[1].forward
    swap_forward(net, ["1"])
    net(torch.ones(1, 2)).sum().backward()
    assert calls and net[0].weight.grad is not None
    restore_forward(net)
    assert net[1].forward is patch


def test_a_module_inside_a_swapped_one_is_swapped_with_it():
    net = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Sequential(nn.Sigmoid())), nn.Tanh())
    assert swap_forward(net, ["*"]) == ["0", "1"]
    assert [name for name, m in net.named_modules() if "forward" in m.__dict__] == ["0", "1"]
    assert swap_forward(net, ["1"]) == ["1"]
    x = torch.randn(3, dtype=F64, requires_grad=True)
    (ours,) = torch.autograd.grad(net(x).sum(), x)
    restore_forward(net)
    torch.testing.assert_close(ours, torch.autograd.grad(net(x).sum(), x)[0])


def test_a_shared_module_is_swapped_once():
    act = nn.Tanh()
    net = nn.Sequential(act, nn.Linear(2, 2), act)
    assert swap_forward(net, ["*"]) == ["0", "1"]
    restore_forward(net)


@pytest.mark.parametrize("where", [["net.actt0"], ["net.act0", "actx*"]])
def test_a_misspelt_name_names_the_nearest(where):
    net = newton("no_grad")
    with pytest.raises(UnknownNameError, match="did you mean 'net.act[01]'"):
        swap_forward(net, where)
    assert not any("forward" in m.__dict__ for m in net.modules())


def test_a_misspelt_structure():
    with pytest.raises(UnknownNameError, match="did you mean 'dense'"):
        swap_forward(nn.Sequential(nn.Tanh()), ["0"], structure="dens")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_on_its_own_weights(clone):
    net = nn.Sequential(nn.Linear(3, 3), Channels(3)).double()
    swap_forward(net, ["1"])
    x = torch.randn(4, 3, dtype=F64)
    before = net(x)
    twin = clone(net)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin[1].rate.fill_(0)
    twin(x).sum().backward()
    torch.testing.assert_close(twin(x), twin[0](x))
    assert torch.equal(net(x), before) and net[1].rate.grad is None and twin[1].rate.grad is not None
    restore_forward(twin)
    assert "forward" in net[1].__dict__ and "forward" not in twin[1].__dict__


def test_optimizers_and_checkpoints_see_no_difference():
    net, x = newton("no_grad"), torch.randn(7, 4, dtype=F64)
    swap_forward(net, ["net.act*"], structure="elementwise")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = net(x).square().mean().item()
    for _ in range(5):
        grads(net, x)
        optimizer.step()
    assert net(x).square().mean().item() < first
    twin = newton("unrolled")
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(x), net(x))


def test_a_structure_that_does_not_hold():
    net = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1))
    swap_forward(net, ["1"], structure="elementwise")
    with pytest.raises(StructureError) as caught:
        net(torch.randn(2, 3))
    assert isinstance(caught.value, DualnnError)
    restore_forward(net)
    net(torch.randn(2, 3)).sum().backward()
