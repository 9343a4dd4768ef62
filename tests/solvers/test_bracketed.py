import numpy as np
import pytest
import torch
from scipy.optimize.elementwise import find_root

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    SingularMatrixError,
    StructureError,
    UnknownNameError,
    UnsupportedOpError,
)
from dualnn.solvers import root
from tests.solvers.test_root import F64, KEPLER, differences

INF = float("inf")
methods = pytest.mark.parametrize("method", ["bisect", "chandrupatla"])


def kepler(E, e, M):
    return E - e * torch.sin(E) - M


# function of (x, a), bracket, values of a, and the root in closed form where there is one
PROBLEMS = {
    "linear": (lambda x, a: 2 * x - a, (-10.0, 10.0), (0.3, -4.0, 19.0), lambda a: a / 2),
    "square root": (lambda x, a: x * x - a, (0.0, INF), (1e-12, 0.5, 9.0, 1e12), torch.sqrt),
    "falling": (lambda x, a: torch.exp(-x) - a, (-INF, INF), (1e-5, 1.0, 50.0), lambda a: -torch.log(a)),
    "kepler": (lambda x, a: kepler(x, 0.9, a), (0.0, 4.0), (0.1, 0.5, 3.0), None),
    "kepler, open": (lambda x, a: kepler(x, 0.9, a), (-INF, INF), (0.1, -0.5, 20.0), None),
    "flat ends": (lambda x, a: torch.tanh(20 * (x - a)), (-30.0, 40.0), (0.3, 7.0), lambda a: a),
    "steep": (lambda x, a: torch.exp(50 * x) - a, (-3.0, 3.0), (1e-20, 2.0, 1e20), lambda a: torch.log(a) / 50),
    "wide": (lambda x, a: torch.atan(x) - a, (-1e15, 1e15), (0.5, -1.5), torch.tan),
    "half-open, down": (lambda x, a: x**3 + x - a, (-INF, 5.0), (-1e9, 3.0), None),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


def solve(name, method, a=None, **options):
    fn, bracket, values, _ = PROBLEMS[name]
    return root(
        fn, args=(torch.tensor(values, dtype=F64) if a is None else a,), method=method, bracket=bracket, **options
    )


@methods
@problems
def test_the_equation_holds(name, method):
    fn, bracket, values, solution = PROBLEMS[name]
    a = torch.tensor(values, dtype=F64)
    x, stats = solve(name, method, full_output=True)
    assert bool(((x >= bracket[0]) & (x <= bracket[1])).all()) and bool(stats.converged.all())
    if solution is not None:
        torch.testing.assert_close(x, solution(a), rtol=1e-13, atol=1e-15)
    width = 8 * torch.finfo(F64).eps * x.abs()  # the sign changes within rounding of the root
    assert bool((fn(x - width, a) * fn(x + width, a) <= 0).all())


@methods
@problems
def test_forward_equals_reverse_equals_differences(name, method):
    a = torch.tensor(PROBLEMS[name][2], dtype=F64)
    leaf = a.clone().requires_grad_()
    v = torch.stack([a, torch.ones_like(a)])
    x, dx = dn.jvp(lambda a: solve(name, method, a), (a,), (v,))
    (gradient,) = torch.autograd.grad(solve(name, method, leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(dx, v * gradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(dx[0], differences(lambda a: solve(name, method, a), a, a, 1e-3), rtol=1e-5, atol=1e-9)
    slope = lambda a: dn.jvp(lambda a: solve(name, method, a), (a,), (v[0],))[1]  # noqa: E731
    twice = dn.jvp(slope, (a,), (v[0],))[1]
    torch.testing.assert_close(twice, differences(slope, a, a, 1e-3), rtol=1e-5, atol=1e-9)
    if gradient.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(gradient.sum(), leaf)[0] * a * a, twice, rtol=1e-9, atol=1e-12)


@methods
def test_keplers_numbers(method):
    e, M, one = torch.tensor(0.9, dtype=F64), torch.tensor(0.1, dtype=F64), torch.tensor(1.0, dtype=F64)

    def E(e, M):
        return root(kepler, args=(e, M), method=method, bracket=(0.0, 4.0))

    value, dM = dn.jvp(lambda M: E(e, M), (M,), (one,))
    _, de = dn.jvp(lambda e: E(e, M), (e,), (one,))
    second = dn.jvp(lambda M: dn.jvp(lambda M: E(e, M), (M,), (one,))[1], (M,), (one,))[1]
    for got, expected in zip((value, dM, de, second), KEPLER, strict=True):
        assert got.shape == () and abs(float(got) / expected - 1) < 1e-12


def test_as_scipy_does():
    a = torch.linspace(0.05, 3, 40, dtype=F64)
    theirs = find_root(lambda E, M: E - 0.9 * np.sin(E) - M, (0.0, 4.0), args=(a.numpy(),))
    x, stats = solve("kepler", "chandrupatla", a, full_output=True)
    torch.testing.assert_close(x, torch.tensor(theirs.x), rtol=1e-14, atol=0)
    assert int(stats.iterations.max()) <= int(theirs.nfev.max())


@problems
def test_chandrupatla_needs_fewer_evaluations_and_both_are_bounded(name):
    fast, slow = (solve(name, m, full_output=True)[1].iterations for m in ("chandrupatla", "bisect"))
    assert int(fast.max()) <= 100 and int(slow.max()) <= 65
    if name != "wide":  # a bracket 15 orders wider than the root costs most of the steps before any interpolation
        assert float(fast.double().mean()) < float(slow.double().mean())


@methods
def test_any_float_bracket_ends(method):
    """A triple root at zero, reached from the ends of the floats; a root among the smallest."""
    x, stats = root(
        lambda x: x**3, torch.tensor(0.5, dtype=F64), method=method, bracket=(-1e300, 3e290), full_output=True
    )
    assert abs(float(x)) < 1e-90 and bool(stats.converged)
    tiny = torch.tensor([1e-300, -1e-200], dtype=F64)
    x = root(lambda x, a: x - a, None, (tiny,), method, bracket=(-1.0, 2.0))
    torch.testing.assert_close(x, tiny, rtol=1e-15, atol=0)


@methods
def test_together_equals_alone(method):
    a = torch.tensor(PROBLEMS["square root"][2], dtype=F64)
    together, stats = solve("square root", method, full_output=True)
    for i in range(len(a)):
        alone, course = solve("square root", method, a[i], full_output=True)
        assert float(alone) == float(together[i]) and course.iterations == stats.iterations[i]


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(method, dtype):
    a = torch.tensor([0.5, 2.0, 9.0], dtype=dtype)
    x, dx = dn.jvp(lambda a: solve("square root", method, a), (a,), (torch.ones_like(a),))
    eps = torch.finfo(dtype).eps
    assert x.dtype == dtype
    torch.testing.assert_close(x, a.sqrt(), rtol=2 * eps, atol=0)
    torch.testing.assert_close(dx, 0.5 / a.sqrt(), rtol=4 * eps, atol=0)


@methods
def test_shapes_broadcast(method):
    a, lo = torch.rand(3, 1, 4, dtype=F64) + 0.5, torch.zeros(2, 1, dtype=F64)
    x = root(lambda x, a: x * x - a, None, (a,), method, bracket=(lo, 9.0))
    assert x.shape == (3, 2, 4)
    torch.testing.assert_close(x, a.sqrt().expand(3, 2, 4))
    first = torch.full((2,), 1.4, dtype=torch.float32)  # x0 says the shape and dtype, and where to try first
    x, stats = root(lambda x: x * x - 1.96, first, method=method, bracket=(0, 2), full_output=True, tol=1e-3)
    assert x.shape == (2,) and x.dtype == torch.float32 and int(stats.iterations.max()) == 1


@methods
def test_torch_func(method):
    def solution(a):
        return solve("square root", method, a)

    a = torch.tensor([0.5, 2.0], dtype=F64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(solution)(a), torch.diag(0.5 / a.sqrt()))
    torch.testing.assert_close(torch.vmap(torch.func.grad(solution))(a), 0.5 / a.sqrt())
    torch.testing.assert_close(torch.func.hessian(lambda a: solution(a).sum())(a), torch.diag(-0.25 * a**-1.5))
    ends = torch.vmap(lambda hi, a: root(lambda x, a: x * x - a, None, (a,), method, bracket=(0.0 * hi, hi)))
    torch.testing.assert_close(ends(torch.tensor([1.0, 5.0], dtype=F64), a), a.sqrt())


FAILURES = {
    "no change of sign": (lambda x: x * x + torch.tensor([1.0, -1.0, 2.0]), r"2 of 3 .*\[0, 2\].*no change of sign"),
    "nan at an end": (lambda x: torch.log(x - torch.tensor([0.0, -3.0, 0.0])) - 0.5, r"2 of 3 .*\[0, 2\].*nan or inf"),
    "nan inside": (lambda x: torch.where((x > 0.9) & (x < 1.1), torch.nan, x - 1.01), "nan or infinite"),
    "a pole": (lambda x: 1 / (x - 0.3), "jump or a pole"),
    "a jump": (lambda x: x + torch.sign(x - 0.3) - 0.3 + 0.5, "jump or a pole"),
}


@methods
@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_named(kind, method):
    fn, message = FAILURES[kind]
    x0, bracket = torch.ones(3), (-1.0 if kind != "no change of sign" else 0.0, 2.0)
    with pytest.raises(ConvergenceError, match=message):
        root(fn, x0, method=method, bracket=bracket)
    x, stats = root(fn, x0, method=method, bracket=bracket, on_failure="nan", full_output=True)
    assert x.isnan().tolist() == (~stats.converged).tolist()
    if bool(stats.converged.any()):
        torch.testing.assert_close(fn(x)[stats.converged], torch.zeros(1), rtol=0, atol=1e-5)


@methods
def test_no_root_out_to_infinity(method):
    with pytest.raises(ConvergenceError, match="no change of sign"):
        root(lambda x: x * x + 1, torch.zeros((), dtype=F64), method=method, bracket=(-INF, INF))


@methods
def test_too_few_steps(method):
    with pytest.raises(ConvergenceError, match="max_steps"):
        solve("kepler", method, max_steps=3)
    _, stats = solve("kepler", method, tol=1e-3, full_output=True)
    assert float(stats.residual.max()) <= 1e-3 and int(stats.iterations.max()) < 25


@methods
def test_a_double_root_has_no_derivative(method):
    a = torch.tensor([1.0, 0.0], dtype=F64)

    def solution(a, how):
        return root(lambda x, a: (x - a) ** 3 + a * (x - a), None, (a,), method, bracket=(-1.0, 2.0), on_failure=how)

    with pytest.raises(SingularMatrixError, match=r"1 of 2 entries \(first: \[1\]\)"):
        dn.jvp(lambda a: solution(a, "raise"), (a,), (torch.ones_like(a),))
    _, dx = dn.jvp(lambda a: solution(a, "last"), (a,), (torch.ones_like(a),))
    assert float(dx[0]) == 1.0 and not bool(dx[1].isfinite())
    leaf = a.clone().requires_grad_()
    with pytest.raises(SingularMatrixError, match="double root"):
        solution(leaf, "raise").sum().backward()


@methods
def test_functions_that_are_not_elementwise(method):
    a = torch.tensor([0.2, 0.7], dtype=F64)
    with pytest.raises(StructureError, match="elementwise"):
        root(lambda x, a: x - a + 0.5 * x.flip(0).sin(), None, (a,), method, bracket=(-3.0, 3.0))
    zero = torch.zeros(2, dtype=F64)  # a symmetric one shows in its slopes only
    with pytest.raises(StructureError, match="elementwise"):
        dn.jvp(lambda a: root(lambda x, a: x + x.flip(0) - a, None, (a,), method, bracket=(-3.0, 3.0)), (zero,), (a,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, DualInputError, r"bracket=\(lo, hi\)"),
        ({"bracket": 3.0}, DualInputError, r"bracket=\(lo, hi\)"),
        (
            {"bracket": (2.0, torch.tensor([1.0, 3.0, -1.0]))},
            DualInputError,
            r"lo <= hi.*2 of 3 entries \(first: \[0, 2\]",
        ),
        ({"bracket": (float("nan"), 1.0)}, DualInputError, "lo <= hi"),
        ({"bracket": (INF, INF)}, DualInputError, "lo <= hi"),
        ({"bracket": (torch.zeros(2), torch.ones(3))}, StructureError, "broadcast"),
        ({"bracket": (0.0, 1.0), "jacobian": "krylov"}, DualInputError, "no Jacobian"),
        ({"bracket": (0.0, 1.0), "tol": -1.0}, DualInputError, "tol"),
        ({"bracket": (0.0, 1.0), "differentiate": "unroll"}, UnsupportedOpError, "implicit"),
        ({"bracket": (0.0, 1.0), "on_failure": "rais"}, UnknownNameError, "raise"),
        (
            {"bracket": (0.0, 1.0), "method": "newton", "x0": torch.ones(1)},
            DualInputError,
            "'bisect' or 'chandrupatla'",
        ),
        ({"bracket": (0.0, 1.0), "method": "brent"}, UnknownNameError, "chandrupatla"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        root(lambda x: x - 0.5, **{"method": "chandrupatla", **options})


def test_wrong_result_of_the_function():
    with pytest.raises(StructureError, match="shape"):
        root(lambda x: x.sum(), torch.ones(3), method="bisect", bracket=(-1.0, 2.0))
    with pytest.raises(StructureError, match="float64"):
        root(lambda x: x.double() - 0.5, torch.ones(3), method="bisect", bracket=(-1.0, 2.0))
