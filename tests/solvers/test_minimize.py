import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    SingularMatrixError,
    StructureError,
    TangentLostError,
    UnknownNameError,
    UnsupportedOpError,
)
from dualnn.solvers import minimize, root
from dualnn.solvers.gradients import gradient
from dualnn.solvers.stats import Status
from dualnn.training.meters import LiveBytes
from tests.solvers.objectives import DATA, HELD_OUT, HELD_TARGET, MATRIX, TASKS, ridge, ridge_solution
from tests.solvers.systems import F64

SCALAR = ("newton", "bfgs", "lbfgs")
SQUARES = ("gauss_newton", "levenberg_marquardt")
ONE = torch.ones(1, dtype=F64)
PAIRS = [(name, m) for name, task in TASKS.items() for m in (SCALAR + SQUARES if task.residual else SCALAR)]


def solve(name, *args, method="newton", **options):
    task = TASKS[name]
    fn = task.residual if method in SQUARES else task.fn
    return minimize(fn, task.start, args or task.args, method, **options)


def differences(fn, x, v, h=1e-3):
    """Five-point difference along v."""
    return (8 * (fn(x + h * v) - fn(x - h * v)) - (fn(x + 2 * h * v) - fn(x - 2 * h * v))) / (12 * h)


def directions(num, x, seed=0):
    return torch.randn(num, *x.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def slope_at(name, x, *args):
    return gradient(TASKS[name].fn, x, args, "forward")[1]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_every_method_finds_every_minimum(name, method):
    task = TASKS[name]
    x, stats = solve(name, method=method, full_output=True)
    assert x.shape == task.start.shape
    torch.testing.assert_close(slope_at(name, x, *task.args), torch.zeros_like(x), rtol=0, atol=4e-12)
    assert bool(stats.converged.all())
    if task.solution is not None:
        torch.testing.assert_close(x, task.solution(*task.args).expand_as(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_forward_equals_reverse_equals_differences(name, method):
    *rest, arg = TASKS[name].args
    v = directions(3, arg)

    def solution(a):
        return solve(name, *rest, a, method=method)

    x, dx = dn.jvp(solution, (arg,), (v,))
    leaf = arg.clone().requires_grad_()
    weight = directions(1, x, seed=1)[0]
    (slope,) = torch.autograd.grad((solution(leaf) * weight).sum(), leaf)
    torch.testing.assert_close((dx * weight).flatten(1).sum(1), (v * slope).flatten(1).sum(1), rtol=1e-9, atol=1e-9)
    measured = differences(solution, arg, v[0])
    torch.testing.assert_close(dx[0], measured, rtol=1e-6, atol=1e-7 * float(measured.abs().max()))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["rosenbrock, many", "beale", "ridge", "logistic", "decay"])
def test_second_order_every_way(name, mode):
    *rest, arg = TASKS[name].args
    v = directions(1, arg)[0]
    method = "levenberg_marquardt" if name == "decay" else "newton"

    def solution(a):
        return solve(name, *rest, a, method=method, gradient=mode)

    def moved(a):
        return dn.jvp(solution, (a,), (v,))[1]

    weight = directions(1, solution(arg), seed=1)[0]

    def slope(a, graph=False):
        leaf = a if graph else a.detach().requires_grad_()
        return torch.autograd.grad((solution(leaf) * weight).sum(), leaf, create_graph=graph)[0]

    expected = float((differences(slope, arg, v) * v).sum())
    close = {"rel": 1e-6, "abs": 1e-8}
    assert float((dn.jvp(moved, (arg,), (v,))[1] * weight).sum()) == pytest.approx(expected, **close)
    leaf = arg.clone().requires_grad_()
    twice = torch.autograd.grad((slope(leaf, graph=True) * v).sum(), leaf)[0]
    assert float((twice * v).sum()) == pytest.approx(expected, **close)
    over_forward = torch.autograd.grad((moved(leaf) * weight).sum(), leaf)[0]
    torch.testing.assert_close(over_forward, twice, rtol=1e-8, atol=1e-8)


def test_a_third_derivative_in_closed_form():
    def solution(a):  # x = exp(a)
        return minimize(lambda x, a: (x * torch.log(x) - x - a * x).sum(-1), 0.5 * ONE, (a,))

    def once(a):
        return dn.jvp(solution, (a,), (ONE,))[1]

    a = 0.3 * ONE
    third = dn.jvp(lambda a: dn.jvp(once, (a,), (ONE,))[1], (a,), (ONE,))[1]
    torch.testing.assert_close(third, torch.exp(a), rtol=1e-11, atol=0)


def test_curvature_of_the_residuals_is_in_the_derivative():
    """At a nonzero residual, Gauss-Newton's own approximation would be wrong by tens of percent."""
    name, (y,) = "decay", TASKS["decay"].args
    y = y + torch.linspace(0.5, -0.5, 8, dtype=F64) ** 2
    v = directions(1, y)
    by_newton, by_squares = (
        dn.jvp(lambda y, m=m: solve(name, y, method=m), (y,), (v,))[1] for m in ("newton", "levenberg_marquardt")
    )
    torch.testing.assert_close(by_squares, by_newton, rtol=1e-9, atol=1e-11)
    x = solve(name, y)
    jacobian = dn.jacobian(lambda x: TASKS[name].residual(x, y), x)
    mixed = dn.jvp(lambda y: slope_at(name, x, y), (y,), (v,))[1][0]
    approximate = -torch.linalg.solve(jacobian.T @ jacobian, mixed)
    assert float((approximate - by_newton[0]).norm() / by_newton.norm()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", SCALAR + SQUARES)
def test_a_plateau_is_not_mistaken_for_a_minimum(method, dtype):
    """Steps along a curved valley are short, and gain little, long before its end."""

    def valley(x):
        return torch.cat([10 * (x[..., 1::2] - x[..., ::2] ** 2), 1 - x[..., ::2]], -1)

    def half(x):
        return (valley(x) ** 2).sum(-1) / 2

    start = 1.5 * directions(20, torch.ones(10, dtype=F64), seed=7).to(dtype)
    x, stats = minimize(valley if method in SQUARES else half, start, (), method, full_output=True)
    eps = torch.finfo(dtype).eps
    bound = max(eps**0.75, 8e3 * eps)  # curvatures are up to 1,000, and down to 0.2
    assert bool((stats.residual <= bound).all())
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=10 * bound)


class TestGradient:
    @pytest.mark.parametrize("name", TASKS)
    def test_reverse_equals_forward_at_every_level(self, name):
        task = TASKS[name]
        x, arg = task.start, task.args[-1]
        v, w = directions(2, x), directions(2, arg)

        def twice(mode):
            def slope(x, a):
                return gradient(task.fn, x, (*task.args[:-1], a), mode)

            def once(x, a):
                return dn.jvp(slope, (x, a), (v, w))

            return dn.jvp(once, (x, arg), (v[:1], w[:1]))

        torch.testing.assert_close(twice("reverse"), twice("forward"), rtol=1e-11, atol=1e-11)

    def test_an_argument_that_is_the_unknown_itself_is_held(self):
        x = torch.tensor([2.0], dtype=F64, requires_grad=True)
        for mode in ("forward", "reverse"):
            value, slope = gradient(lambda x, a: (x * x * a).sum(-1), x, (x,), mode)
            torch.testing.assert_close(slope, torch.tensor([8.0], dtype=F64))
            torch.testing.assert_close(torch.autograd.grad(slope.sum(), x)[0], torch.tensor([8.0], dtype=F64))
            assert float(value.detach()) == 8

    def test_reverse_over_a_cut_graph_is_refused(self):
        def cut(x, a):
            with torch.no_grad():
                return ((x - a) ** 2).sum(-1)

        def partly(x, a):
            return ((x - a) ** 2).sum(-1) + cut(x, 2 * a)

        x, dx = dn.jvp(lambda a: minimize(partly, ONE, (a,), gradient="forward"), (ONE,), (ONE,))
        torch.testing.assert_close((x, dx), (1.5 * ONE, 1.5 * ONE))
        with pytest.raises(TangentLostError, match="no graph"):
            minimize(cut, ONE, (ONE,), gradient="reverse")
        with pytest.raises(TangentLostError, match="only part of fn"):
            minimize(partly, 3 * ONE, (ONE,), gradient="reverse")


class TestNested:
    def test_hypergradient_of_ridge_regression(self):
        def loss(w):
            return ((HELD_OUT @ w - HELD_TARGET) ** 2).sum() / 2

        strength = torch.tensor([0.3], dtype=F64)
        w = ridge_solution(strength)
        eye = torch.eye(4, dtype=F64)
        moved = -torch.exp(strength) * torch.linalg.solve(DATA.T @ DATA + torch.exp(strength) * eye, w)
        known = ((HELD_OUT @ w - HELD_TARGET) @ HELD_OUT * moved).sum()
        leaf = strength.clone().requires_grad_()
        for method in (*SCALAR, *SQUARES):
            found = torch.autograd.grad(loss(solve("ridge", leaf, method=method)), leaf)[0]
            torch.testing.assert_close(found, known[None], rtol=1e-11, atol=0)

    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    def test_a_minimum_inside_a_minimum(self, mode):
        """The best strength on held-out data, and how it moves with them."""

        def outer(strength, target):
            w = minimize(ridge, torch.zeros(4, dtype=F64), (strength,), "levenberg_marquardt")
            return ((HELD_OUT @ w - target) ** 2).sum() / 2

        def closed(strength, target):
            return ((HELD_OUT @ ridge_solution(strength) - target) ** 2).sum() / 2

        held = HELD_OUT @ ridge_solution(ONE) + 0.1 * HELD_TARGET
        v = directions(1, held)

        def best(fn, target, how):
            return minimize(fn, 0.5 * ONE, (target,), gradient=how)

        nested = dn.jvp(lambda t: best(outer, t, mode), (held,), (v,))
        torch.testing.assert_close(nested, dn.jvp(lambda t: best(closed, t, "forward"), (held,), (v,)))
        measured = differences(lambda t: best(closed, t, "forward"), held, v[0], 1e-4)
        torch.testing.assert_close(nested[1][0], measured, rtol=1e-7, atol=1e-9)
        leaf = held.clone().requires_grad_()
        slope = torch.autograd.grad(best(outer, leaf, mode), leaf)[0]
        torch.testing.assert_close((slope * v[0]).sum()[None], nested[1][0], rtol=1e-9, atol=0)

    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    def test_a_root_inside_a_minimum(self, mode):
        def objective(x, a):  # y**3 + y = x, so the minimum is at y = a, x = a**3 + a
            y = root(lambda y, x: y**3 + y - x, torch.zeros_like(x), (x,))
            return ((y - a) ** 2).sum(-1)

        a = torch.tensor([[0.5], [-1.2]], dtype=F64)
        x, dx = dn.jvp(
            lambda a: minimize(objective, torch.ones_like(a), (a,), gradient=mode), (a,), (torch.ones_like(a),)
        )
        torch.testing.assert_close((x, dx), (a**3 + a, 3 * a * a + 1), rtol=1e-10, atol=1e-12)
        leaf = a.clone().requires_grad_()
        minimize(objective, torch.ones_like(a), (leaf,), gradient=mode).sum().backward()
        torch.testing.assert_close(leaf.grad, dx, rtol=1e-10, atol=0)

    def test_a_minimum_inside_a_root(self):
        def equation(u, a):
            inner = minimize(lambda x, u: (x**4 / 4 + x * x / 2 - u * x).sum(-1), torch.zeros_like(u), (u,))
            return inner - a  # x**3 + x = u

        u, du = dn.jvp(lambda a: root(equation, ONE, (a,)), (2 * ONE,), (ONE,))
        torch.testing.assert_close((u, du), (10 * ONE, 13 * ONE), rtol=1e-11, atol=0)


class TestLarge:
    """Above 32 unknowns L-BFGS never forms a Hessian."""

    N = 160
    SCALE = torch.linspace(1, 50, N, dtype=F64)

    def chain(self, x, b):
        """Coupled along a chain; the Hessian is tridiagonal and depends on x."""
        near = (x[..., 1:] - x[..., :-1]) ** 2
        return (self.SCALE * x * x / 2 + x**4 / 4 - b * x).sum(-1) + near.sum(-1)

    def solution(self, b, method="lbfgs", **options):
        return minimize(self.chain, torch.zeros(2, self.N, dtype=F64), (b,), method, **options)

    def test_derivatives_by_products_equal_those_by_the_matrix(self):
        b = directions(2, self.SCALE, seed=4)
        v = directions(2, b, seed=5)
        x, dx = dn.jvp(self.solution, (b,), (v,))
        hessian = [dn.hessian(lambda u, i=i: self.chain(u, b[i]), x[i]) for i in range(2)]
        for i in range(2):
            torch.testing.assert_close(dx[:, i], torch.linalg.solve(hessian[i], v[:, i].mT).mT, rtol=1e-9, atol=1e-11)
        leaf = b.clone().requires_grad_()
        (slope,) = torch.autograd.grad((self.solution(leaf) * v[0]).sum(), leaf, create_graph=True)
        torch.testing.assert_close((slope * v[1]).sum(), (dx[1] * v[0]).sum(), rtol=1e-9, atol=0)
        (second,) = torch.autograd.grad((slope * v[1]).sum(), leaf)

        def reverse(b):
            other = b.detach().requires_grad_()
            return (torch.autograd.grad((self.solution(other) * v[0]).sum(), other)[0] * v[1]).sum()

        expected = differences(reverse, b, v[0])
        torch.testing.assert_close((second * v[0]).sum(), expected, rtol=1e-6, atol=1e-9)

    def test_no_matrix_is_ever_alive(self):
        b = directions(2, self.SCALE, seed=4).requires_grad_()
        with LiveBytes() as meter:
            self.solution(b).sum().backward()
        assert meter.peak < 0.5 * 8 * 2 * self.N**2

    def test_a_flat_direction_is_named(self):
        def flat(x, a):  # only differences of neighbours count
            return ((x[..., 1:] - x[..., :-1] - a) ** 2).sum(-1)

        a = torch.ones(2, 39, dtype=F64, requires_grad=True)
        x = minimize(flat, torch.zeros(2, 40, dtype=F64), (a,), "lbfgs")
        with pytest.raises(SingularMatrixError, match="not positive definite in 2 of 2 samples"):
            (x * torch.arange(40.0, dtype=F64) ** 2).sum().backward()

    def test_too_ill_conditioned_is_named(self):
        weights = torch.logspace(0, 13, 40, dtype=F64)
        a = torch.ones(40, dtype=F64, requires_grad=True)
        x = minimize(lambda x, a: (weights * (x - a) ** 2).sum(-1), torch.ones(40, dtype=F64), (a,), "lbfgs")
        with pytest.raises((ConvergenceError, SingularMatrixError), match="ill-conditioned|positive definite"):
            (x * torch.cos(torch.arange(40.0, dtype=F64))).sum().backward()

    def test_vectorised_by_torch(self):
        b = directions(1, torch.ones(34, dtype=F64))[0]

        def solution(b):
            return minimize(lambda x, b: (x**4 / 4 + x * x - b * x).sum(-1), torch.zeros_like(b), (b,), "lbfgs")

        expected = torch.diag(1 / (3 * solution(b) ** 2 + 2))
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(solution)(b), expected, rtol=1e-10, atol=1e-12)


class TestTransforms:
    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    def test_torch_func(self, mode):
        def solution(a):
            return solve("rosenbrock", a, gradient=mode)

        expected = torch.tensor([[1.0], [2.0]], dtype=F64)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(solution)(ONE), expected, rtol=1e-11, atol=0)
        second = torch.func.grad(lambda a: torch.func.grad(lambda a: solution(a)[1])(a).sum())(ONE)
        torch.testing.assert_close(second, 2 * ONE, rtol=1e-11, atol=0)
        many = torch.tensor([[1.0], [0.5]], dtype=F64)
        torch.testing.assert_close(torch.vmap(solution)(many), torch.stack([solution(a) for a in many]))

    def test_torch_func_without_a_matrix(self):
        b = directions(1, torch.ones(40, dtype=F64))[0]

        def total(b):
            x = minimize(lambda x, b: (x**4 / 4 + x * x - b * x).sum(-1), torch.zeros_like(b), (b,), "lbfgs")
            return (x * x).sum()

        leaf = b.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(total)(b), torch.autograd.grad(total(leaf), leaf)[0])

    def test_no_tangents_and_many(self):
        for num in (0, 1, 5):
            _, dx = dn.jvp(lambda a: solve("rosenbrock", a), (ONE,), (torch.ones(num, 1, dtype=F64),))
            torch.testing.assert_close(dx, torch.tensor([1.0, 2.0], dtype=F64).expand(num, 2))

    def test_a_dual_start_is_a_start(self):
        start = dn.dual(torch.zeros(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64))
        x = minimize(TASKS["quadratic"].fn, start, TASKS["quadratic"].args)
        torch.testing.assert_close(x, solve("quadratic"), rtol=0, atol=0)

    @pytest.mark.parametrize("method", SCALAR + SQUARES)
    def test_float32(self, method):
        task = TASKS["rosenbrock, many"]
        fn = task.residual if method in SQUARES else task.fn
        a = task.args[0].float().requires_grad_()
        x = minimize(fn, task.start.float(), (a,), method)
        torch.testing.assert_close(x, task.solution(a), rtol=3e-5, atol=3e-5)
        (slope,) = torch.autograd.grad(x.sum(), a)
        torch.testing.assert_close(slope, 1 + 2 * a.detach(), rtol=1e-3, atol=1e-3)


class TestBatches:
    @pytest.mark.parametrize("method", SCALAR + SQUARES)
    def test_a_sample_does_not_know_its_neighbours(self, method):
        task = TASKS["rosenbrock, many"]
        fn = task.residual if method in SQUARES else task.fn
        together, stats = solve("rosenbrock, many", method=method, full_output=True)
        for i in range(5):
            alone, course = minimize(fn, task.start[i], (task.args[0][i],), method, full_output=True)
            torch.testing.assert_close(together[i], alone, rtol=0, atol=0)
            assert stats.iterations[i] == course.iterations

    @pytest.mark.parametrize("method", SCALAR)
    def test_nor_do_many_unknowns(self, method):
        centre = 3 * directions(3, torch.ones(37, dtype=F64))

        def fn(x, c):
            # Not cosh or log, which torch's vectorised kernels round differently from their scalar ones.
            return torch.sqrt(1 + (x - c) ** 2).sum(-1) + (x.sum(-1) ** 2) / 40

        together = minimize(fn, torch.zeros_like(centre), (centre,), method)
        for i in range(3):
            alone = minimize(fn, torch.zeros_like(centre[i]), (centre[i],), method)
            torch.testing.assert_close(together[i], alone, rtol=0, atol=0)

    @pytest.mark.parametrize("method", SCALAR)
    def test_a_failed_sample_leaves_the_others(self, method):
        a = torch.tensor([[4.0], [-1.0], [9.0]], dtype=F64)

        def well(x, a):  # minimum at sqrt(a); for negative a it only falls towards zero, where log is infinite
            return (x * x / 2 - a * torch.log(x)).sum(-1)

        def solutions(a, how):
            return minimize(well, torch.full_like(a, 3.0), (a,), method, on_failure=how)

        with pytest.raises(ConvergenceError, match=r"1 of 3 samples \(first: \[1\]\)"):
            solutions(a, "raise")
        x, dx = dn.jvp(lambda a: solutions(a, "nan"), (a,), (torch.ones_like(a),))
        torch.testing.assert_close(x[[0, 2]], torch.tensor([[2.0], [3.0]], dtype=F64), rtol=1e-13, atol=0)
        torch.testing.assert_close(dx[[0, 2]], 0.5 / x[[0, 2]])
        assert x[1].isnan() and dx[1].isnan()
        x, dx = dn.jvp(lambda a: solutions(a, "last"), (a,), (torch.ones_like(a),))
        assert bool(x.isfinite().all()) and dx[1].isnan()  # never the derivative of what is no minimum

    def test_statistics(self):
        x, stats = solve("rosenbrock, many", full_output=True)
        assert stats.iterations.shape == stats.residual.shape == (5,)
        assert stats.jacobians == stats.iterations.max() + 1  # one more certifies the minimum
        assert stats.evaluations > stats.jacobians
        torch.testing.assert_close(
            stats.residual, slope_at("rosenbrock, many", x, *TASKS["rosenbrock, many"].args).abs().amax(-1)
        )


class TestChoices:
    @pytest.mark.parametrize("method", SCALAR + SQUARES)
    def test_a_tolerance_is_kept(self, method):
        coarse, stats = solve("decay" if method in SQUARES else "logistic", method=method, tol=1e-3, full_output=True)
        assert 1e-9 < float(stats.residual) <= 1e-3
        assert coarse.isfinite().all()

    def test_one_step_errs_by_the_last_step(self):
        def slope(how, tol):
            return dn.jvp(lambda a: solve("logistic", a, tol=tol, differentiate=how), (-2 * ONE,), (ONE,))[1]

        exact = slope("implicit", None)
        coarse, fine = (float((slope("one_step", tol) - exact).abs().max()) for tol in (1e-1, 1e-6))
        assert 1e-14 < fine < 1e-2 * coarse
        with pytest.raises(UnsupportedOpError, match="first derivatives only"):
            dn.hessian(lambda a: solve("logistic", a, differentiate="one_step").sum(), ONE)
        with pytest.raises(UnsupportedOpError, match="'bfgs' does not have"):
            solve("logistic", method="bfgs", differentiate="one_step")

    @pytest.mark.parametrize(
        ("name", "method"), [("logistic", "newton"), ("quadratic", "bfgs"), ("beale", "levenberg_marquardt")]
    )
    def test_unrolled_agrees(self, name, method):
        *rest, arg = TASKS[name].args
        v = directions(1, arg)

        def solution(a, how):
            return solve(name, *rest, a, method=method, differentiate=how)

        implicit, unrolled = (
            dn.jvp(lambda a, how=how: solution(a, how), (arg,), (v,))[1] for how in ("implicit", "unroll")
        )
        torch.testing.assert_close(unrolled, implicit, rtol=1e-6, atol=1e-6)
        leaf = arg.clone().requires_grad_()
        slopes = [torch.autograd.grad(solution(leaf, how).sum(), leaf)[0] for how in ("implicit", "unroll")]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("method", SCALAR + SQUARES)
    def test_memory_does_not_depend_on_the_steps(self, method):
        """One start near the minima and one far: several times the steps, the same bytes."""

        def live(start):
            a = torch.full((64, 1), 0.7, dtype=F64, requires_grad=True)
            task = TASKS["rosenbrock, many"]
            fn = task.residual if method in SQUARES else task.fn
            with LiveBytes() as meter:
                x, stats = minimize(fn, torch.tensor(start, dtype=F64).repeat(64, 1), (a,), method, full_output=True)
            assert x.requires_grad
            return meter.peak, int(stats.iterations.max())

        near, far = live([0.5, 0.6]), live([-1.5, 2.0])
        assert far[1] >= 1.5 * near[1]
        remembered = 20 * 64 * 2 * 8 if method == "lbfgs" else 0  # its pairs, whether they are full or not
        assert far[0] <= 1.3 * near[0] + remembered


class TestErrors:
    @pytest.mark.parametrize("method", SCALAR)
    def test_a_saddle_is_no_minimum(self, method):
        start = torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=F64)

        def saddle(x):  # minima at y = +-1; a start on the ridge y = 0 has no slope towards them
            return x[..., 0] ** 2 + (x[..., 1] ** 2 - 1) ** 2

        with pytest.raises(
            ConvergenceError, match=r"2 of 2 samples \(first: \[0, 1\]\) ended where the Hessian is not"
        ):
            minimize(saddle, start, method=method)
        x, stats = minimize(saddle, start, method=method, full_output=True, on_failure="nan")
        assert bool(x.isnan().all()) and bool((stats.status == Status.NOT_MINIMUM).all())

    def test_newton_leaves_a_saddle_by_its_negative_curvature(self):
        x = minimize(lambda x: x[0] ** 2 + (x[1] ** 2 - 1) ** 2, torch.tensor([1.0, 1e-6], dtype=F64))
        torch.testing.assert_close(x, torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("method", (*SCALAR, "levenberg_marquardt"))
    def test_a_flat_direction_is_named(self, method):
        def fn(x, a):
            r = x.sum(-1, keepdim=True) - a
            return r if method in SQUARES else (r * r).sum(-1)

        with pytest.raises(ConvergenceError, match="flat in some direction"):
            minimize(fn, torch.zeros(2, dtype=F64), (ONE,), method)

    def test_units_of_the_unknowns_do_not_make_a_minimum_flat(self):
        scale = torch.tensor([1e-9, 1.0, 1e9], dtype=F64)
        x, dx = dn.jvp(
            lambda a: minimize(lambda x, a: ((x / scale - a) ** 2).sum(-1), scale, (a,), tol=1e-6), (2 * ONE,), (ONE,)
        )
        torch.testing.assert_close((x, dx), (2 * scale, scale), rtol=1e-9, atol=0)

    def test_gauss_newton_needs_enough_residuals(self):
        with pytest.raises(DualInputError, match="at least as many residuals as unknowns, got 1 for 2"):
            minimize(lambda x: x[..., :1], torch.ones(2, dtype=F64), method="gauss_newton")
        with pytest.raises(ConvergenceError, match="singular Jacobian"):
            minimize(
                lambda x: torch.stack([x.sum(-1), 2 * x.sum(-1)], -1), torch.ones(2, dtype=F64), method="gauss_newton"
            )

    @pytest.mark.parametrize("method", SCALAR)
    def test_no_minimum_at_all(self, method):
        with pytest.raises(ConvergenceError, match="minimize by"):
            minimize(lambda x: x.sum(-1), ONE, method=method, max_steps=50)

    @pytest.mark.parametrize("method", SCALAR)
    def test_nan_at_the_start(self, method):
        with pytest.raises(ConvergenceError, match="nan or infinite"):
            minimize(lambda x: torch.log(x).sum(-1), -ONE, method=method)

    @pytest.mark.parametrize("method", SCALAR)
    def test_a_trial_out_of_the_domain_is_refused(self, method):
        x = minimize(lambda x: (x - 1e-3 * torch.log(x)).sum(-1), 5 * ONE, method=method)
        torch.testing.assert_close(x, 1e-3 * ONE, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("method", SCALAR)
    def test_a_tolerance_below_rounding(self, method):
        with pytest.raises(ConvergenceError, match="below what rounding|max_steps"):
            solve("logistic", method=method, tol=1e-30, max_steps=60)

    @pytest.mark.parametrize("method", SCALAR + SQUARES)
    def test_too_few_steps(self, method):
        with pytest.raises(ConvergenceError, match="did not converge in max_steps"):
            solve("rosenbrock", method=method, max_steps=2)

    @pytest.mark.parametrize("method", ["newton", "levenberg_marquardt"])
    def test_mixed_samples(self, method):
        def fn(x):
            r = x - 0.5 * x.mean(0) - 1
            return r if method in SQUARES else (r * r).sum(-1)

        with pytest.raises(StructureError, match="mixes samples"):
            minimize(fn, torch.ones(3, 1, dtype=F64), method=method)

    def test_wrong_shape_and_dtype(self):
        with pytest.raises(StructureError, match=r"shape \(\) for x of shape \(1,\), got \(1,\)"):
            minimize(lambda x: x * x, ONE)
        with pytest.raises(StructureError, match=r"shape \(3,\) for x"):
            minimize(lambda x: (x * x).sum(), torch.ones(3, 1, dtype=F64))
        with pytest.raises(StructureError, match=r"needs the residuals, a tensor of shape \(m\)"):
            minimize(lambda x: (x * x).sum(-1), ONE, method="levenberg_marquardt")
        with pytest.raises(StructureError, match="float64"):
            minimize(lambda x, a: ((x - a) ** 2).sum(-1), torch.ones(1), (ONE,))

    def test_a_dual_from_outside_is_not_lost(self):
        with pytest.raises(DualInputError, match="pass it in args"):
            dn.jvp(lambda a: minimize(lambda x: ((x - a) ** 2).sum(-1), ONE), (ONE,), (ONE,))

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
            minimize(lambda x, *a: (x * x).sum(-1), x0, **options)

    @pytest.mark.parametrize("option", ["method", "on_failure", "differentiate", "gradient"])
    def test_misspelt(self, option):
        with pytest.raises(UnknownNameError, match="did you mean|Choices"):
            minimize(lambda x: (x * x).sum(-1), ONE, **{option: "newtn"})


def test_the_minimum_of_a_quadratic_is_a_linear_solve():
    b = directions(2, ONE.expand(3))
    x, dx = dn.jvp(lambda b: solve("quadratic", b), (b,), (torch.eye(3, dtype=F64)[:, None].expand(3, 2, 3),))
    torch.testing.assert_close(x, torch.linalg.solve(MATRIX, b.T).T)
    torch.testing.assert_close(dx[:, 0], torch.linalg.inv(MATRIX))
