import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import ConvergenceError, DualInputError, StructureError, UnknownNameError, UnsupportedOpError
from dualnn.solvers import fixed_point
from dualnn.training.meters import LiveBytes
from tests.solvers.problems import PROBLEMS, unrolled

F64 = torch.float64
SMOOTH = [name for name in PROBLEMS if name != "slow"]  # plain iteration is too slow an oracle for that one


def solve(name, x, **options):
    return fixed_point(PROBLEMS[name].fn, torch.ones_like(x), (x,), **options)


@pytest.mark.parametrize("memory", [1, 2, 5])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_equation_holds(name, memory):
    x = PROBLEMS[name].x
    z = solve(name, x, memory=memory, max_steps=2000)
    assert z.shape == x.shape
    torch.testing.assert_close(PROBLEMS[name].fn(z, x), z, rtol=0, atol=2e-12)


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p.solution])
def test_values_in_closed_form(name):
    x = PROBLEMS[name].x
    torch.testing.assert_close(solve(name, x), PROBLEMS[name].solution(x), rtol=1e-10, atol=1e-10)


def test_anderson_needs_fewer_evaluations_than_plain_iteration():
    def evaluations(memory):
        calls = []
        fn = PROBLEMS["slow"].fn
        x = PROBLEMS["slow"].x
        fixed_point(lambda z, x: (calls.append(1), fn(z, x))[1], torch.ones_like(x), (x,), memory=memory, max_steps=999)
        return len(calls)

    assert 10 * evaluations(5) < evaluations(1)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_unrolled_loop(name):
    x = PROBLEMS[name].x.clone().requires_grad_()
    weight = torch.randn(x.shape, dtype=F64)
    ours, theirs = (
        torch.autograd.grad((z * weight).sum(), x)[0] for z in (solve(name, x), unrolled(PROBLEMS[name], x))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_forward_equals_reverse(name):
    x = PROBLEMS[name].x.clone().requires_grad_()
    v, weight = torch.randn(3, *x.shape, dtype=F64), torch.randn(x.shape, dtype=F64)
    z, dz = dn.jvp(lambda x: solve(name, x), (x.detach(),), (v,))
    reverse = torch.autograd.grad((solve(name, x) * weight).sum(), x)[0]
    assert torch.equal(z, solve(name, x.detach()))
    torch.testing.assert_close((dz * weight).flatten(1).sum(1), (v * reverse).flatten(1).sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch.func.jvp's first call
@pytest.mark.parametrize("name", SMOOTH)
def test_second_order(name):
    x = PROBLEMS[name].x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: solve(name, x), x)
    assert torch.autograd.gradgradcheck(lambda x: solve(name, x), x)
    v = torch.randn(x.shape, dtype=F64)

    def along(solver):
        grad = torch.autograd.grad(solver(x).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad((grad * v).sum(), x)[0]

    expected = along(lambda x: unrolled(PROBLEMS[name], x))
    torch.testing.assert_close(along(lambda x: solve(name, x)), expected, rtol=1e-8, atol=1e-8)
    gradient = torch.func.grad(lambda x: solve(name, x).square().sum())
    torch.testing.assert_close(torch.func.jvp(gradient, (x.detach(),), (v,))[1], expected, rtol=1e-8, atol=1e-8)


def test_duals_of_duals():
    x, v = PROBLEMS["tanh"].x, torch.randn(3, 4, dtype=F64)

    def second(f):
        return dn.jvp(lambda x: dn.jvp(f, (x,), (v,))[1], (x,), (v,))[1]

    ours, theirs = second(lambda x: solve("tanh", x)), second(lambda x: unrolled(PROBLEMS["tanh"], x, 80))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_several_arguments_some_of_them_constants():
    w = (torch.randn(4, 4, dtype=F64) / 8).requires_grad_()
    x, index = PROBLEMS["tanh"].x.clone().requires_grad_(), torch.tensor([3, 1, 0, 2])

    def fn(z, x, w, index, scale):
        return scale * torch.tanh(z[:, index] @ w + x)

    z = fixed_point(fn, torch.zeros_like(x), (x, w, index, 0.7))
    y = torch.zeros_like(x)
    for _ in range(80):
        y = fn(y, x, w, index, 0.7)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), [x, w]) for t in (z, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    tangent = torch.randn(1, 4, 4, dtype=F64)
    _, dz = dn.jvp(
        lambda w: fixed_point(fn, torch.zeros_like(x), (x.detach(), w, index, 0.7)), (w.detach(),), (tangent,)
    )
    expected = (torch.autograd.grad(fixed_point(fn, y.detach(), (x, w, index, 0.7)).sum(), w)[0] * tangent[0]).sum()
    torch.testing.assert_close(dz.sum(), expected, rtol=1e-9, atol=1e-9)


def alike(x):
    """A loss of the image problem for every problem: its pairs of gradients are compared."""
    return (x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum()


def derivatives(name, **options):
    """By a backward pass, along a direction, and a second derivative."""
    x = PROBLEMS[name].x.clone().requires_grad_()
    v = torch.ones_like(x.detach())
    gradient = torch.autograd.grad(alike(solve(name, x, **options)), x, create_graph=True)[0]
    second = torch.autograd.grad(gradient.sum(), x)[0]
    _, forward = dn.jvp(lambda x: solve(name, x, **options), (x.detach(),), (v,))
    return gradient.detach(), forward, second


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("options", [{"jacobian": "krylov"}, {"method": "picard", "max_steps": 2000}], ids=str)
def test_the_way_does_not_matter_to_the_derivatives(name, options):
    for ours, dense in zip(derivatives(name, **options), derivatives(name), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-8, atol=1e-8)


def test_a_given_jacobian():
    x = PROBLEMS["cosine"].x

    def solution(x, factor):
        jacobian = lambda z, x: torch.diag_embed(1 + factor * torch.sin(z))  # noqa: E731
        return solve("cosine", x, jacobian=jacobian)

    ours, dense = (dn.jvp(f, (x,), (x,))[1] for f in (lambda x: solution(x, 0.5), lambda x: solve("cosine", x)))
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    with pytest.raises(StructureError, match="not that of the equations"):
        dn.jvp(lambda x: solution(x, 0.4), (x,), (x,))


def test_large_states_need_no_matrix():
    x = torch.randn(2, 3000, dtype=F64, requires_grad=True)
    z = fixed_point(lambda z, x: 0.3 * torch.sin(z.roll(1, 1) + x), torch.zeros_like(x), (x,))
    v = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((z * v).sum(), x)
    y = torch.zeros_like(x)
    for _ in range(80):
        y = 0.3 * torch.sin(y.roll(1, 1) + x)
    torch.testing.assert_close(gradient, torch.autograd.grad((y * v).sum(), x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["anderson", "picard"])
@pytest.mark.parametrize("name", ["cosine", "tanh", "image"])
def test_together_equals_alone(name, method):
    x = PROBLEMS[name].x
    together, stats = solve(name, x, method=method, full_output=True)
    for i in range(len(x)):
        alone, course = solve(name, x[i : i + 1], method=method, full_output=True)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)
        assert abs(int(stats.iterations[i] - course.iterations)) <= 1  # rounding of a batched product
    assert bool(stats.converged.all()) and stats.evaluations == int(stats.iterations.max())


@pytest.mark.parametrize("rho", [0.5, 0.05])
def test_one_step_errs_by_the_contraction_factor(rho):
    x = torch.ones(2, 1, dtype=F64)

    def slope(how):
        def solution(x):
            return fixed_point(lambda z, x: rho * z + x, torch.zeros_like(x), (x,), differentiate=how)

        leaf = x.clone().requires_grad_()
        (reverse,) = torch.autograd.grad(solution(leaf).sum(), leaf)
        _, forward = dn.jvp(solution, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(forward, reverse)
        return forward

    error = (slope("one_step") - slope("implicit")) / slope("implicit")
    torch.testing.assert_close(error, torch.full_like(error, -rho))
    with pytest.raises(UnsupportedOpError, match="first derivatives only"):
        dn.hessian(lambda x: fixed_point(lambda z, x: z / 2 + x, x, (x,), differentiate="one_step").sum(), x)


@pytest.mark.parametrize("method", ["anderson", "picard"])
@pytest.mark.parametrize("name", ["cosine", "tanh"])
def test_unrolled_agrees(name, method):
    x, v = PROBLEMS[name].x, torch.randn(2, 3, 4, dtype=F64)
    implicit, unrolled = (
        dn.jvp(lambda x, how=how: solve(name, x, method=method, differentiate=how), (x,), (v,))[1]
        for how in ("implicit", "unroll")
    )
    torch.testing.assert_close(unrolled, implicit, rtol=1e-6, atol=1e-6)


def test_healthy_samples_can_be_had():
    growth = torch.tensor([[0.3], [2.0], [0.1]], dtype=F64)

    def solution(g, how):
        start = torch.zeros(3, 1, dtype=F64)
        return fixed_point(lambda z, g: g * z.abs() + 1, start, (g,), "picard", max_steps=60, on_failure=how)

    z, dz = dn.jvp(lambda g: solution(g, "nan"), (growth,), (torch.ones_like(growth),))
    torch.testing.assert_close(z[[0, 2]], 1 / (1 - growth[[0, 2]]))
    torch.testing.assert_close(dz[[0, 2]], 1 / (1 - growth[[0, 2]]) ** 2)
    assert z[1].isnan() and dz[1].isnan()
    assert bool(solution(growth, "last").isfinite().all())


@pytest.mark.parametrize("jacobian", ["dense", "krylov"])
def test_torch_func(jacobian):
    x = PROBLEMS["tanh"].x

    def total(x):
        return solve("tanh", x, jacobian=jacobian).square().sum()

    gradient = torch.autograd.functional.jacobian(total, x)
    torch.testing.assert_close(torch.func.grad(total)(x), gradient)
    torch.testing.assert_close(torch.func.jacfwd(total)(x), gradient)
    many = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(many)[0], gradient)
    torch.testing.assert_close(torch.func.hessian(total)(x), torch.func.jacrev(torch.func.jacrev(total))(x))


def test_the_start_does_not_matter_to_the_derivative():
    x = PROBLEMS["cosine"].x.clone().requires_grad_()
    start = torch.zeros_like(x).requires_grad_()
    z = fixed_point(PROBLEMS["cosine"].fn, start, (x,))
    assert torch.autograd.grad(z.sum(), start, allow_unused=True) == (None,)
    _, dz = dn.jvp(lambda s: fixed_point(PROBLEMS["cosine"].fn, s, (x.detach(),)), (start.detach(),), (x.detach(),))
    assert not dz.any()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_lower_precision(dtype, tol):
    x = PROBLEMS["tanh"].x.to(dtype).requires_grad_()
    z = solve("tanh", x)
    z.sum().backward()
    assert z.dtype == x.grad.dtype == dtype
    double = PROBLEMS["tanh"].x.clone().requires_grad_()
    solve("tanh", double).sum().backward()
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=tol, atol=tol)
    _, dz = dn.jvp(lambda x: solve("tanh", x), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(dz.sum().double(), double.grad.sum(), rtol=tol, atol=4 * tol)


def test_an_empty_batch():
    x = torch.zeros(0, 4, dtype=F64, requires_grad=True)
    z = solve("tanh", x)
    z.sum().backward()
    assert z.shape == x.grad.shape == (0, 4)
    _, dz = dn.jvp(lambda x: solve("tanh", x), (x.detach(),), (torch.zeros(2, 0, 4, dtype=F64),))
    assert dz.shape == (2, 0, 4)


def test_samples_that_do_not_converge_are_named():
    growth = torch.tensor([[0.3], [2.0], [0.1], [3.0]], dtype=F64)
    with pytest.raises(ConvergenceError, match=r"2 of 4 samples \(first: \[1, 3\]\).*tolerance 1e-09.*contract"):
        fixed_point(lambda z, g: g * z.abs() + 1, torch.zeros(4, 1, dtype=F64), (growth,), tol=1e-9, max_steps=30,
                    memory=1)  # fmt: skip


def test_a_nan_is_no_convergence():
    with pytest.raises(ConvergenceError, match=r"1 of 2 samples \(first: \[1\]\).*nan"):
        x = torch.tensor([[1.0], [float("nan")]])
        fixed_point(lambda z, x: z / 2 + x, torch.zeros(2, 1), (x,), max_steps=60)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_mixing_of_samples_is_refused(mode):
    norm = nn.BatchNorm1d(4).double()
    x = torch.randn(6, 4, dtype=F64, requires_grad=True)

    def fn(z, x):
        return 0.1 * norm(z + x) + x

    with pytest.raises(StructureError, match="mix samples"):
        if mode == "reverse":
            fixed_point(fn, torch.zeros_like(x), (x,)).sum().backward()
        else:
            dn.jvp(lambda x: fixed_point(fn, torch.zeros_like(x), (x,)), (x.detach(),), (x.detach(),))


BAD = {
    "shape": (StructureError, r"\(2, 3\), got \(2, 2\)", lambda: fixed_point(lambda z: z[:, :2], torch.zeros(2, 3))),
    "no batch axis": (DualInputError, r"got shape \(3,\)", lambda: fixed_point(torch.cos, torch.zeros(3))),
    "steps": (DualInputError, "got 0, 5", lambda: fixed_point(torch.cos, torch.zeros(1, 1), max_steps=0)),
    "memory": (DualInputError, "got 9, 0", lambda: fixed_point(torch.cos, torch.zeros(1, 1), max_steps=9, memory=0)),
    "tolerance": (DualInputError, "-1", lambda: fixed_point(torch.cos, torch.zeros(1, 1), tol=-1)),
    "dtype": (DualInputError, "int64", lambda: fixed_point(torch.cos, torch.zeros(1, 1, dtype=torch.int64))),
    "method": (UnknownNameError, "anderson", lambda: fixed_point(torch.cos, torch.zeros(1, 1), method="andersen")),
    "jacobian": (UnknownNameError, "krylov", lambda: fixed_point(torch.cos, torch.zeros(1, 1), jacobian="krilov")),
    "differentiate": (UnknownNameError, "unroll", lambda: fixed_point(torch.cos, torch.zeros(1, 1), differentiate="u")),
    "on_failure": (UnknownNameError, "nan", lambda: fixed_point(torch.cos, torch.zeros(1, 1), on_failure="none")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(kind):
    error, message, call = BAD[kind]
    with pytest.raises(error, match=message):
        call()


def test_live_bytes_do_not_depend_on_the_iterations():
    x = PROBLEMS["slow"].x.clone().requires_grad_()

    def live(tol, memory):
        with LiveBytes() as meter:
            fixed_point(
                PROBLEMS["slow"].fn, torch.zeros_like(x), (x,), tol=tol, memory=memory, max_steps=999
            ).sum().backward()
        return meter.peak

    assert live(1e-1, 1) == live(1e-12, 1)
