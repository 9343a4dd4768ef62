import pytest
import torch

from dualnn.data import EpochShuffle, ResumableLoader, TensorSplit
from dualnn.engine.errors import DualInputError


def numbers(count=10):
    return TensorSplit(torch.arange(float(count)), torch.arange(count) % 3)


def batches(loader):
    return [x.tolist() for x, _ in loader]


def order(seed, epoch, length=50):
    shuffle = EpochShuffle(length, seed)
    shuffle.set_epoch(epoch)
    return list(shuffle)


def test_order_is_a_function_of_seed_and_epoch():
    assert order(1, 2) == order(1, 2)
    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == 16  # seed + epoch would repeat itself
    assert all(sorted(o) == list(range(50)) for o in orders)


def test_shuffling_leaves_the_global_generator_alone():
    loader = ResumableLoader.over(numbers(), 3, shuffle_seed=0)
    state = torch.get_rng_state()
    batches(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_global_seed_does_not_change_the_order():
    loader = ResumableLoader.over(numbers(), 3, shuffle_seed=0)
    torch.manual_seed(0)
    first = batches(loader)
    torch.manual_seed(1)
    assert batches(loader) == first


def test_a_batch_keeps_inputs_and_labels_together():
    for x, y in ResumableLoader.over(numbers(), 4, shuffle_seed=5):
        assert torch.equal(x.long() % 3, y)


def test_drop_last():
    assert [len(b) for b in batches(ResumableLoader.over(numbers(), 4))] == [4, 4, 2]
    assert [len(b) for b in batches(ResumableLoader.over(numbers(), 4, drop_last=True))] == [4, 4]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_state_goes_on_in_the_same_epoch(done):
    def fresh():
        return ResumableLoader.over(numbers(), 4, shuffle_seed=7)

    whole = fresh()
    run = []
    for epoch in (2, 3):
        whole.set_epoch(epoch)
        run += batches(whole)

    stopped = fresh()
    stopped.set_epoch(2)
    passing = iter(stopped)
    for _ in range(done):
        next(passing)
    resumed = fresh()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    resumed.set_epoch(2 if done < 3 else 3)
    rest = batches(resumed)
    if done < 3:
        resumed.set_epoch(3)
        rest += batches(resumed)
    assert rest == run[done:]


def test_lengths_must_agree():
    with pytest.raises(DualInputError, match="3 inputs but 2 labels"):
        TensorSplit(torch.zeros(3), torch.zeros(2))
