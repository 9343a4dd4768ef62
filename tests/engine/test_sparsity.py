import logging

import pytest
import torch
from torch.nn.functional import conv2d, pad

import dualnn as dn
from dualnn.engine import Sparsity, detect
from dualnn.engine.errors import DualInputError, StructureError, UnknownNameError

F64 = torch.float64


def rand(*shape, dtype=F64):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.1


def tridiagonal(x):
    p = pad(x, (1, 1))
    return p[:-2] - 2 * x + p[2:] + x**3


def laplace(x):
    p = pad(x, (1, 1, 1, 1))
    return p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * x + torch.sin(x)


def loop(x):
    """In-place writes, branches on the index, and a long dependence of the last output."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = x[i] * x[(7 * i) % len(x)]
    out[-1] = out[-1] + x[:5].prod()
    return out


CASES = {
    "elementwise": (torch.tanh, rand(300), 1),
    "tridiagonal": (tridiagonal, rand(500), 3),
    "five points": (laplace, rand(20, 25), 9),
    "periodic": (lambda x: x**2 + x.roll(1) * x.roll(-2), rand(400), 6),
    "few outputs": (lambda x: x.reshape(8, 50).pow(2).sum(1), rand(400), 50),
    "more outputs": (lambda x: torch.cat([x * x, x.flip(0).exp()]), rand(300), 2),
    "arrow": (lambda x: torch.cat([x[:1] * x.sum(), x[1:] * x[0]]), rand(150), 150),
    "dense": (lambda x: x * x.sum(), rand(100), 100),
    "constant in most": (lambda x: x[:3].sum() + torch.zeros_like(x), rand(200), 3),
    "program": (loop, rand(60), 60),
    "convolution": (
        lambda x: conv2d(x[None, None], torch.arange(1.0, 5, dtype=x.dtype).reshape(1, 1, 2, 2))[0, 0].tanh(),
        rand(20, 20),
        8,
    ),
    "one input": (lambda x: x * 3, rand(1), 1),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_dense_jacobian(name, dtype):
    fn, x, most = CASES[name]
    x = x.to(dtype)
    dense = dn.jacobian(fn, x)
    pattern = detect(fn, x)
    assert pattern.directions <= most
    for structure in ("sparse", "auto", "banded", pattern):
        sparse = dn.jacobian(fn, x, structure)
        assert sparse.is_sparse and sparse.shape == dense.shape
        torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tridiagonal", "five points", "periodic", "convolution"])
def test_no_entry_too_many(name):
    fn, x, _ = CASES[name]
    assert detect(fn, x).rows.numel() == int((dn.jacobian(fn, x) != 0).sum())


def test_fewer_directions_than_entries_of_a_row_are_impossible_and_not_many_more_are_used():
    n = 10_000
    pushed = []

    def counted(x):
        pushed.append(x.num_tangents)
        return tridiagonal(x)

    pattern = detect(counted, rand(n))
    assert str(pattern) == f"banded (1, 1): {3 * n - 2} entries, 3 directions for {n} inputs"
    assert sum(pushed) < 300  # to find it
    pushed.clear()
    pattern.values(counted, rand(n))
    assert pushed == [4]  # to use it: three, and the check


def test_entries_that_vanish_at_a_point():
    def fn(x):
        return x.clamp_min(0.5) + 0 * x.roll(1)

    low, high = torch.full((200,), 0.1, dtype=F64), torch.full((200,), 0.9, dtype=F64)
    assert detect(fn, low).rows.numel() == 0
    with pytest.raises(StructureError, match="outside the pattern"):
        dn.jacobian(fn, high, detect(fn, low))
    torch.testing.assert_close(dn.jacobian(fn, high, detect(fn, low, high)).to_dense(), torch.eye(200, dtype=F64))


def test_derivatives_of_the_entries():
    x = rand(50)
    pattern = detect(tridiagonal, x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pattern.values(tridiagonal, leaf).sum(), leaf)
    torch.testing.assert_close(gradient, 6 * x)
    _, moved = dn.jvp(lambda x: pattern.values(tridiagonal, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(moved.sum(), (6 * x).sum())


def test_auto_says_what_it_found(caplog):
    with caplog.at_level(logging.INFO, "dualnn"):
        dn.jacobian(tridiagonal, rand(300), "auto")
    assert "banded (1, 1): 898 entries, 3 directions for 300 inputs" in caplog.text


def test_the_callers_random_numbers_do_not_move():
    state = torch.random.get_rng_state()
    dn.jacobian(tridiagonal, rand(300), "sparse")
    assert torch.equal(state, torch.random.get_rng_state())


class TestBlock:
    def test_equal_to_sample_by_sample(self):
        x = rand(2, 3, 4)

        def fn(x):
            return torch.cat([x.cumsum(-1) * x, x.sum(-1, keepdim=True)], -1)

        found = dn.jacobian(fn, x, "block")
        assert found.shape == (2, 3, 5, 4)
        torch.testing.assert_close(found[1, 2], dn.jacobian(fn, x[1, 2]))

    def test_samples_that_mix(self):
        with pytest.raises(StructureError, match="mixes samples"):
            dn.jacobian(lambda x: x - x.mean(0), rand(4, 3), "block")

    def test_shapes(self):
        with pytest.raises(StructureError, match="use 'dense'"):
            dn.jacobian(torch.sin, rand(4), "block")
        with pytest.raises(StructureError, match="got \\(4,\\)"):
            dn.jacobian(lambda x: x.sum(-1), rand(4, 3), "block")


class TestClaims:
    def test_a_given_bandwidth(self):
        x = rand(40)
        found = dn.jacobian(tridiagonal, x, "banded", bandwidth=(1, 2))
        torch.testing.assert_close(found.to_dense(), dn.jacobian(tridiagonal, x))

    def test_a_bandwidth_too_small(self):
        with pytest.raises(StructureError, match="wider bandwidth"):
            dn.jacobian(tridiagonal, rand(40), "banded", bandwidth=(1, 0))

    def test_a_pattern_of_another_input(self):
        with pytest.raises(StructureError, match="inputs \\(40,\\)"):
            dn.jacobian(tridiagonal, rand(41), detect(tridiagonal, rand(40)))

    def test_not_finite(self):
        with pytest.raises(StructureError, match="not finite"):
            detect(torch.sqrt, torch.zeros(30, dtype=F64))

    def test_not_a_tensor(self):
        with pytest.raises(StructureError, match="one tensor"):
            detect(lambda x: (x, x), rand(30))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"structure": "sparse", "bandwidth": (1, 1)}, "bandwidth is for"),
            ({"structure": "sparse", "chunk": 2}, "chunk is for"),
            ({"structure": "banded", "bandwidth": (-1, 0)}, ">= 0"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(DualInputError, match=message):
            dn.jacobian(tridiagonal, rand(30), **options)

    def test_misspelt(self):
        with pytest.raises(UnknownNameError, match="did you mean 'sparse'"):
            dn.jacobian(tridiagonal, rand(30), "sparce")


def test_printed():
    assert isinstance(detect(torch.sin, rand(20)), Sparsity)
    assert str(detect(torch.sin, rand(20))).startswith("elementwise: 20 entries, 1 directions")
    assert str(detect(lambda x: x * x.sum(), rand(20))).startswith("dense")
