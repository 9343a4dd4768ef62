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
from dualnn.training.meters import LiveBytes
from tests.solvers.systems import F64, SYSTEMS

# E, dE/dM, dE/de and d2E/dM2 of Kepler's equation at e = 0.9, M = 0.1, by mpmath.
KEPLER = (0.63084352756315343, 3.6600171286016323, 2.1587737816538381, -26.026506666141042)
e, M = torch.tensor([0.9], dtype=F64), torch.tensor([0.1], dtype=F64)
ONE = torch.ones(1, dtype=F64)
A_RANGE = torch.linspace(1, 50, 20, dtype=F64)[:, None]


def solve(name, *args, **options):
    system = SYSTEMS[name]
    return root(system.fn, system.start, args or system.args, **options)


def kepler(e, M, start=1.0, **options):
    return root(SYSTEMS["kepler"].fn, torch.tensor([start], dtype=F64), (e, M), **options)


def differences(fn, x, v, h=1e-3):
    """Five-point difference along v."""
    return (8 * (fn(x + h * v) - fn(x - h * v)) - (fn(x + 2 * h * v) - fn(x - 2 * h * v))) / (12 * h)


WAYS = {
    "newton": {},
    "broyden": {"method": "broyden"},
    "newton, krylov": {"jacobian": "krylov"},
    "newton, banded": {"jacobian": "banded", "bandwidth": (9, 9)},
}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_equations_hold(name, way):
    x, stats = solve(name, full_output=True, **WAYS[way])
    system = SYSTEMS[name]
    assert x.shape == system.start.shape
    residual = system.fn(x, *system.args)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-11)
    assert bool(stats.converged.all())
    if system.solution is not None:
        torch.testing.assert_close(x, system.solution(*system.args).expand_as(x), rtol=1e-12, atol=1e-12)


@ways
@pytest.mark.parametrize("name", SYSTEMS)
def test_forward_equals_reverse_equals_differences(name, way):
    system = SYSTEMS[name]
    arg = system.args[-1]
    v = torch.randn(3, *arg.shape, dtype=F64, generator=torch.Generator().manual_seed(0)) * arg.abs().clamp_max(1e-1)

    def solution(a):
        return solve(name, *system.args[:-1], a, **WAYS[way])

    x, dx = dn.jvp(solution, (arg,), (v,))
    leaf = arg.clone().requires_grad_()
    weight = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((solution(leaf) * weight).sum(), leaf)
    by_reverse = (v * gradient).flatten(1).sum(1)
    torch.testing.assert_close((dx * weight).flatten(1).sum(1), by_reverse, rtol=1e-10, atol=1e-10)
    measured = differences(solution, arg, v[0], 1e-4)
    torch.testing.assert_close(dx[0], measured, rtol=1e-6, atol=1e-6 * float(measured.abs().max()))


@ways
@pytest.mark.parametrize("name", SYSTEMS)
def test_second_order_every_way(name, way):
    *rest, arg = SYSTEMS[name].args
    v = torch.ones_like(arg)

    def solution(a):
        return solve(name, *rest, a, **WAYS[way])

    def slope(a):
        leaf = a.clone().requires_grad_()
        return torch.autograd.grad(solution(leaf).sum(), leaf)[0]

    leaf = arg.clone().requires_grad_()
    (first,) = torch.autograd.grad(solution(leaf).sum(), leaf, create_graph=True)
    (reverse,) = torch.autograd.grad((first * v).sum(), leaf)
    (mixed,) = torch.autograd.grad(dn.jvp(solution, (leaf,), (v,))[1].sum(), leaf)
    measured = differences(slope, arg, v, 1e-6 if name == "powell" else 1e-4)  # powell has no root at p < (…, 1)
    for ours in (reverse, mixed):
        torch.testing.assert_close(ours, measured, rtol=1e-5, atol=1e-6 * float(measured.abs().max()) + 1e-10)
    twice = dn.jvp(lambda a: dn.jvp(solution, (a,), (v,))[1], (arg,), (v,))[1]
    torch.testing.assert_close(twice.sum(), reverse.sum(), rtol=1e-8, atol=1e-8)
    _, over = torch.func.jvp(torch.func.grad(lambda a: solution(a).sum()), (arg,), (v,))
    torch.testing.assert_close(over, reverse, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("start", [0.1, 0.63, 1.0, 3.0, 10.0])
def test_keplers_numbers_from_every_start(start):
    E, (dE_de, dE_dM) = dn.jvp(
        lambda e, M: kepler(e, M, start), (e, M), (torch.stack([ONE, 0 * ONE]), torch.stack([0 * ONE, ONE]))
    )
    second = dn.jvp(lambda M: dn.jvp(lambda M: kepler(e, M, start), (M,), (ONE,))[1], (M,), (ONE,))[1]
    for got, value in zip((E, dE_dM, dE_de, second), KEPLER, strict=True):
        torch.testing.assert_close(got, torch.tensor([value], dtype=F64), rtol=1e-12, atol=1e-12)


def test_the_number_of_iterations_does_not_matter_to_the_derivative():
    def shifted(E, M):  # the same root; from far away the line search has work to do
        return torch.atan(E - 1) - M

    counts, slopes = [], []
    for start in (1.0, 40.0, -900.0):
        x0 = torch.tensor([start], dtype=F64)
        _, slope = dn.jvp(lambda M, x0=x0: root(shifted, x0, (M,)), (M,), (ONE,))
        counts.append(int(root(shifted, x0, (M,), full_output=True)[1].iterations))
        slopes.append(slope)
    assert max(counts) >= 3 * min(counts)
    for slope in slopes:
        torch.testing.assert_close(slope, 1 / torch.cos(M) ** 2, rtol=1e-13, atol=0)


class TestOrders:
    def test_third_order_every_way(self):
        def forward(M):
            return dn.jvp(lambda M: kepler(e, M), (M,), (ONE,))[1]

        def twice(M):
            return dn.jvp(forward, (M,), (ONE,))[1]

        third = dn.jvp(twice, (M,), (ONE,))[1]
        torch.testing.assert_close(third, differences(twice, M, ONE, 1e-4), rtol=1e-7, atol=0)
        leaf = M.clone().requires_grad_()
        (first,) = torch.autograd.grad(kepler(e, leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first, leaf, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(second, leaf)[0], third, rtol=1e-11, atol=0)
        torch.testing.assert_close(torch.autograd.grad(twice(leaf), leaf)[0], third, rtol=1e-11, atol=0)

    def test_mixed_second_order_of_a_system(self):
        c = SYSTEMS["chandrasekhar"].args[0]

        def slope(c):
            leaf = c.detach().requires_grad_()
            return torch.autograd.grad(solve("chandrasekhar", leaf).sum(), leaf)[0]

        def total(c):
            return solve("chandrasekhar", c).sum()

        torch.testing.assert_close(dn.hessian(total, c)[0], differences(slope, c, ONE), rtol=1e-7, atol=0)

    def test_a_root_inside_a_root(self):
        def outer(y, a):  # y = sqrt(a) by an inner root; x + x**3 = y
            inner = root(lambda u, a: u * u - a, torch.ones_like(a), (a,))
            return y + y**3 - inner

        def nested(a):
            return root(outer, torch.ones_like(a), (a,))

        a = torch.tensor([2.0], dtype=F64)
        y, dy = dn.jvp(nested, (a,), (ONE,))
        torch.testing.assert_close(dy, 1 / (2 * a.sqrt() * (1 + 3 * y * y)), rtol=1e-12, atol=0)
        leaf = a.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(nested(leaf), leaf)[0], dy, rtol=1e-12, atol=0)
        second = dn.jvp(lambda a: dn.jvp(nested, (a,), (ONE,))[1], (a,), (ONE,))[1]
        slope = differences(lambda a: dn.jvp(nested, (a,), (ONE,))[1], a, ONE)
        torch.testing.assert_close(second, slope, rtol=1e-8, atol=0)


def test_a_complex_argument_gets_its_gradient():
    """Real equations of a complex parameter: both parts, first and second order."""

    def equations(x, a):
        return x**3 + x - torch.stack([(a * a.conj()).real * a.imag, a.real], -1)

    def first(a):
        leaf = a.detach().clone().requires_grad_()
        x = root(equations, torch.zeros(2, dtype=F64), (leaf,))
        (slope,) = torch.autograd.grad(x.sum(), leaf, create_graph=True)
        return x.sum().detach(), slope, leaf

    a, h = torch.tensor(0.7 - 0.4j, dtype=torch.complex128), 1e-5
    _, slope, leaf = first(a)
    (second,) = torch.autograd.grad(slope.abs() ** 2, leaf)
    for way in (1, 1j):
        up, down = first(a + h * way), first(a - h * way)
        measured = torch.stack([up[0] - down[0], up[1].detach().abs() ** 2 - down[1].detach().abs() ** 2]) / (2 * h)
        part = torch.stack([slope.detach(), second])
        torch.testing.assert_close(part.real if way == 1 else part.imag, measured, rtol=1e-7, atol=1e-8)


class TestTransforms:
    @pytest.mark.parametrize("start", ["a constant", "from the argument"])
    @ways
    def test_torch_func(self, way, start):
        def solution(M):
            x0 = torch.ones(1, dtype=F64) if start == "a constant" else torch.ones_like(M)
            return root(SYSTEMS["kepler"].fn, x0, (e, M), **WAYS[way])

        expected = torch.tensor([[KEPLER[1]]], dtype=F64)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(solution)(M), expected, rtol=1e-12, atol=0)
        second = torch.func.grad(lambda M: torch.func.grad(lambda M: solution(M).sum())(M).sum())(M)
        torch.testing.assert_close(second, torch.tensor([KEPLER[3]], dtype=F64), rtol=1e-11, atol=0)
        many = torch.tensor([[0.1], [0.5]], dtype=F64)
        torch.testing.assert_close(torch.vmap(solution)(many), torch.stack([solution(m) for m in many]))
        slopes = torch.vmap(torch.func.grad(lambda m: solution(m).sum()))(many)
        torch.testing.assert_close(slopes, torch.stack([torch.func.jacrev(solution)(m)[0] for m in many]))
        torch.testing.assert_close(torch.func.hessian(lambda m: solution(m).sum())(M)[0], second, rtol=1e-10, atol=0)

    def test_nested_jvp_of_torch_is_refused(self):
        def once(M):
            return torch.func.jvp(lambda M: kepler(e, M), (M,), (ONE,))[1]

        with pytest.raises(UnsupportedOpError, match=r"dualnn\.jvp"):
            torch.func.jvp(once, (M,), (ONE,))

    def test_no_tangents_and_many(self):
        for num in (0, 1, 5):
            _, dE = dn.jvp(lambda M: kepler(e, M), (M,), (torch.ones(num, 1, dtype=F64),))
            torch.testing.assert_close(dE, torch.full((num, 1), KEPLER[1], dtype=F64))

    def test_a_dual_start_is_a_start(self):
        x = root(lambda x: x * x - 4, dn.dual(ONE, ONE), ())
        torch.testing.assert_close(x, 2 * ONE)

    def test_float32(self):
        x = root(lambda x, a: x**3 - a, torch.ones(2, 1), (torch.tensor([[8.0], [27.0]]),))
        torch.testing.assert_close(x, torch.tensor([[2.0], [3.0]]), rtol=1e-6, atol=0)


class TestBatches:
    @ways
    def test_a_sample_does_not_know_its_neighbours(self, way):
        system, options = SYSTEMS["kepler, many"], {**WAYS[way], "full_output": True}
        together, stats = solve("kepler, many", **options)
        for i in range(5):
            alone, course = root(system.fn, system.start[i], (system.args[0], system.args[1][i]), **options)
            torch.testing.assert_close(together[i], alone, rtol=1e-15, atol=0)
            assert stats.iterations[i] == course.iterations

    @ways
    def test_a_failed_sample_leaves_the_others(self, way):
        a = torch.tensor([[4.0], [-1.0], [9.0]], dtype=F64)

        def square(x, a):
            return x * x - a

        def solutions(a, how):
            return root(square, torch.full_like(a, 3.0), (a,), on_failure=how, max_steps=40, **WAYS[way])

        with pytest.raises(ConvergenceError, match=r"1 of 3 samples \(first: \[1\]\)"):
            solutions(a, "raise")
        x, dx = dn.jvp(lambda a: solutions(a, "nan"), (a,), (torch.ones_like(a),))
        torch.testing.assert_close(x[[0, 2]], torch.tensor([[2.0], [3.0]], dtype=F64), rtol=1e-14, atol=0)
        torch.testing.assert_close(dx[[0, 2]], 0.5 / x[[0, 2]])
        assert x[1].isnan() and dx[1].isnan()
        assert bool(solutions(a, "last").isfinite().all())

    def test_statistics(self):
        _, stats = solve("kepler, many", full_output=True)
        assert stats.iterations.shape == stats.residual.shape == (5,)
        assert stats.jacobians == stats.iterations.max()
        assert stats.evaluations > stats.jacobians


class TestBroyden:
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_forms_fewer_jacobians(self, name):
        counts = [solve(name, method=m, full_output=True)[1].jacobians for m in ("broyden", "newton")]
        assert counts[0] == 1 if name not in ("rosenbrock", "powell") else counts[0] < counts[1]

    def test_a_batch_of_different_systems(self):
        """Samples that need fresh Jacobians at other times, beside one that needs none."""
        starts = torch.tensor([[-1.2, 1.0], [1.0, 1.0], [3.0, -2.0]], dtype=F64)
        system = SYSTEMS["rosenbrock"]
        together, stats = root(system.fn, starts, system.args, "broyden", full_output=True)
        torch.testing.assert_close(together, torch.ones(3, 2, dtype=F64), rtol=1e-12, atol=0)
        for start, iterations in zip(starts, stats.iterations, strict=True):
            assert root(system.fn, start, system.args, "broyden", full_output=True)[1].iterations == iterations

    def test_unrolled_agrees(self):
        def slope(how):
            return dn.jvp(lambda M: kepler(e, M, method="broyden", differentiate=how), (M,), (ONE,))[1]

        torch.testing.assert_close(slope("unroll"), slope("implicit"), rtol=1e-6, atol=0)


class TestChoices:
    def test_one_step_errs_by_the_last_step(self):
        def slope(how, tol):
            return dn.jvp(lambda M: kepler(e, M, tol=tol, differentiate=how), (M,), (ONE,))[1]

        exact = slope("implicit", None)
        coarse, fine = (float((slope("one_step", tol) - exact).abs()) for tol in (1e-1, 1e-6))
        assert 1e-12 < fine < 1e-2 * coarse
        with pytest.raises(UnsupportedOpError, match="first derivatives only"):
            dn.hessian(lambda M: kepler(e, M, differentiate="one_step").sum(), M)

    @pytest.mark.parametrize("name", ["kepler, many", "chandrasekhar", "square root"])
    def test_unrolled_agrees(self, name):
        *rest, arg = SYSTEMS[name].args
        v = torch.ones_like(arg)
        implicit, unrolled = (
            dn.jvp(lambda a, how=how: solve(name, *rest, a, differentiate=how), (arg,), (v,))[1]
            for how in ("implicit", "unroll")
        )
        torch.testing.assert_close(unrolled, implicit, rtol=1e-9, atol=1e-9)

    def test_memory_does_not_depend_on_the_steps(self):
        def live(start):
            leaf = torch.full((64, 1), 0.1, dtype=F64, requires_grad=True)
            with LiveBytes() as meter:
                x = root(lambda x, m: torch.atan(x) - m, torch.full_like(leaf.detach(), start), (leaf,))
            assert x.requires_grad
            return meter.peak

        assert live(-900.0) <= live(10.0)


class TestErrors:
    def test_singular_jacobian_says_which(self):
        start = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64)
        with pytest.raises(ConvergenceError, match=r"1 of 2 samples \(first: \[1\]\) met a singular Jacobian"):
            root(lambda x: x * x - 4, start)

    def test_nan_residual(self):
        with pytest.raises(ConvergenceError, match="nan or infinite"):
            root(lambda x, a: torch.log(x) - a, -ONE, (ONE,))

    def test_a_trial_out_of_the_domain_is_refused(self):
        x = root(lambda x: torch.log(x) + 3, 5 * ONE)  # the full first step would go below zero
        torch.testing.assert_close(x, torch.exp(-3 * ONE), rtol=1e-12, atol=0)

    def test_a_tolerance_below_rounding(self):
        with pytest.raises(ConvergenceError, match="below what rounding"):
            root(lambda x, a: torch.exp(x) - a, torch.ones(20, 1, dtype=F64), (A_RANGE,), tol=1e-30)

    def test_too_few_steps(self):
        with pytest.raises(ConvergenceError, match="max_steps"):
            kepler(e, M, start=10.0, max_steps=2)

    def test_mixed_samples(self):
        with pytest.raises(StructureError, match="mix samples"):
            root(lambda x: 2 * x - x.mean(0) - 2, torch.ones(3, 1, dtype=F64))

    def test_wrong_shape_and_dtype(self):
        with pytest.raises(StructureError, match=r"shape \(1,\), got \(\)"):
            root(lambda x: x.sum(), ONE)
        with pytest.raises(StructureError, match="float64"):
            root(lambda x, a: x - a, torch.ones(1), (ONE,))

    @pytest.mark.parametrize(
        ("x0", "options", "message"),
        [
            (torch.ones(2, dtype=torch.int64), {}, "floating point"),
            (torch.tensor(1.0), {}, r"\(n,\)"),
            (1.0, {}, "torch.Tensor"),
            (ONE, {"tol": 0.0}, "tol > 0"),
            (ONE, {"max_steps": 0}, "max_steps"),
            (ONE, {"args": ONE}, "tuple"),
        ],
    )
    def test_bad_input(self, x0, options, message):
        with pytest.raises(DualInputError, match=message):
            root(lambda x, *a: x, x0, **options)

    @pytest.mark.parametrize("option", ["method", "on_failure", "differentiate"])
    def test_misspelt(self, option):
        with pytest.raises(UnknownNameError, match="did you mean|Choices"):
            root(lambda x: x, ONE, **{option: "newtn"})

    def test_equations_that_cut_the_graph(self):
        def cut(x, a):
            with torch.no_grad():
                return x * x - a

        leaf = (4 * ONE).requires_grad_()
        torch.testing.assert_close(dn.jvp(lambda a: root(cut, ONE, (a,)), (4 * ONE,), (ONE,))[1], ONE / 4)
        with pytest.raises(TangentLostError, match="no_grad"):
            root(cut, ONE, (leaf,)).backward()
        with pytest.raises(TangentLostError, match="no_grad"):  # reverse over forward: never a silent zero
            dn.jvp(lambda a: root(cut, ONE, (a,)), (leaf,), (ONE,))[1].backward()

    def test_a_start_that_is_the_solution(self):
        leaf = (4 * ONE).requires_grad_()
        x = root(lambda x, a: x * x - a, 2 * ONE, (leaf,))
        torch.testing.assert_close(torch.autograd.grad(x, leaf)[0], ONE / 4)
