import os

import pytest
import torch

from dualnn.data import Digits
from dualnn.engine.errors import DualInputError


def parts(data):
    return [data.split.train, data.split.val, data.split.test]


def test_sizes_types_and_shapes():
    data = Digits()
    assert [len(part) for part in parts(data)] == [1437, 180, 180]
    assert (data.num_classes, data.input_shape, data.batch_size) == (10, (64,), 64)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (64, 64) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert set(data.split.train.y.tolist()) == set(range(10))


def test_images_are_the_same_numbers():
    flat, image = Digits(), Digits(as_image=True)
    assert image.input_shape == (1, 8, 8)
    assert torch.equal(image.split.test.x.view(-1, 64), flat.split.test.x)


def test_every_sample_is_in_one_part():
    rows = torch.cat([part.x for part in parts(Digits())])
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797  # scikit-learn's digits hold no two equal images


def test_split_follows_its_seed_alone():
    torch.manual_seed(1)
    first = Digits(split_seed=3)
    torch.manual_seed(2)
    again, other = Digits(split_seed=3, shuffle_seed=9), Digits(split_seed=4)
    assert torch.equal(first.split.test.x, again.split.test.x)
    assert not torch.equal(first.split.test.x, other.split.test.x)


def test_standardised_by_the_training_part():
    train, val, _ = parts(Digits())
    assert train.x.mean().abs() < 1e-5 and abs(train.x.std() - 1) < 1e-5
    assert val.x.mean().abs() > 1e-5  # not by its own statistics
    assert train.x.abs().max() < 5  # pixels that are nearly constant have not blown up


def test_loading_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    batch = next(iter(Digits(shuffle_seed=0).train_dataloader()))
    assert len(batch) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffle_seed_defaults_to_the_seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert Digits().shuffle_seed == 5
    assert Digits(shuffle_seed=2).shuffle_seed == 2
    assert Digits(shuffle_seed=0).shuffle_seed == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert "PL_GLOBAL_SEED" not in os.environ and Digits().shuffle_seed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_fraction": 0.0}, "val_fraction must lie strictly between 0 and 1"),
        ({"test_fraction": 1.5}, "test_fraction must lie strictly between 0 and 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave nothing to train on"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DualInputError, match=message):
        Digits(**options)


def test_drop_last_of_everything_is_an_error():
    with pytest.raises(DualInputError, match="leaves no batch of 1437 training samples"):
        Digits(batch_size=2000, drop_last=True).train_dataloader()
