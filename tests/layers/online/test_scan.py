import pytest
import torch

from dualnn.layers.online.scan import PLAIN, matrices, running, scan, steady, summed

F64 = torch.float64


def one_by_one(a, b, start, steps, reverse):
    h, found = list(start), [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h = [
            (0 if b[i] is None else b[i][t]) + sum(a[i][j][t] * h[j] for j in range(len(h)) if a[i][j] is not None)
            for i in range(len(h))
        ]
        found[t] = [x + torch.zeros_like(s) for x, s in zip(h, start, strict=True)]
    return [torch.stack([f[i] for f in found]) for i in range(len(start))]


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 2, PLAIN, PLAIN + 1, 64, 103])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_levels_equal_the_loop(size, steps, reverse, dtype):
    def some(*shape):
        return torch.randn(*shape, dtype=dtype) / 2

    a = [[some(steps, 1 if i else 2, 3) for _ in range(size)] for i in range(size)]
    b, start = [some(steps, 2, 3) for _ in range(size)], [some(2, 3) for _ in range(size)]
    theirs = torch.stack(one_by_one(a, b, start, steps, reverse), 1)
    added = torch.stack(b, 1)
    ours = scan(matrices(a, b[0]), added, torch.stack(start), reverse)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    scan(matrices(a, b[0]), added, torch.stack(start), reverse, out=added)
    assert torch.equal(added, ours)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [3, 50])
def test_entries_that_are_zero_may_be_left_out(steps, reverse):
    x = torch.randn(steps, 2, dtype=F64) / 2
    start = [torch.randn(2, dtype=F64) for _ in range(2)]
    for a in ([[x, None], [x, x]], [[None, x], [None, None]], [[None, None], [None, x]], [[None] * 2] * 2):
        ours = scan(matrices(a, x), None, torch.stack(start), reverse)
        torch.testing.assert_close(ours, torch.stack(one_by_one(a, [None] * 2, start, steps, reverse), 1))


@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 2, PLAIN, PLAIN + 1, 64, 103])
def test_a_rate_that_never_changes(steps, reverse, dtype):
    rate, b, start = (
        torch.randn(3, dtype=dtype) / 2,
        torch.randn(steps, 2, 3, dtype=dtype),
        torch.randn(2, 3, dtype=dtype),
    )
    (theirs,) = one_by_one([[rate.expand(steps, 1, 3)]], [b], [start], steps, reverse)
    (zero,) = one_by_one([[rate.expand(steps, 1, 3)]], [b], [0 * start], steps, reverse)
    torch.testing.assert_close(steady(rate, b.clone(), reverse=reverse), zero, rtol=1e-10, atol=1e-10)
    assert steady(rate, b, start, reverse) is b
    torch.testing.assert_close(b, theirs, rtol=1e-10, atol=1e-10)


def test_powers_are_exact_to_rounding():
    rate = torch.polar(torch.tensor([0.999, 0.5]), torch.tensor([3.0, 0.1]))
    exact = torch.stack([rate.to(torch.complex128) ** k for k in range(1, 301)])
    torch.testing.assert_close(running(rate, 300).to(torch.complex128), exact, rtol=1e-7, atol=1e-40)


@pytest.mark.parametrize("steps", [1, 32, 70])
def test_sums_of_products(steps):
    a, b = torch.randn(steps, 2, 3, dtype=F64), torch.randn(steps, 1, 3, dtype=F64)
    torch.testing.assert_close(summed(a, b), (a * b).sum(0))
