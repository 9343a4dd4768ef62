"""Every representation of a tangent obeys one protocol: what it does equals what its dense form does."""

import pytest
import torch

from dualnn.engine import StructureError
from dualnn.engine.scaled import Scaled, _Factor
from dualnn.engine.tangents import Base, Dense, Drawn, LowRank, PerSample, Separate, Zero, aligned, scaled
from tests.engine.oracles import rand

K, SHAPE = 4, torch.Size((3, 2))


def draw(seed):
    return lambda: rand(seed)(K, *SHAPE)


def factors():
    return rand(5)(K, 2, 3), rand(6)(K, 2, 2)


KINDS = {
    "Zero": lambda: Zero(K),
    "Dense": lambda: Dense(draw(1)()),
    "Scaled": lambda: Scaled(Base(draw(1)()), _Factor(rand(9)(3, 1), False), 0.5),
    "Scaled, a number": lambda: Scaled(Base(draw(1)()), None, 2.0),
    "PerSample": lambda: PerSample(draw(2)(), 2),
    "Separate": lambda: Separate(K, {0: rand(3)(3, 1), 2: rand(4)(2)}, SHAPE),
    "LowRank": lambda: LowRank(K, factors, SHAPE),
    "Drawn": lambda: Drawn(K, draw(7)),
}


def dense(tan):
    return torch.zeros(K, *SHAPE, dtype=torch.float64) if tan.is_zero else tan.dense()


@pytest.fixture(params=KINDS)
def tan(request):
    return KINDS[request.param]()


def test_num_and_shape(tan):
    assert tan.num == K and dense(tan).shape == (K, *SHAPE)
    assert tan.is_zero == isinstance(tan, Zero)
    torch.testing.assert_close(dense(tan), dense(tan), rtol=0, atol=0)  # drawn again, the same


@pytest.mark.parametrize("factor", [2.0, 1.0, rand(8)(3, 2), rand(8)(2), rand(8)(3, 1), rand(8)(3, 2) > 0])
@pytest.mark.parametrize("singular", [False, True])
def test_scale(tan, factor, singular):
    out = tan.scale(factor if not (singular and isinstance(factor, float)) else torch.tensor(factor), SHAPE, singular)
    assert out.num == K
    torch.testing.assert_close(dense(out), dense(tan) * factor)


def test_scale_broadcasts_to_a_larger_result(tan):
    shape = torch.Size((5, 3, 2))
    out = tan.scale(rand(8)(5, 1, 1), shape)
    if not out.is_zero:
        torch.testing.assert_close(out.dense(), dense(tan).unsqueeze(1) * rand(8)(5, 1, 1))
    again = out if out.is_zero else out.scale(1.0, shape)
    assert again.is_zero or again.dense().shape == (K, *shape)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_exact_zeros_survive_a_singular_factor(tan, bad):
    factor = torch.full(SHAPE, bad, dtype=torch.float64)
    out = tan.scale(factor, SHAPE, singular=True)
    assert torch.equal(dense(out) == 0, dense(tan) == 0)


@pytest.mark.parametrize("other", KINDS)
def test_plus(tan, other):
    right = KINDS[other]()
    mixed = isinstance(tan, PerSample) != isinstance(right, PerSample)
    if mixed and not tan.is_zero and not right.is_zero:
        with pytest.raises(StructureError):
            tan.plus(right)
        return
    out = tan.plus(right)
    assert out.num == K
    torch.testing.assert_close(dense(out), dense(tan) + dense(right))
    assert isinstance(out, PerSample) == (isinstance(tan, PerSample) or isinstance(right, PerSample))


def test_plus_nothing(tan):
    assert tan.plus(None) is tan


def test_map(tan):
    out = tan.map(lambda t: t.sum(-1))
    assert out.num == K and isinstance(out, PerSample) == isinstance(tan, PerSample)
    if not out.is_zero:
        torch.testing.assert_close(out.dense(), dense(tan).sum(-1))


def test_zero_calls_nothing():
    assert Zero(K).map(lambda t: 1 / 0).is_zero and Zero(K).scale(torch.tensor(torch.inf), SHAPE).is_zero


def test_separate_keeps_parts_unbroadcast():
    tan = KINDS["Separate"]().scale(2.0, SHAPE).plus(Separate(K, {0: torch.ones(1), 1: torch.ones(1)}, SHAPE))
    assert isinstance(tan, Separate) and set(tan.parts) == {0, 1, 2} and tan.parts[0].shape == (3, 1)


def test_drawn_and_low_rank_store_nothing():
    calls = []
    tan = Drawn(K, lambda: (calls.append(1), draw(1)())[1])
    assert calls == []
    tan.scale(2.0, SHAPE)
    tan.dense()
    assert len(calls) == 2


def test_low_rank_is_a_sum_of_outer_products():
    a, b = factors()
    expected = sum(a[:, r, :, None] * b[:, r, None, :] for r in range(2))
    torch.testing.assert_close(KINDS["LowRank"]().dense(), expected)


def test_samples():
    tan = KINDS["PerSample"]()
    assert tan.samples().shape == (2, 2, *SHAPE) and torch.equal(tan.samples()[1, 0], tan.data[2])
    with pytest.raises(StructureError):
        tan.plus(PerSample(tan.data, 4))


def test_aligned_and_scaled():
    t = rand(1)(K, 2)
    assert aligned(t, 1) is t and aligned(t, 3).shape == (K, 1, 1, 2)
    assert scaled(t, 1.0, torch.Size((2,)), False) is t
    assert scaled(t, torch.ones(3, 1), torch.Size((3, 2)), False).shape == (K, 3, 2)
