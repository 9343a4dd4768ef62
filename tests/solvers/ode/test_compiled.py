"""`options={"compile": True}`: the ordinary loop's results, whatever answers."""

import gc
import weakref

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import CompileFallbackWarning, ConvergenceError, DualInputError, StructureError
from dualnn.solvers import odeint
from dualnn.solvers.fused import programs_of
from dualnn.solvers.ode import fused
from tests.solvers.ode.problems import DRIVEN, F64, MATRIX, ROBERTSON, START, driven, linear, robertson

Y0, T, P = DRIVEN


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch):
    """It would take minutes; what it is given runs as recorded."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)


def both(call, options=None, **more):
    """``call(options)`` by a program and by the loop: the same statistics, and all results to compare."""
    (quick, course), (slow, other) = (call({**(options or {}), "compile": c}) for c in (True, False))
    for name in ("steps", "rejected", "newton_failures", "status"):
        torch.testing.assert_close(
            getattr(course, name), getattr(other, name), rtol=0, atol=0, msg=f"{name} {course} {other}"
        )
    torch.testing.assert_close(course.time, other.time, rtol=1e-9, atol=0)
    torch.testing.assert_close(quick, slow, **{"rtol": 1e-9, "atol": 1e-11, **more})
    return quick, course


def forward(fn, y0, t, p, tangents, method="rodas5p", rtol=1e-5, atol=1e-8, **keywords):
    """A function of the options: values and tangents in the start, the times and the argument, and the course."""

    def call(options):
        courses = []

        def solve(y0, t, p):
            y, stats = odeint(fn, y0, t, (p,), method, rtol, atol, options, True, **keywords)
            courses.append(stats)
            return y

        return dn.jvp(solve, (y0, t, p), tangents), courses[0]

    return call


def directions(k, *args):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(k, *a.shape, dtype=F64, generator=generator).to(a) for a in args)


def answered(fn):
    """The programs there are."""
    return [p.call for known in programs_of(fn).values() for p in known.program._programs.values()]


@pytest.mark.parametrize("end", [1.0, -0.1])
@pytest.mark.parametrize("options", [{}, {"sensitivities": True}, {"land": True}, {"max_step": 0.02, "norm": "max"}])
def test_the_same_results_in_one_system(options, end):
    call = forward(driven, Y0, T * end, P, directions(2, Y0, T, P))
    both(call, options)
    assert all(isinstance(c, fused.Written) for c in answered(driven))


@pytest.mark.parametrize(
    "options", [{"sensitivities": True}, pytest.param({}, marks=pytest.mark.slow)], ids=["sensitivities", "plain"]
)
def test_the_same_results_in_a_batch(options):
    y0, p = torch.stack([Y0, 3 * Y0, -Y0]), torch.stack([P, P * 20, P * 0.1])
    t = torch.linspace(0, 1, 23, dtype=F64)
    _, course = both(forward(driven, y0, t, p, directions(1, y0, t, p)), options)
    assert len(set(course.steps.tolist())) > 1
    assert all(isinstance(c, fused.Written) for c in answered(driven))


def test_fixed_steps_and_a_step_size_tensor():
    steps = torch.tensor([0.04, 0.1, 0.07], dtype=F64)
    both(forward(driven, Y0, T, P, directions(2, Y0, T, P)), {"step_size": steps})


def test_a_single_time_is_the_start():
    call = forward(driven, Y0, T[:1], P, directions(2, Y0, T[:1], P))
    both(call)


def test_float32():
    y0, t, p = (x.float() for x in DRIVEN)
    both(forward(driven, y0, t, p, directions(1, y0, t, p), rtol=1e-3, atol=1e-4), rtol=1e-4, atol=1e-5)


def test_values_alone_and_other_derivatives_follow():
    """One program of the values serves all of them."""

    def reverse(options):
        leaf = P.clone().requires_grad_()
        y, stats = odeint(driven, Y0, T, (leaf,), "rodas5p", 1e-5, 1e-8, options, True)
        return (y.detach(), *torch.autograd.grad(y[1:].sin().sum(), leaf)), stats

    def second(options):
        courses = []

        def value(p):
            y, stats = odeint(driven, Y0, T, (p,), "rodas5p", 1e-5, 1e-8, options, True)
            courses.append(stats)
            return torch.sin(y).sum()

        return dn.hessian(value, P), courses[0]

    def values(options):
        return odeint(driven, Y0, T, (P,), "rodas5p", 1e-5, 1e-8, options, True)

    for call in (values, reverse, second):
        both(call)


@pytest.mark.slow
def test_robertson():
    """All three sensitivities, in a batch and alone, at a tolerance where the steps differ by orders of magnitude."""
    eye = torch.eye(3, dtype=F64)
    known, zero = ROBERTSON, torch.zeros(3, 3, dtype=F64)
    call = forward(robertson, known.y0, known.t, known.p, (zero, zero, eye), rtol=1e-8, atol=1e-12)
    (y, dy), _ = both(call, rtol=1e-8, atol=1e-14)[0], None
    torch.testing.assert_close(y[1:], known.y, rtol=1e-6, atol=0)
    torch.testing.assert_close(dy[:, 1:].transpose(0, 1), known.dy, rtol=1e-6, atol=0)


class TestFailures:
    def test_named_errors(self):
        options = {"compile": True, "max_steps": 3}
        with pytest.raises(ConvergenceError, match=r"took max_steps steps.*after 3 steps"):
            odeint(driven, Y0, T, (P,), "rodas5p", 1e-5, 1e-8, options)

    def test_the_other_samples_results(self):
        def grow(t, y, c):
            return c * y * y  # ends at t = 1 / (c y0)

        c, y0 = torch.tensor([[0.1], [2.0], [0.2]], dtype=F64), torch.ones(3, 1, dtype=F64)
        t = torch.tensor([0.0, 0.2, 1.0], dtype=F64)
        zero = torch.zeros(1, 3, dtype=F64)
        tangents = torch.zeros(1, 3, 1, dtype=F64), zero, torch.ones(1, 3, 1, dtype=F64)
        call = forward(grow, y0, t, c, tangents, on_failure="nan")
        (y, _), course = both(call, {"max_steps": 2000}, equal_nan=True, rtol=1e-6)
        assert course.done.tolist() == [True, False, True]
        assert bool(y[2, 1].isnan().all()) and not bool(y[:, [0, 2]].isnan().any())

    def test_an_infinite_derivative(self):
        def fn(t, y):  # its slope is finite at 0, the derivative of it is not
            a, b = y.unbind(-1)
            return torch.stack([torch.sqrt(a) + b, -b], -1)

        with pytest.raises(ConvergenceError, match="iteration matrix"):
            odeint(fn, torch.tensor([0.0, 1.0], dtype=F64), T, method="rodas5p", options={"compile": True})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=F64)
        self.register_buffer("scale", torch.tensor(1.0, dtype=F64))

    def forward(self, t, y):
        return self.scale * torch.tanh(self.layer(y)) - y


def test_a_module_as_it_is_now():
    """Parameters and buffers are seen after they changed, and after they were replaced."""
    module = Net()

    def solve(compile):
        with torch.no_grad():
            return odeint(module, Y0, T, method="rodas5p", options={"compile": compile})

    before = solve(True)
    with torch.no_grad():
        module.layer.weight.mul_(2)
    module.layer.bias = nn.Parameter(torch.ones(2, dtype=F64))
    module.scale = torch.tensor(0.5, dtype=F64)
    torch.testing.assert_close(solve(True), solve(False), rtol=1e-10, atol=1e-12)
    assert float((solve(True) - before).abs().max()) > 0.01
    weights = [(p, torch.ones_like(p)) for p in module.parameters()]

    def loss(compile):
        y = odeint(module, Y0, T, method="rodas5p", options={"compile": compile})
        return torch.autograd.grad(y.sum(), [p for p, _ in weights])

    for quick, slow in zip(loss(True), loss(False), strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-10, atol=1e-12)


class TestReasons:
    def test_a_method_that_iterates(self):
        with pytest.raises(DualInputError, match="rodas5p"):
            odeint(driven, Y0, T, (P,), "radau", options={"compile": True})

    def test_control_flow_on_numbers(self):
        def fn(t, y, p):
            return -p[:2] * y if float(y[0]) > 0 else -y

        with pytest.warns(CompileFallbackWarning, match="control flow"):
            quick = odeint(fn, Y0, T, (P,), "rodas5p", options={"compile": True})
        torch.testing.assert_close(quick, odeint(fn, Y0, T, (P,), "rodas5p"), rtol=0, atol=0)

    def test_tangents_of_several_levels_in_the_error_test(self):
        def slope(p, options):
            return dn.jvp(lambda p: odeint(driven, Y0, T, (p,), "rodas5p", options=options), (p,), (P,))[1]

        def twice(**options):
            return dn.jvp(lambda p: slope(p, {"sensitivities": True, **options}), (P,), (P,))[1]

        with pytest.warns(CompileFallbackWarning, match="several levels"):
            quick = twice(compile=True)
        torch.testing.assert_close(quick, twice(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("what", "keywords"),
        [("events", {"events": lambda t, y: y[0] - 10}), ("mass matrix", {"mass": torch.eye(2, dtype=F64)})],
    )
    def test_what_a_program_does_not_do(self, what, keywords):
        def call(**options):
            return odeint(lambda t, y: -y, Y0, T, method="rodas5p", options=options, **keywords)

        with pytest.warns(CompileFallbackWarning, match=what):
            call(compile=True)

    def test_samples_that_mix(self):
        def fn(t, y):
            return -y.mean(0, keepdim=True).expand_as(y)

        with pytest.raises(StructureError, match="mix samples"):
            odeint(fn, torch.ones(3, 1, dtype=F64), T, method="rodas5p", options={"compile": True})

    def test_programs_live_as_long_as_the_function(self):
        def fn(t, y):
            return -y

        odeint(fn, Y0, T, method="rodas5p", options={"compile": True})
        gone = weakref.ref(fn)
        del fn
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize(
    "args",
    [
        (torch.full((3,), 0.5, dtype=F64), MATRIX),  # one number a sample, and a matrix that looks like a batch
        (torch.ones((), dtype=F64), torch.stack([MATRIX, 2 * MATRIX, MATRIX / 2])),
        (2.0, MATRIX),
    ],
    ids=["shared", "own", "number"],
)
def test_arguments_of_any_shape(args):
    """As long as the batch, or as the state, or both."""

    def fn(t, y, rate, matrix):
        rate = rate.unsqueeze(-1) if isinstance(rate, torch.Tensor) and rate.dim() else rate
        return rate * (matrix * y.unsqueeze(-2)).sum(-1)

    y0 = torch.stack([START, 2 * START, -START])

    def call(options):
        return odeint(fn, y0, T, args, "rodas5p", options=options, full_output=True)

    both(call)
    assert all(isinstance(c, fused.Written) for c in answered(fn))


def test_tangents_of_a_linear_system():
    call = forward(linear, START, T, MATRIX, directions(2, START, T, MATRIX))
    both(call)
    assert all(isinstance(c, fused.Written) for c in answered(linear))


def test_a_program_that_inductor_builds_gives_the_same():
    """What cannot be taken apart: here a tensor that is too large."""
    matrix = torch.eye(40, dtype=F64) * 0.5

    def fn(t, y, matrix):
        return -(torch.tanh(matrix @ y.unsqueeze(-1))).squeeze(-1)

    y0 = torch.linspace(0, 1, 40, dtype=F64)

    def call(options):
        return odeint(fn, y0, T, (matrix,), "rodas5p", options=options, full_output=True)

    both(call)
    assert not any(isinstance(c, fused.Written) for c in answered(fn))
