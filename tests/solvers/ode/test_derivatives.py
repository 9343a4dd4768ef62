"""Derivatives are those of the discrete solution, in every mode and order."""

import gc

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.solvers import odeint
from dualnn.training.meters import LiveBytes
from tests.solvers.ode.problems import DRIVEN, F64, METHODS, STIFF, VAN_DER_POL, driven

methods = pytest.mark.parametrize("method", METHODS)
Y0, T, P = DRIVEN
FIXED = {"step_size": torch.tensor([0.04, 0.1, 0.07, 0.1], dtype=F64)}


def solve(y0, t, p, method, **options):
    return odeint(driven, y0, t, (p,), method, rtol=1e-6, atol=1e-8, options=options)


def directions(k, *args):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(k, *a.shape, dtype=F64, generator=generator) for a in args)


def differences(fn, h=1e-3):
    """Seven-point difference at 0."""
    return (45 * (fn(h) - fn(-h)) - 9 * (fn(2 * h) - fn(-2 * h)) + (fn(3 * h) - fn(-3 * h))) / (60 * h)


@methods
@pytest.mark.parametrize("end", [1.0, -0.1])
def test_tangents_are_exact_derivatives_of_the_discrete_solution(method, end):
    """With given steps the discrete solution is a function that differences can differentiate, to 1e-10."""
    t, fixed = T * end, {"step_size": FIXED["step_size"] * abs(end)}
    v, w = directions(1, Y0, P)

    def discrete(s):
        return solve(Y0 + s * v[0], t, P + s * w[0], method, **fixed)

    _, moved = dn.jvp(lambda y0, p: solve(y0, t, p, method, **fixed), (Y0, P), (v, w))
    torch.testing.assert_close(moved[0], differences(discrete), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", STIFF)
def test_the_stages_own_jacobians_are_used(method):
    """One Jacobian for all of a step's stages leaves percents: a large step shows it."""
    v, w = directions(1, Y0, P)
    fixed = {"step_size": 0.35}

    def discrete(s):
        return solve(Y0 + s * v[0], T, P + s * w[0], method, **fixed)

    _, moved = dn.jvp(lambda y0, p: solve(y0, T, p, method, **fixed), (Y0, P), (v, w))
    torch.testing.assert_close(moved[0], differences(discrete), rtol=1e-9, atol=1e-9)


@methods
def test_forward_equals_reverse(method):
    """In the start, the times and the arguments at once, with adaptive steps."""
    tangents = directions(3, Y0, T, P)
    y, moved = dn.jvp(lambda y0, t, p: solve(y0, t, p, method), (Y0, T, P), tangents)
    leaves = [x.clone().requires_grad_() for x in (Y0, T, P)]
    out = solve(*leaves, method)
    torch.testing.assert_close(out.detach(), y, rtol=1e-13, atol=1e-13)
    (weight,) = directions(1, y)
    gradients = torch.autograd.grad((out * weight[0]).sum(), leaves)
    pushed = (moved * weight).flatten(1).sum(1)
    pulled = sum((a * b).flatten(1).sum(1) for a, b in zip(tangents, gradients, strict=True))
    torch.testing.assert_close(pushed, pulled, rtol=1e-11, atol=1e-11)


@methods
def test_forward_equals_reverse_in_a_batch(method):
    y0, p = torch.stack([Y0, 2 * Y0, -Y0]), torch.stack([P, P * 9, P * 0.2])
    tangents = directions(2, y0, p)
    y, moved = dn.jvp(lambda y0, p: solve(y0, T, p, method), (y0, p), tangents)
    leaves = [x.clone().requires_grad_() for x in (y0, p)]
    out = solve(leaves[0], T, leaves[1], method)
    (weight,) = directions(1, y)
    gradients = torch.autograd.grad((out * weight[0]).sum(), leaves)
    pushed = (moved * weight).flatten(1).sum(1)
    pulled = sum((a * b).flatten(1).sum(1) for a, b in zip(tangents, gradients, strict=True))
    torch.testing.assert_close(pushed, pulled, rtol=1e-10, atol=1e-10)


@methods
def test_derivatives_in_the_times(method):
    """At the end the solution moves with the slope, at the start against it."""
    slopes = directions(1, T)[0]
    p = P.clone()

    def ours(t):
        return odeint(driven, Y0, t, (p,), method, rtol=1e-9, atol=1e-9)

    y, moved = dn.jvp(ours, (T,), (slopes,))
    measured = differences(lambda s: ours(T + s * slopes[0]), 1e-2)
    torch.testing.assert_close(moved[0], measured, rtol=2e-5, atol=2e-5)
    _, last = dn.jvp(lambda t: ours(torch.stack([T[0], t])), (T[-1],), (torch.ones(1, dtype=F64),))
    torch.testing.assert_close(last[0, -1], driven(T[-1], y[-1], p), rtol=1e-4, atol=1e-4)


@methods
def test_second_order_every_way(method):
    """Forward over forward, reverse over reverse and reverse over forward, against differences of a gradient."""
    (v,) = directions(1, P)

    def value(p):
        return torch.sin(solve(Y0, T, p, method, **FIXED)).sum()

    def slope(p):
        leaf = p.detach().clone().requires_grad_()
        return torch.autograd.grad(value(leaf), leaf)[0]

    measured = differences(lambda s: slope(P + s * v[0]))
    leaf = P.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    (reverse,) = torch.autograd.grad((first * v[0]).sum(), leaf)
    torch.testing.assert_close(reverse, measured, rtol=1e-8, atol=1e-8)
    (mixed,) = torch.autograd.grad(dn.jvp(value, (leaf,), (v[0],))[1], leaf)
    torch.testing.assert_close(mixed, measured, rtol=1e-8, atol=1e-8)
    twice = dn.jvp(lambda p: dn.jvp(value, (p,), (v[0],))[1], (P,), (v[0],))[1]
    torch.testing.assert_close(twice, (measured * v[0]).sum(), rtol=1e-8, atol=1e-8)


@methods
def test_tangents_in_the_error_test(method):
    """Only then are they as accurate as the tolerance says: a tangent of a constant solution."""

    def fn(t, y, p):  # y = 1 solves it for p = 0
        return p * torch.cos(20 * t) * y

    t, p = torch.tensor([0.0, 1.0], dtype=F64), torch.zeros(1, dtype=F64)
    y0 = torch.ones(1, dtype=F64)

    def error(**options):
        options["first_step"] = 0.5
        _, moved = dn.jvp(
            lambda p: odeint(fn, y0, t, (p,), method, 1e-5, 1e-5, options)[-1], (p,), (torch.ones(1, 1, dtype=F64),)
        )
        return float((moved - torch.sin(torch.tensor(20.0)) / 20).abs().max())

    assert error() > 1e-3
    assert error(sensitivities=True) < 2e-4


def test_bdf_chooses_its_order_for_the_tangents_too():
    """By the values' errors alone it takes orders that the tangents reject: a third of all steps."""
    known, counts = VAN_DER_POL, []

    def solve(eps):
        t = torch.tensor([0.0, 1.0], dtype=F64)
        y, stats = odeint(
            known.fn, known.y0, t, (eps,), "bdf", 1e-4, 1e-7, {"sensitivities": True}, full_output=True
        )  # fmt: skip
        counts.append(stats)
        return y

    dn.jvp(solve, (known.p,), (torch.ones_like(known.p),))
    assert int(counts[0].rejected) < 0.2 * int(counts[0].steps)


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=F64)

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) - y


@methods
def test_a_modules_parameters_are_arguments(method):
    module, t = Decay(), torch.tensor([0.0, 0.5], dtype=F64)
    by_module = torch.autograd.grad(odeint(module, Y0, t, method=method)[-1].sum(), list(module.parameters()))

    def explicit(t, y, weight, bias):
        return torch.tanh(y @ weight.T + bias) - y

    leaves = [p.detach().clone().requires_grad_() for p in module.parameters()]
    by_hand = torch.autograd.grad(odeint(explicit, Y0, t, tuple(leaves), method)[-1].sum(), leaves)
    for got, wanted in zip(by_module, by_hand, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert float(wanted.abs().min()) > 0


@methods
def test_a_sample_that_fails_spoils_no_gradient(method):
    c = torch.tensor([[0.1], [2.0]], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    options = {"max_steps": 300}
    y = odeint(
        lambda t, y, c: c * y * y, torch.ones(2, 1, dtype=F64), t, (c,), method, options=options, on_failure="nan"
    )
    (gradient,) = torch.autograd.grad(y[-1, 0].sum(), c)
    torch.testing.assert_close(gradient[0], torch.tensor([1 / 0.81], dtype=F64), rtol=1e-4, atol=0)
    assert float(gradient[1]) == 0


@methods
def test_a_rejected_length_from_which_the_equation_overflows_spoils_no_gradient(method):
    p = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def cubic(t, y, p):
        return p * (y - y**3)

    def end(p, *y0):
        t, y0 = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor(y0, dtype=F64).unsqueeze(1)
        return odeint(cubic, y0, t, (p,), method, 1e-4, 1e-4, {"first_step": 8.0})[-1]

    (found,) = torch.autograd.grad(end(p, 1.2, 30.0).sum(), p)
    _, tangent = dn.jvp(lambda p: end(p, 1.2, 30.0).sum(), (p.detach(),), (torch.ones((), dtype=F64),))
    alone = sum(torch.autograd.grad(end(p, y).sum(), p)[0] for y in (1.2, 30.0))
    torch.testing.assert_close(found, alone, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found, tangent, rtol=1e-8, atol=1e-10)


@methods
def test_very_small_fixed_steps(method):
    """Newton's increments end at rounding errors, which shrink no further."""
    y = solve(Y0, T, P, method, step_size=1 / 700)
    exact = odeint(driven, Y0, T, (P,), "radau", 1e-11, 1e-12)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@methods
def test_memory_forward_does_not_grow_with_the_steps(method):
    def peak(steps):
        with LiveBytes() as m:
            dn.jvp(lambda p: solve(Y0, T, p, method, step_size=1 / steps), (P,), (torch.eye(2, dtype=F64),))
        return m.peak

    assert peak(160) == peak(40)


def live():
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def spun(steps, marks):
    """A rotation by 2 pi in fixed steps, with the tangent in its speed; bytes of its live tensors at marks."""
    calls, seen = 0, []
    others = {id(x): x for x in live()}  # of the process: kept, so that none goes meanwhile

    def fn(t, y, w):
        nonlocal calls
        calls += 1
        if calls % (12 * steps // marks) == 6:  # 12 a step: value and derivative
            seen.append(sum(x.numel() * x.element_size() for x in live() if id(x) not in others))
        return torch.stack([w * y[..., 1], -w * y[..., 0]], -1)

    t, w = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor(2 * torch.pi, dtype=F64)
    options = {"step_size": 1 / steps, "max_steps": 2 * steps}
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    y, dy = dn.jvp(lambda w: odeint(fn, y0, t, (w,), "dopri5", options=options)[-1], (w,), (torch.ones_like(w),))
    assert calls > 12 * steps
    torch.testing.assert_close(y, y0, rtol=0, atol=1e-6)
    torch.testing.assert_close(dy, torch.tensor([0.0, -1.0], dtype=F64), rtol=0, atol=1e-5)
    return seen


def test_live_tensors_of_two_hundred_steps():
    seen = spun(200, 4)
    assert len(seen) >= 4 and len(set(seen[1:])) == 1


@pytest.mark.slow
def test_live_tensors_of_a_hundred_thousand_steps():
    seen = spun(100_000, 10)
    assert len(seen) >= 10 and len(set(seen[1:])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", STIFF)
def test_memory_backward_grows_by_a_few_n_a_step(method):
    def peak(steps):
        leaf = P.clone().requires_grad_()
        with LiveBytes() as m:
            solve(Y0, T, leaf, method, step_size=1 / steps).sum().backward()
        return m.peak

    a_step = (peak(256) - peak(96)) / 160
    assert a_step < 8 * 2 * 16 + 40  # 16 numbers for every unknown (Rosenbrock has 8 stages), and the step itself
