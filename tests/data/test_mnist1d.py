import random

import numpy as np
import pytest
import torch

from dualnn.data import MNIST1D, mnist1d
from dualnn.engine.errors import DualInputError


@pytest.fixture(autouse=True)
def fresh_cache():
    mnist1d._make.cache_clear()


def test_parts_and_shapes():
    data = MNIST1D(num_samples=200)
    assert [len(p) for p in (data.split.train, data.split.val, data.split.test)] == [144, 16, 40]
    assert data.split.train.x.shape == (144, 40) and data.split.train.x.dtype == torch.float32
    assert (data.num_classes, data.input_shape) == (10, (40,))
    sequence = MNIST1D(num_samples=200, as_sequence=True)
    assert sequence.input_shape == (40, 1)
    assert torch.equal(sequence.split.test.x.squeeze(-1), data.split.test.x)


def test_global_generators_are_put_back():
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    MNIST1D(num_samples=50).setup()
    assert random.getstate() == before[0]
    after = np.random.get_state(legacy=False)
    assert after["state"]["pos"] == before[1]["state"]["pos"]
    assert np.array_equal(after["state"]["key"], before[1]["state"]["key"])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_are_put_back_after_an_error(monkeypatch):
    import mnist1d.data

    def fails(args):
        random.seed(args.seed)
        raise OSError("no")

    monkeypatch.setattr(mnist1d.data, "make_dataset", fails)
    state = random.getstate()
    with pytest.raises(OSError, match="no"):
        MNIST1D(num_samples=50).setup()
    assert random.getstate() == state


def test_nothing_is_downloaded(monkeypatch):
    import requests

    monkeypatch.setattr(requests, "get", None)
    MNIST1D(num_samples=50).setup()


def test_data_follow_their_seeds_alone():
    first, again = MNIST1D(num_samples=100), MNIST1D(num_samples=100)
    x = first.split.train.x.clone()
    mnist1d._make.cache_clear()
    random.seed(1)
    assert torch.equal(again.split.train.x, x)
    assert not torch.equal(MNIST1D(num_samples=100, data_seed=1).split.test.x, first.split.test.x)
    assert not torch.equal(MNIST1D(num_samples=100, split_seed=1).split.val.x, first.split.val.x)


def test_too_few_samples():
    with pytest.raises(DualInputError, match="num_samples must be at least 50, got 5"):
        MNIST1D(num_samples=5)
