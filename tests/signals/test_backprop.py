import pytest
import torch
from torch import nn

from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.signals import Backprop, signal_loss
from dualnn.training.meters import LiveBytes
from tests.signals.estimators import Problem, assert_exact, problem


def deep(depth=32, width=16):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


@pytest.mark.parametrize("name", ["mlp", "cnn", "dropout", "batchnorm", "pair"])
def test_checkpointing_keeps_the_gradient(name):
    assert_exact(problem(name), Backprop(checkpoint=True))


@pytest.mark.parametrize("names", [["0"], ["1*", "0"], ["*"]])
def test_named_submodules(names):
    assert_exact(problem("mlp"), Backprop(checkpoint=names))


def test_checkpointing_keeps_fewer_bytes():
    net, x = deep(), torch.randn(64, 16)
    live = {}
    for choice in (False, True):
        with LiveBytes() as meter:
            signal_loss(lambda: net(x).square().mean(), net, Backprop(choice), key=0).backward()
        live[choice] = meter.peak
        net.zero_grad()
    assert live[True] < 0.6 * live[False]


@pytest.mark.parametrize("choice", [True, ["2", "3", "4"]])
def test_running_statistics_are_updated_once(choice):
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    buffers = []
    for checkpoint in (False, choice):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)
        ).double()  # fmt: skip
        signal_loss(lambda: net(x).square().mean(), net, Backprop(checkpoint), key=0).backward()  # noqa: B023
        buffers.append(list(net.buffers()))
    for a, b in zip(*buffers, strict=True):
        assert torch.equal(a, b)


class Residual(nn.Sequential):
    """More than its children in turn."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_sequential_with_a_forward_of_its_own_is_not_split():
    net = Residual(deep(2, 3), nn.Tanh()).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_exact(Problem(net, lambda: net(x).square().mean()), Backprop(checkpoint=True))


def test_nothing_to_split():
    found = problem("logistic")
    with pytest.raises(DualInputError, match="no nn.Sequential of two or more children in Linear"):
        signal_loss(found.step, found.module, Backprop(checkpoint=True), key=0)


def test_a_misspelt_name_names_the_nearest():
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2)})
    with pytest.raises(UnknownNameError, match="did you mean 'encoder'"):
        signal_loss(lambda: net["encoder"](torch.ones(1, 2)).sum(), net, Backprop(["encodr"]), key=0)


@pytest.mark.parametrize("choice", [True, ["0"]])
def test_forwards_are_put_back(choice):
    net = deep(2)
    with pytest.raises(ZeroDivisionError):
        signal_loss(lambda: net(torch.ones(1, 16)) / (1 // 0), net, Backprop(choice), key=0)
    assert not any("forward" in m.__dict__ for m in net.modules())
