import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualnn.engine.errors import DualInputError, StructureError, UnknownNameError
from dualnn.layers import swap_forward
from dualnn.models import NewtonTanh
from dualnn.signals import ActivityPerturbation, Backprop, SampleMixingWarning, signal_loss
from dualnn.training.meters import LiveBytes
from tests.signals.estimators import Problem, assert_exact, assert_mean, gradient, problem, relative_errors


class Shift(nn.Module):
    """z = x + w: the gradient of the weights is that of the activities."""

    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape, dtype=torch.float64))

    def forward(self, x):
        return x + self.w


@pytest.mark.parametrize("tangents", [1, 4])
@pytest.mark.parametrize(("sampler", "more"), [("gaussian", 1), ("rademacher", -1)])
@pytest.mark.parametrize(("per_sample", "n"), [(True, 6), (False, 5 * 6)])
def test_relative_squared_error_follows_the_law(per_sample, n, sampler, more, tangents):
    net, x = Shift(5, 6), torch.randn(5, 6, dtype=torch.float64)
    found = Problem(net, lambda: torch.tanh(net(x)).sum(1).square().mean())
    signal = ActivityPerturbation(tangents, per_sample, sampler)
    assert_mean(relative_errors(found, signal, keys=250), (n + more) / tangents)


def test_basis_needs_a_tangent_for_every_activity():
    found = problem("mlp")
    with pytest.raises(DualInputError, match="needs tangents=6"):
        gradient(found, ActivityPerturbation(5, sampler="basis"))


@pytest.mark.parametrize("options", [{"tangents": 0}, {"probe_every": 0}])
def test_numbers_that_make_no_sense(options):
    with pytest.raises(DualInputError, match="at least 1"):
        ActivityPerturbation(**options)


def test_a_typo_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'rademacher'"):
        ActivityPerturbation(sampler="rademaher")


def mixing(kind):
    """Steps in which samples influence one another before the loss."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    losses = {
        "batchnorm": lambda: F.cross_entropy(net(x), target),
        "contrastive": lambda: F.cross_entropy(net[0](x) @ net[0](x).T, torch.arange(4)),
        "shuffled": lambda: F.cross_entropy(net[2](net[0](x))[[1, 2, 3, 0]], target[[1, 2, 3, 0]]),
        "one sample": lambda: net[0](x)[2].sum(),  # four features look like four samples
    }
    if kind != "batchnorm":
        net[1].requires_grad_(False)
    return Problem(net, losses[kind])


@pytest.mark.filterwarnings("ignore:no perturbed module used")  # not what is tested here
@pytest.mark.parametrize("kind", ["batchnorm", "contrastive", "shuffled", "one sample"])
def test_mixing_of_samples_is_said_once(kind):
    found, signal = mixing(kind), ActivityPerturbation(2, probe_every=1)
    with pytest.warns(SampleMixingWarning, match="per_sample=False"):
        gradient(found, signal)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SampleMixingWarning)
        gradient(found, signal, key=1)


def test_no_mixing_no_warning():
    found = problem("batchnorm")
    found.module.eval()
    assert_exact(found, ActivityPerturbation(70, sampler="basis", probe_every=1))


def test_probes_do_not_change_the_estimate():
    found = problem("mlp")
    signal = ActivityPerturbation(3)
    probed, plain = gradient(found, signal), gradient(found, signal)
    for a, b in zip(probed, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_state_dict_keeps_the_schedule():
    found, signal = problem("mlp"), ActivityPerturbation(2, probe_every=3)
    for key in range(4):
        gradient(found, signal, key)
    state = copy.deepcopy(signal.state_dict())
    resumed = ActivityPerturbation(2, probe_every=3)
    resumed.load_state_dict(state)
    for key in range(4, 8):
        for a, b in zip(gradient(found, signal, key), gradient(found, resumed, key), strict=True):
            assert torch.equal(a, b)
    assert resumed.state_dict() == signal.state_dict() != state


LOST = {
    "a row": (lambda net, x: (net[2](net[0](x).mean() * torch.ones(1, 2).to(x))).sum(), "first axis is not the batch"),
    "maximum over the batch": (lambda net, x: net(x).amax(), "lost the batch axis"),
    "one sample": (lambda net, x: net(x)[0, 1], "lost the batch axis"),
    "selected rows": (lambda net, x: net(x)[:3].mean(), "3 rows cannot be shared out to a batch of 4"),
    "another batch": (lambda net, x: net[0](x).mean() + net[0](x[:3]).mean(), "first axis is not the batch"),
    "centred": (lambda net, x: (net(x) - net(x).mean(0)).square().mean(), "samples mix"),
}


@pytest.mark.filterwarnings("ignore:no perturbed module used")  # not what is tested here
@pytest.mark.parametrize("kind", LOST)
def test_derivatives_per_sample_that_do_not_exist(kind):
    loss, message = LOST[kind]
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    found = Problem(net, lambda: loss(net, torch.randn(4, 3, dtype=torch.float64)))
    with pytest.raises(StructureError, match=message) as caught:
        signal_loss(found.step, net, ActivityPerturbation(2), key=0)
    assert "per_sample=False" in str(caught.value)
    signal_loss(found.step, net, ActivityPerturbation(2, per_sample=False), key=0).backward()


def test_a_step_that_calls_no_module():
    net = nn.Linear(2, 1)
    with pytest.raises(DualInputError, match="called no submodule of Linear"):
        signal_loss(lambda: net.weight.sum(), net, ActivityPerturbation(), key=0)


def test_use_outside_of_a_module_is_said():
    found = problem("mlp")

    def step():
        return found.step() + found.module[0].weight.square().sum()

    with pytest.warns(UserWarning, match="uses 0.weight outside of the modules that own"):
        gradient(found._replace(step=step), ActivityPerturbation())


def test_logging_of_parameters_is_no_use():
    found, seen = problem("mlp"), []

    def step():
        weight = found.module[0].weight
        seen.append((weight.detach().norm().item(), weight.numel(), weight.shape, weight.requires_grad, weight.data))
        return found.step()

    gradient(found._replace(step=step), ActivityPerturbation())
    assert len(seen) == 1


def test_attention_owns_its_projection():
    net = nn.ModuleList([nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)]).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)

    def step():
        h = net[0](x)
        return net[1](h, h, h)[0].square().mean()

    assert_exact(Problem(net, step), ActivityPerturbation(64, sampler="basis"))


def test_a_table_that_is_its_modules_output():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(1, 3, dtype=torch.float64))

        def forward(self):
            return self.rows

    net = nn.ModuleList([nn.Linear(2, 3), Table()]).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    found = Problem(net, lambda: torch.tanh(net[0](x) + net[1]()).square().mean())
    assert_exact(found, ActivityPerturbation(15, per_sample=False, sampler="basis"))
    with pytest.raises(StructureError, match="first axis is not the batch"):
        gradient(found, ActivityPerturbation(6))


def test_swapped_modules_are_perturbed_as_a_whole():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(NewtonTanh(tol=1e-14)), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    swap_forward(net, ["1"], structure="elementwise")
    assert_exact(Problem(net, lambda: net(x).square().mean()), ActivityPerturbation(16, sampler="basis"))


def test_live_bytes_grow_with_depth_as_backprops():
    def live(depth, signal):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Tanh())]
        net, x = nn.Sequential(*layers, nn.Linear(16, 1)), torch.randn(64, 16)
        with LiveBytes() as meter:
            signal_loss(lambda: net(x).square().mean(), net, signal, key=0).backward()
        return meter.peak

    ours, theirs = ([live(depth, s) for depth in (8, 64)] for s in (ActivityPerturbation(4), Backprop()))
    assert ours[1] - ours[0] < 1.05 * (theirs[1] - theirs[0])
