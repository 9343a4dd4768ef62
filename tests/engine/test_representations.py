"""What is saved by structure changes no result: every representation of tangents against its dense form."""

import pytest
import torch
import torch.nn.functional as F

import dualnn as dn
from dualnn.engine import scaled, tangents
from dualnn.engine.scaled import scaled_tangents
from dualnn.engine.tangents import Dense, Drawn, LowRank, Separate, Zero
from dualnn.engine.transforms import push
from tests.engine.oracles import rand

K, B, N, M = 4, 6, 5, 3


def mlp(x, w, b):
    h = F.linear(x, w, b)
    h = torch.tanh(h) * torch.sigmoid(h) + 0.1 * h
    return F.layer_norm(h, h.shape[-1:]).square().mean(0)


def formula(x, w, b):
    y = torch.sin(x) * b[0] + x / (1 + x * x)
    return torch.where(y > 0.1, torch.sqrt(y.abs() + 0.1), -0.5 * y) + torch.relu(x)


def convolution(x, w, b):
    kernel = w.reshape(1, M, N)[:, :, :3].transpose(0, 1)
    return F.conv1d(x.reshape(B, 1, N), kernel, padding=1).exp().sum(-1)


PROGRAMS = {"mlp": mlp, "formula": formula, "convolution": convolution}
SHAPES = (B, N), (M, N), (M,)


def inputs():
    draw = rand(3)
    return [draw(*s) for s in SHAPES]


def low_rank():
    a, b = rand(4)(K, 2, M), rand(5)(K, 2, N)
    return LowRank(K, lambda: (a, b), torch.Size(SHAPES[1]))


CASES = {  # which argument, its tangent by structure, the same as a tensor
    "zero": (0, lambda: Zero(K), lambda: torch.zeros(K, B, N, dtype=torch.float64)),
    "zero weight": (1, lambda: Zero(K), lambda: torch.zeros(K, M, N, dtype=torch.float64)),
    "low rank": (1, low_rank, lambda: low_rank().dense()),
    "drawn": (1, lambda: Drawn(K, lambda: rand(6)(K, M, N)), lambda: rand(6)(K, M, N)),
    "separate": (
        0,
        lambda: Separate(K, {1: 1.0, 2: rand(7)(N)}, torch.Size((B, N)), torch.zeros((), dtype=torch.float64)),
        lambda: torch.stack([torch.zeros(B, N), torch.ones(B, N), rand(7)(N).expand(B, N), torch.zeros(B, N)]),
    ),
    "scaled": (0, lambda: Dense(rand(8)(K, B, N)), lambda: rand(8)(K, B, N)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_the_structure_the_result_is_the_same(name, case, monkeypatch):
    monkeypatch.setattr(tangents, "LARGE", 1)
    monkeypatch.setattr(scaled, "DIRECTIONS", 1)
    where, structured, dense = CASES[case]
    fn, args = PROGRAMS[name], inputs()

    def run(tan):
        seeds = [Dense(rand(9 + i)(K, *s)) for i, s in enumerate(SHAPES)]  # the other arguments move as well
        seeds[where] = tan
        value, tan = push(fn, args, seeds)
        return value, tan.dense()

    value, on = run(structured())
    with scaled_tangents(False):
        plain, off = run(Dense(dense().double()))
    assert torch.equal(value, plain)
    torch.testing.assert_close(on, off, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_same_to_second_order(case, monkeypatch):
    monkeypatch.setattr(tangents, "LARGE", 1)
    monkeypatch.setattr(scaled, "DIRECTIONS", 1)
    where, structured, dense = CASES[case]
    args, outer = inputs(), [rand(20 + i)(K, *s) for i, s in enumerate(SHAPES)]

    def run(make_tan):
        def inner(*args):
            seeds = [None] * len(args)
            seeds[where] = make_tan()
            tan = push(mlp, args, seeds)[1]
            return args[2].new_zeros(K, M) if tan.is_zero else tan.dense()

        return dn.jvp(inner, tuple(args), tuple(outer))[1]

    on = run(structured)
    with scaled_tangents(False):
        off = run(lambda: Dense(dense().double()))
    torch.testing.assert_close(on, off, rtol=1e-12, atol=1e-12)
