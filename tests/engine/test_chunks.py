"""Directions a few at a time: the same derivatives, within a budget of bytes."""

import pytest
import torch

import dualnn as dn
from dualnn.engine.chunks import in_chunks
from dualnn.engine.live_bytes import LiveBytes
from tests.engine.oracles import rand

N, WIDTH = 60, 400
X, W = rand(1)(N), rand(2)(WIDTH, N)


def fn(x):
    return torch.tanh(W @ x).sum(0, keepdim=True), {"n": x.sum().long(), "s": x.sin().sum()}


def peak(call):
    with LiveBytes() as live:
        found = call()
    return live.peak, found


def test_a_jacobian_within_a_budget():
    call = lambda **kw: dn.jacobian(fn, X, **kw)  # noqa: E731
    (whole, (jac, more)), (single, _) = peak(call), peak(lambda: call(chunk=1))
    for budget in (3 * single, (single + whole) // 2, whole):
        used, (found, others) = peak(lambda b=budget: call(memory=b))
        assert used <= budget
        torch.testing.assert_close(found, jac, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(others["s"], more["s"])
        assert others["n"] is None
    assert used > whole / 2  # the budget is used


def test_more_memory_fewer_passes():
    runs = []

    def counting(x):
        runs.append(x._tan.num)
        return fn(x)[0]

    dn.jacobian(counting, X, memory=10**9)
    assert runs == [1, 2, 4, N - 7]
    one = WIDTH * 8
    runs.clear()
    dn.jacobian(counting, X, memory=20 * one)
    assert len(runs) > 8 and len(set(runs[3:-1])) == 1 and sum(runs) == N


def test_jvp_within_a_budget():
    t = rand(3)(40, N)
    value, (slope, more) = dn.jvp(fn, (X,), (t,))
    again, (found, others) = dn.jvp(fn, (X,), (t,), memory=60 * WIDTH * 8)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(others["s"], more["s"])
    assert torch.equal(again[0], value[0]) and others["n"] is None
    one = dn.jvp(lambda x: fn(x)[0], (X,), (t[0],), memory=10**6)[1]
    torch.testing.assert_close(one, slope[0])


@pytest.mark.parametrize("method", ["collapsed", "nested"])
def test_second_order_within_a_budget(method):
    g = lambda x: torch.tanh(W[:5, :9] @ x).sum()  # noqa: E731
    x = X[:9]
    h = torch.autograd.functional.hessian(g, x)
    torch.testing.assert_close(dn.hessian(g, x, memory=10**5), h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dn.laplacian(g, x, method=method, memory=10**5), h.trace(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", range(9))
def test_few_directions(size):
    found = in_chunks(lambda i, j: list(range(i, j)), size, None, 10**6)
    assert sum(found, []) == list(range(size)) and len(found) >= 1


def test_too_little_and_too_much():
    with pytest.raises(dn.engine.DualInputError, match="memory=100 bytes do not suffice.*with 2 directions"):
        dn.jacobian(fn, X, memory=100)
    with pytest.raises(dn.engine.DualInputError, match="give one"):
        dn.jacobian(fn, X, memory=100, chunk=2)
    with pytest.raises(dn.engine.DualInputError, match="structure='dense'"):
        dn.jacobian(torch.sin, X, "elementwise", memory=100)
