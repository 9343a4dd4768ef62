"""experiments/newton-chain: implicit steps in a row, tangents through every one, in constant memory."""

import importlib.util
import pathlib

import pytest
import torch

import dualnn as dn

PATH = pathlib.Path(__file__).parents[2] / "experiments" / "newton-chain" / "chain.py"


@pytest.fixture(scope="module")
def chain():
    spec = importlib.util.spec_from_file_location("newton_chain", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_ways_one_derivative(chain):
    _, ours = chain.duals(chain.P, 40, compile=False)
    torch.testing.assert_close(ours, chain.forward_mode(chain.P, 40), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(ours, chain.backprop(chain.P, 40).T, rtol=1e-8, atol=1e-11)


def test_the_written_out_jacobian_of_the_rivals(chain):
    x = torch.randn(4, dtype=torch.float64)
    ours = dn.jacobian(lambda x: chain.residual(x, chain.X0, torch.tensor(0.3, dtype=torch.float64), chain.P), x)
    torch.testing.assert_close(chain.jacobian(x, chain.P), ours)


def flat(seen, resident):
    """Live bytes equal at every mark from the first, resident ones within a few pages of it."""
    (_, live, first), *later = seen
    assert later
    for _, now, held in later:
        assert now == live
        assert held - first < resident


def test_memory_of_the_plain_loop(chain):
    flat(chain.memory(1000, compile=False), 2**24)


@pytest.mark.slow
def test_ten_thousand_compiled_steps(chain):
    for ours, plain in zip(chain.duals(chain.P, 300, True), chain.duals(chain.P, 300, False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)
    flat(chain.memory(10_000, compile=True), 2**24)
    assert chain.sensitivity_error(10_000) < 1e-5


@pytest.mark.slow
def test_a_million_steps(chain):
    chain.duals(chain.P, 100, compile=True)  # built before the first mark
    flat(chain.memory(1_000_000, compile=True), 2**25)
