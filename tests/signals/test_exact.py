import random

import numpy as np
import pytest
import torch
from torch import nn

from dualnn.engine.errors import DualInputError
from dualnn.engine.snapshot import RandomStates
from dualnn.signals import Exact, signal_loss
from dualnn.training.meters import LiveBytes
from tests.signals.estimators import assert_exact, gradient, problem


@pytest.mark.parametrize("chunk", [1, 2, 8, 26, 27, 1000])
def test_every_chunk_size_gives_the_gradient(chunk):
    assert_exact(problem("mlp"), Exact(chunk))


def test_chunk_must_be_positive():
    with pytest.raises(DualInputError, match="at least 1, got 0"):
        Exact(chunk=0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_unused_parameters_get_no_gradient_and_one_warning(chunk):
    net = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    with pytest.warns(UserWarning, match="does not use 1.weight, 1.bias") as caught:
        signal_loss(lambda: net[0](torch.ones(3, 2)).mean(), net, Exact(chunk), key=0).backward()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert net[0].weight.grad is not None and net[1].weight.grad is None


def test_a_step_that_cannot_be_repeated():
    found = problem("mlp")
    own = random.Random(0)
    with pytest.raises(DualInputError, match="a generator of its own"):
        gradient(found._replace(step=lambda: found.step() * own.random()), Exact(chunk=5))


def test_every_chunk_sees_the_same_random_numbers():
    """Of Python's and numpy's global generators too, which are left as one run of the step leaves them."""
    found = problem("mlp")

    def noisy():
        return found.step() * (1 + random.random()) * (1 + float(np.random.rand()))

    states = RandomStates()
    whole = gradient(found._replace(step=noisy), Exact(chunk=None))
    after = random.getstate(), np.random.get_state()[1].tolist()
    states.restore()
    for a, b in zip(whole, gradient(found._replace(step=noisy), Exact(chunk=5)), strict=True):
        torch.testing.assert_close(a, b)
    assert after == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_loss_that_is_nan_passes():
    found = problem("mlp")
    grads = gradient(found._replace(step=lambda: found.step() * float("nan")), Exact(chunk=5))
    assert all(bool(g.isnan().all()) for g in grads)


def test_live_bytes_do_not_grow_with_the_steps_of_a_loop():
    def live(steps):
        stiffness = nn.ParameterList([torch.tensor([1.0, 2.0])])

        def step():
            x, v = torch.ones(2), torch.zeros(2)
            for _ in range(steps):
                v = v - 0.01 * stiffness[0] * x
                x = x + 0.01 * v
            return x.square().sum()

        with LiveBytes() as meter:
            signal_loss(step, stiffness, Exact(), key=0).backward()
        return meter.peak

    assert live(10) == live(200)
