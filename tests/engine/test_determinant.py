"""The determinant at singular matrices, to third order, against the expansion by minors: a polynomial."""

import pytest
import torch

import dualnn as dn


def expansion(a):
    if a.shape[-1] == 1:
        return a[..., 0, 0]
    minors = (torch.cat([a[..., 1:, :j], a[..., 1:, j + 1 :]], -1) for j in range(a.shape[-1]))
    return sum((-1) ** j * a[..., 0, j] * expansion(m) for j, m in enumerate(minors))


def of_rank(n, rank, exact):
    """A matrix of a given rank: up to rounding, or exactly (then with repeated singular values)."""
    if exact:
        return torch.diag((torch.arange(n) < rank).double()).roll(1, 0) * 2
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(n + rank), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a)
    return (u * (s + 0.5) * (torch.arange(n) < rank)) @ vh


MATRICES = [(n, rank, exact) for n in (1, 2, 3, 4) for rank in range(n + 1) for exact in (True, False)]


@pytest.mark.parametrize("n, rank, exact", MATRICES)
def test_first_and_second_derivative_at_any_rank(n, rank, exact):
    a = of_rank(n, rank, exact)
    for op in (torch.linalg.det, torch.det):
        torch.testing.assert_close(dn.jacobian(op, a), torch.autograd.functional.jacobian(expansion, a))
    wanted = torch.autograd.functional.hessian(expansion, a)
    torch.testing.assert_close(dn.hessian(torch.linalg.det, a), wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        dn.laplacian(torch.linalg.det, a + 0), torch.zeros((), dtype=torch.float64), atol=1e-10, rtol=0
    )
    leaf = a.clone().requires_grad_()
    t = torch.randn(n, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    _, slope = dn.jvp(torch.linalg.det, (leaf,), (t,))
    # Of a single number, the slope may not depend on it at all.
    reverse = torch.autograd.grad(slope, leaf)[0] if slope.requires_grad else torch.zeros_like(a)
    torch.testing.assert_close(reverse, torch.tensordot(wanted, t, 2), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_third_derivative(rank):
    a = of_rank(3, rank, True)
    third = dn.jacobian(lambda x: dn.hessian(torch.linalg.det, x), a)
    wanted = torch.autograd.functional.jacobian(
        lambda x: torch.autograd.functional.hessian(expansion, x, create_graph=True), a
    )
    torch.testing.assert_close(third, wanted, rtol=1e-9, atol=1e-11)


def test_a_batch_of_all_ranks_and_complex_matrices():
    a = torch.stack([of_rank(4, rank, exact) for rank in range(5) for exact in (True, False)]).reshape(2, 5, 4, 4)
    t = torch.randn(3, 2, 5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, slope = dn.jvp(torch.linalg.det, (a,), (t,))
    assert torch.equal(y, torch.linalg.det(a))
    torch.testing.assert_close(slope, dn.jvp(expansion, (a,), (t,))[1], rtol=1e-9, atol=1e-11)
    z, w = torch.complex(a, a.mT), torch.complex(t, -t)
    torch.testing.assert_close(
        dn.jvp(torch.linalg.det, (z,), (w,))[1], dn.jvp(expansion, (z,), (w,))[1], rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1e3, 1e6])
def test_nearly_singular_matrices(scale):
    a = of_rank(4, 2, False) + scale * of_rank(4, 4, False)
    wanted = torch.autograd.functional.jacobian(expansion, a)
    error = (dn.jacobian(torch.linalg.det, a) - wanted).abs().max() / wanted.abs().max()
    # Two singular values are of this scale: rounding of the matrix alone moves the adjugate by eps / scale.
    assert error < 1e-13 + 1e-15 / scale


def test_an_empty_matrix():
    a = torch.zeros(0, 0)
    assert torch.linalg.det(a) == 1 and dn.jacobian(torch.linalg.det, a).numel() == 0
