import pytest
import torch

from dualnn.engine.directions import RANDOM, Directions, mixed


@pytest.mark.parametrize("sampler", RANDOM)
def test_entries_have_mean_0_and_variance_1_and_are_independent(sampler):
    u = Directions(sampler, 20_000, key=3).draw(0, 0, (4,), torch.zeros((), dtype=torch.float64))
    assert float(u.mean(0).abs().max()) < 4 / 20_000**0.5
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(4, dtype=torch.float64), rtol=0, atol=6 / 20_000**0.5)


@pytest.mark.parametrize("sampler", RANDOM)
def test_low_rank_directions_have_unit_variance(sampler):
    a, b = Directions(sampler, 20_000, key=3).factors(0, 0, (2, 3), 2, torch.zeros((), dtype=torch.float64))
    u = (a.transpose(1, 2) @ b).flatten(1)
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(6, dtype=torch.float64), rtol=0, atol=9 / 20_000**0.5)


@pytest.mark.parametrize("sampler", RANDOM)
def test_keys_and_blocks_give_unrelated_directions(sampler):
    like = torch.zeros((), dtype=torch.float64)
    rows = [Directions(sampler, 1, key).draw(block, 0, (1000,), like)[0] for key in range(4) for block in range(4)]
    table = torch.stack(rows)
    assert float((table @ table.T / 1000 - torch.eye(16)).abs().fill_diagonal_(0).max()) < 0.2


def test_basis_blocks_join_to_the_identity():
    like = torch.zeros((), dtype=torch.float64)
    shapes, offsets = [(2, 2), (3,)], [0, 4]
    for start, num in ((0, 7), (2, 4), (6, 1)):
        parts = [Directions("basis", num, 0, start).draw(i, offsets[i], shapes[i], like).flatten(1) for i in (0, 1)]
        assert torch.equal(torch.cat(parts, 1), torch.eye(7, dtype=torch.float64)[start : start + num])


def test_basis_factors_are_the_unit_matrices():
    like = torch.zeros((), dtype=torch.float64)
    a, b = Directions("basis", 5, 0, 3).factors(0, 2, (2, 3), 2, like)
    expected = torch.eye(8, dtype=torch.float64)[3:8, 2:8].reshape(5, 2, 3)
    assert torch.equal(a.transpose(1, 2) @ b, expected)


def test_half_precision_gets_the_directions_of_single_precision():
    draws = [Directions("gaussian", 2, 5).draw(0, 0, (3,), torch.zeros((), dtype=d)) for d in
             (torch.float32, torch.bfloat16)]  # fmt: skip
    assert torch.equal(draws[0].bfloat16(), draws[1])


def test_neighbouring_seeds_are_far_apart():
    seeds = {mixed(key, index) for key in range(100) for index in range(-1, 100)}
    assert len(seeds) == 100 * 101 and all(0 <= s < 2**63 for s in seeds)
