import pytest
import torch
from torch import nn

from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.signals import Backprop, ForwardGradient, signal_loss
from dualnn.training.meters import LiveBytes
from tests.signals.estimators import assert_mean, problem, relative_errors


@pytest.mark.parametrize("tangents", [1, 5])
@pytest.mark.parametrize(("sampler", "more"), [("gaussian", 1), ("rademacher", -1)])
def test_relative_squared_error_follows_the_law(sampler, more, tangents):
    found = problem("logistic")
    n = sum(p.numel() for p in found.module.parameters())
    errors = relative_errors(found, ForwardGradient(tangents, sampler), keys=300)
    assert_mean(errors, (n + more) / tangents)


def test_low_rank_costs_little_variance():
    found = problem("logistic")
    n = sum(p.numel() for p in found.module.parameters())
    for rank in (1, 3):
        error = float(relative_errors(found, ForwardGradient(4, rank=rank), keys=200).mean())
        assert (n - 1) / 4 * 0.8 < error < 3 * (n - 1) / 4


class Partly(nn.Module):
    """Has a part that the step does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("rank", [None, 1])
def test_unused_parameters_get_no_gradient_and_one_warning(rank):
    net = Partly()
    with pytest.warns(UserWarning, match="does not use spare.weight, spare.bias") as caught:
        signal_loss(lambda: net(torch.ones(3, 2)).mean(), net, ForwardGradient(rank=rank), key=0).backward()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert net.spare.weight.grad is None and net.spare.bias.grad is None
    assert net.used.weight.grad is not None


@pytest.mark.parametrize("tangents", [10, 12])
def test_basis_needs_as_many_tangents_as_numbers(tangents):
    found = problem("logistic")
    with pytest.raises(DualInputError, match="tangents=8"):
        signal_loss(found.step, found.module, ForwardGradient(tangents, "basis"), key=0)


@pytest.mark.parametrize("options", [{"tangents": 0}, {"rank": 0}])
def test_numbers_that_make_no_sense(options):
    with pytest.raises(DualInputError, match="at least 1"):
        ForwardGradient(**options)


@pytest.mark.parametrize(("options", "nearest"), [({"sampler": "gausian"}, "gaussian"), ({"combine": "meen"}, "mean")])
def test_typos_name_the_nearest(options, nearest):
    with pytest.raises(UnknownNameError, match=f"did you mean '{nearest}'"):
        ForwardGradient(**options)


def live(depth, signal):
    """Peak of live bytes of a step, before its backward; and the bytes of a gradient."""
    net = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 1))
    x = torch.randn(64, 16)
    with LiveBytes() as meter:
        _ = signal_loss(lambda: net(x).square().mean(), net, signal, key=0)
    return meter.peak, 4 * sum(p.numel() for p in net.parameters())


def test_live_bytes_do_not_grow_with_depth():
    activations = 4 * 64 * 16  # one layer's
    (forward, small), (forward_deep, large) = (live(depth, ForwardGradient(2, rank=1)) for depth in (8, 64))
    (backprop, _), (backprop_deep, _) = (live(depth, Backprop()) for depth in (8, 64))
    assert forward_deep - forward < large - small + activations
    assert backprop_deep - backprop > 50 * activations


@pytest.mark.parametrize("rank", [1, None])
def test_a_deep_networks_step_takes_a_fifth_of_backprops_live_bytes(rank):
    """64 layers, 1024 samples, the backward pass included; beside the gradient itself, no more than 4 layers do."""
    batch, width = 1024, 64

    def step(depth, signal):
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
        net, x = nn.Sequential(*layers), torch.randn(batch, width)
        with LiveBytes() as meter:
            signal_loss(lambda: net(x).square().mean(), net, signal, key=0).backward()
        return meter.peak, 4 * sum(p.numel() for p in net.parameters())

    signal = ForwardGradient(1, rank=rank)
    step(1, signal)
    (few, small), (many, large) = step(4, signal), step(64, signal)
    backprop, _ = step(64, Backprop())
    assert many < 0.2 * backprop
    assert (many - large) - (few - small) < 4 * batch * width  # no more than one layer's activations
