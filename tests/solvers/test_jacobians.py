import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    StructureError,
    TangentLostError,
    UnknownNameError,
    UnsupportedOpError,
)
from dualnn.solvers import root
from dualnn.solvers.banded import Banded, banded_jacobian
from dualnn.solvers.factors import LU, block_jacobian
from dualnn.solvers.gmres import gmres
from dualnn.solvers.krylov import Krylov

F64 = torch.float64


def shift(x, by):
    """x[i + by], zero outside."""
    return x.roll(-by, -1) * ((torch.arange(x.shape[-1]) + by) // x.shape[-1] == 0)


def lattice(x, a):
    """A reaction and diffusion on a line, not symmetric; bands (1, 2)."""
    return 3 * x - shift(x, -1) - 2 * shift(x, 1).sin() + 0.3 * shift(x, 2) + x**3 - a


def given(x, a):
    return block_jacobian(lambda u: lattice(u, a), x)[1]


WAYS = {
    "dense": {"jacobian": "dense"},
    "banded": {"jacobian": "banded", "bandwidth": (1, 2)},
    "wider": {"jacobian": "banded", "bandwidth": (4, 3)},
    "krylov": {"jacobian": "krylov"},
    "given": {"jacobian": given},
}
A = torch.randn(3, 12, dtype=F64, generator=torch.Generator().manual_seed(0))


def solve(a, way, **options):
    return root(lattice, torch.zeros_like(a), (a,), **{**WAYS[way], **options})


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_are_one(way):
    v = torch.randn(2, *A.shape, dtype=F64)
    leaf, weight = A.clone().requires_grad_(), torch.randn(A.shape, dtype=F64)

    def everything(way):
        x, dx = dn.jvp(lambda a: solve(a, way), (A,), (v,))
        gradient = torch.autograd.grad((solve(leaf, way) * weight).sum(), leaf, create_graph=True)[0]
        second = torch.autograd.grad((gradient * v[0]).sum(), leaf)[0]
        return x, dx, gradient.detach(), second

    x, dx, gradient, _ = ours = everything(way)
    torch.testing.assert_close(lattice(x, A), torch.zeros_like(x), rtol=0, atol=1e-13)
    torch.testing.assert_close((dx * weight).sum((1, 2)), (v * gradient).sum((1, 2)), rtol=1e-10, atol=1e-10)
    for a, b in zip(ours, everything("dense"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_lower_precision(way, dtype):
    x, dx = dn.jvp(lambda a: solve(a, way, tol=0.05), (A.to(dtype),), (torch.ones_like(A, dtype=dtype),))
    exact, dexact = dn.jvp(lambda a: solve(a, "dense"), (A.to(dtype).double(),), (torch.ones_like(A),))
    assert x.dtype == dx.dtype == dtype
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=0.05)
    torch.testing.assert_close(dx.double(), dexact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lower", [0, 1, 3])
@pytest.mark.parametrize("upper", [0, 2, 7])
def test_bands_hold_the_matrix(lower, upper):
    n = 8
    dense = torch.randn(2, n, n, dtype=F64).triu(-lower).tril(upper) + 2 * torch.eye(n, dtype=F64)
    x, rhs = torch.randn(2, n, dtype=F64), torch.randn(5, 2, n, dtype=F64)
    value, bands = banded_jacobian(lambda u: (dense @ u.unsqueeze(-1)).squeeze(-1), x, lower, upper)
    torch.testing.assert_close(value, (dense @ x.unsqueeze(-1)).squeeze(-1))
    for i in range(n):
        for j in range(max(0, i - lower), min(n, i + upper + 1)):
            torch.testing.assert_close(bands[:, upper + i - j, j], dense[:, i, j])
    factors, full = Banded(bands, lower, upper), LU(dense)
    torch.testing.assert_close(factors.solve(rhs), full.solve(rhs))
    torch.testing.assert_close(factors.solve_transposed(rhs), full.solve_transposed(rhs))


def test_row_exchanges():
    """A zero on the diagonal: elimination without pivoting would divide by it."""
    bands = torch.tensor([[0.0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 2, 0]], dtype=F64)
    matrix = torch.diag(bands[0, 1:], 1) + torch.diag(bands[2, :-1], -1)
    rhs = torch.arange(1.0, 5, dtype=F64)
    torch.testing.assert_close(matrix @ Banded(bands, 1, 1).solve(rhs), rhs)


@pytest.mark.parametrize("bandwidth", [(0, 0), (0, 2), (1, 1), (1, 0)])
def test_a_wrong_bandwidth(bandwidth):
    with pytest.raises(StructureError, match=r"widen the bandwidth"):
        root(lattice, torch.zeros_like(A), (A,), jacobian="banded", bandwidth=bandwidth)


def test_an_entry_that_vanishes_at_the_start_by_chance():
    """At x = 0 the second band's derivative is 0; the check of a later step sees it."""
    with pytest.raises(StructureError, match=r"bandwidth=\(0, 0\)"):
        root(lambda x: 3 * x - shift(x, 1) ** 2 - 1, torch.zeros(6, dtype=F64), jacobian="banded", bandwidth=(0, 0))


@pytest.mark.parametrize("way", ["dense", "banded", "krylov"])
def test_samples_that_mix(way):
    with pytest.raises(StructureError, match="samples"):
        root(lambda x: 2 * x - x.mean(0) - 1, torch.zeros_like(A), **WAYS[way])


def test_a_large_tridiagonal_system():
    n = 10_000
    a = torch.randn(n, dtype=F64).requires_grad_()

    def equations(x, a):
        return 3 * x - shift(x, -1) - shift(x, 1) + x**3 - a

    x, stats = root(equations, torch.zeros(n, dtype=F64), (a,), full_output=True, jacobian="banded", bandwidth=(1, 1))
    assert float(stats.residual) < 1e-12
    weight = torch.randn(n, dtype=F64)
    (gradient,) = torch.autograd.grad((x * weight).sum(), a)
    rest = 3 * gradient - shift(gradient, -1) - shift(gradient, 1) + 3 * x.detach() ** 2 * gradient  # symmetric
    torch.testing.assert_close(rest, weight)


class TestGiven:
    def test_an_approximate_one_finds_the_root_but_has_no_derivative(self):
        def rough(x, a):
            return torch.diag_embed(3 + 3 * x * x)

        x = root(lattice, torch.zeros_like(A), (A,), jacobian=rough, max_steps=900)
        torch.testing.assert_close(x, solve(A, "dense"))
        with pytest.raises(StructureError, match="not that of the equations"):
            dn.jvp(lambda a: root(lattice, torch.zeros_like(a), (a,), jacobian=rough, max_steps=900), (A,), (A,))

    @pytest.mark.parametrize("wrong", [lambda x, a: x, lambda x, a: torch.eye(12).expand(3, 12, 12), lambda x, a: 1.0])
    def test_wrong_shape_or_dtype(self, wrong):
        with pytest.raises(StructureError, match=r"must return torch.float64 of shape \(3, 12, 12\)"):
            root(lattice, torch.zeros_like(A), (A,), jacobian=wrong)


class TestKrylov:
    @pytest.mark.parametrize("n", [1, 5, 49, 120])
    def test_gmres_solves(self, n):
        matrix = torch.randn(n, n, dtype=F64) / n**0.5 + 3 * torch.eye(n, dtype=F64)
        rhs = torch.randn(4, 3, n, dtype=F64)
        x, error, solved = gmres(lambda v: v @ matrix.T, rhs, 1e-12)
        torch.testing.assert_close(x @ matrix.T, rhs, rtol=0, atol=1e-10)
        assert bool(solved.all()) and float(error.max()) <= 1e-12

    def test_rows_end_on_their_own(self):
        """A zero right-hand side, an eigenvector, one that needs the whole space, and one that is not finite."""
        matrix = torch.diag(torch.arange(1.0, 7, dtype=F64))
        rhs = torch.stack([torch.zeros(6), torch.eye(6)[2], torch.ones(6), torch.full((6,), torch.nan)]).to(F64)
        x, _, solved = gmres(lambda v: v @ matrix, rhs, 1e-12)
        torch.testing.assert_close(x[:3] @ matrix, rhs[:3], rtol=0, atol=1e-11)
        assert solved.tolist() == [True, True, True, False]

    def test_a_singular_system_is_not_solved(self):
        matrix = torch.diag(torch.tensor([1.0, 2, 3, 0], dtype=F64))
        inside, outside = torch.tensor([1.0, 1, 1, 0], dtype=F64), torch.ones(4, dtype=F64)
        x, _, solved = gmres(lambda v: v @ matrix, torch.stack([inside, outside]), 1e-12)
        assert solved.tolist() == [True, False]
        torch.testing.assert_close(x[0] @ matrix, inside)

    def test_stagnation(self):
        """A cyclic shift shows GMRES nothing before the last of 200 steps."""
        system = Krylov(lambda x: x.roll(1, -1), torch.zeros(2, 200, dtype=F64))
        rhs = torch.zeros(2, 200, dtype=F64)
        rhs[1, 0] = 1
        for call in (system.solve, system.solve_transposed):
            with pytest.raises(ConvergenceError, match=r"GMRES stagnated for 1 of 2 samples \(first: \[1\]\)"):
                call(rhs)
        lenient = Krylov(system.fn, system.x, strict=False).solve(rhs)
        assert not lenient[0].any() and bool(lenient[1].isnan().all())

    def test_a_singular_jacobian_at_the_solution(self):
        """The second equation depends on a, but on no unknown: a root where it happens to hold, and no derivative."""
        start = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=F64)

        def lost(x, a):
            return torch.stack([x[..., 0] - a[..., 0], a[..., 1] - start[:, 1]], -1)

        def slope(how):
            return dn.jvp(lambda a: root(lost, start, (a,), jacobian="krylov", on_failure=how), (start,), (start,))[1]

        with pytest.raises(ConvergenceError, match="GMRES stagnated for 2 of 2"):
            slope("raise")
        assert bool(slope("last").isnan().all())

    def test_newton_meets_a_singular_jacobian(self):
        start = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64)
        x, stats = root(lambda x: x * x - 4, start, jacobian="krylov", on_failure="nan", full_output=True)
        torch.testing.assert_close(x[0], torch.full((2,), 2.0, dtype=F64))
        assert bool(x[1].isnan().all()) and stats.converged.tolist() == [True, False]

    def test_equations_that_cut_the_graph(self):
        def cut(x, a):
            with torch.no_grad():
                return x * x - a

        one = torch.ones(1, dtype=F64)
        assert float(dn.jvp(lambda a: root(cut, one, (a,), jacobian="krylov"), (4 * one,), (one,))[1]) == 0.25
        with pytest.raises(TangentLostError, match="krylov"):
            root(cut, one, ((4 * one).requires_grad_(),), jacobian="krylov").backward()

    def test_one_step_has_nothing_to_keep(self):
        one, many = (
            dn.jvp(lambda a, h=h: solve(a, "krylov", differentiate=h), (A,), (A,)) for h in ("one_step", "implicit")
        )
        torch.testing.assert_close(one, many, rtol=1e-13, atol=1e-13)


def test_unroll_needs_a_matrix():
    torch.testing.assert_close(
        dn.jvp(lambda a: solve(a, "given", differentiate="unroll"), (A,), (A,))[1],
        dn.jvp(lambda a: solve(a, "given"), (A,), (A,))[1],
        rtol=1e-8,
        atol=1e-8,
    )
    for way in ("krylov", "banded"):
        with pytest.raises(UnsupportedOpError, match="dense"):
            solve(A, way, differentiate="unroll")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jacobian": "bandet"}, UnknownNameError, "did you mean 'banded'"),
        ({"jacobian": "banded"}, DualInputError, "go together"),
        ({"bandwidth": (1, 1)}, DualInputError, "go together"),
        ({"jacobian": "banded", "bandwidth": 1}, DualInputError, "two integers"),
        ({"jacobian": "banded", "bandwidth": (-1, 1)}, DualInputError, "two integers"),
        ({"jacobian": given, "bandwidth": (1, 1)}, (DualInputError, UnknownNameError), "jacobian"),
    ],
)
def test_bad_choices(options, error, message):
    with pytest.raises(error, match=message):
        root(lattice, torch.zeros_like(A), (A,), **options)
