"""`root(compile=True)`: the same answers as without, whatever the speculation does."""

import functools
import gc
import weakref

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import ConvergenceError, DualInputError, StructureError
from dualnn.solvers import fused, root
from tests.solvers.systems import F64, SYSTEMS

ONE = torch.ones(1, dtype=F64)


@pytest.fixture(autouse=True)
def _quick_to_build(monkeypatch):
    """Record the same programs, run by torch's own kernels: inductor would take half a minute for each."""
    monkeypatch.setattr(fused, "compile", lambda fn, options: dn.compile(fn, backend="eager"))


def both(fn, start, args, **options):
    """The solution by the program and by the ordinary solver; which of them answered is checked apart."""
    return root(fn, start, args, compile=True, **options), root(fn, start, args, **options)


def used(fn, start, args, tol=None):
    return fused.fused(fn, start, args, tol) is not None


@pytest.mark.parametrize("num", [0, 1, 3])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_solution_and_derivative(name, num):
    system = SYSTEMS[name]
    *rest, arg = system.args
    v = torch.randn(num, *arg.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    near = root(system.fn, system.start, system.args) * 1.001 + 1e-5  # a warm start, as in a long loop
    for start in (near, system.start):
        quick, slow = both(system.fn, start, (*rest, dn.dual(arg, v)))
        torch.testing.assert_close(quick.primal, slow.primal, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(quick.tangent, slow.tangent, rtol=1e-9, atol=1e-10)
        assert quick.level == slow.level
    assert used(system.fn, near, (*rest, dn.dual(arg, v)))


def test_statistics():
    (x, quick), (_, slow) = both(*SYSTEMS["kepler, many"][:3], full_output=True)
    assert x.shape == (5, 1)
    assert quick.converged.all() and slow.converged.all()


def test_the_line_search_is_not_skipped():
    start = torch.tensor([40.0], dtype=F64)

    def equation(x, m):
        return torch.atan(x) - m

    assert not used(equation, start, (0.1 * ONE,))
    quick, slow = both(equation, start, (0.1 * ONE,))
    torch.testing.assert_close(quick, slow, rtol=0, atol=0)


def test_other_derivatives_take_the_ordinary_way():
    e, M = torch.tensor([0.9], dtype=F64), torch.tensor([0.1], dtype=F64)
    kepler = functools.partial(SYSTEMS["kepler"].fn)

    def solution(M):
        return root(kepler, ONE, (e, M), compile=True)

    torch.testing.assert_close(dn.hessian(lambda M: solution(M).sum(), M), torch.tensor([[-26.026506666141042]]).to(M))
    leaf = M.clone().requires_grad_()
    solution(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([3.6600171286016323], dtype=F64))
    torch.testing.assert_close(torch.func.jacrev(solution)(M)[0], leaf.grad)


def test_a_tolerance():
    (x, stats), (y, _) = both(*SYSTEMS["kepler"][:3], tol=1e-3, full_output=True)
    assert 1e-13 < float(stats.residual) <= 1e-3
    torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


class TestErrors:
    def test_no_solution(self):
        with pytest.raises(ConvergenceError, match="singular|progress"):
            root(lambda x: x * x + 1, ONE, compile=True)

    def test_structure(self):
        with pytest.raises(StructureError, match="mix samples"):
            root(lambda x: 2 * x - x.mean(0) - 2, torch.ones(3, 1, dtype=F64), compile=True)
        with pytest.raises(StructureError, match="shape"):
            root(lambda x: x.sum(), ONE, compile=True)

    @pytest.mark.parametrize("option", [{"method": "broyden"}, {"jacobian": "krylov"}, {"differentiate": "unroll"}])
    def test_what_is_not_offered(self, option):
        with pytest.raises(DualInputError, match="compile=True is for"):
            root(lambda x: x - 1, ONE, compile=True, **option)


class TestPrograms:
    def test_one_program_for_a_method_of_an_object(self):
        class Model:
            calls = 0

            def residual(self, x, a):
                self.calls += 1
                return x * x - a

        model = Model()
        root(model.residual, ONE, (4 * ONE,), compile=True)
        before = model.calls
        x = root(model.residual, 100 * ONE, (900 * ONE,), compile=True)  # several turns of the program
        torch.testing.assert_close(x, 30 * ONE)
        assert model.calls == before
        assert fused.programs_of(model.residual)[None].programs == 1

    def test_the_ordinary_solver_takes_over_only_where_it_must(self):
        calls = []

        def residual(x, m):
            calls.append(1)
            return torch.atan(x) - m

        root(residual, 0.2 * ONE, (0.1 * ONE,), compile=True)
        before = len(calls)
        root(residual, 0.3 * ONE, (0.1 * ONE,), compile=True)
        assert len(calls) == before
        root(residual, 40 * ONE, (0.1 * ONE,), compile=True)  # full steps diverge from there
        assert len(calls) > before

    def test_they_live_as_long_as_the_function(self):
        def equation(x, a):
            return x - a

        root(equation, ONE, (ONE,), compile=True)
        gone = weakref.ref(equation)
        del equation
        gc.collect()
        assert gone() is None
