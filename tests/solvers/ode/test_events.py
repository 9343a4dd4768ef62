"""Events: when, where, and with which derivatives."""

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    SingularMatrixError,
    StructureError,
    TangentLostError,
)
from dualnn.solvers import Event, odeint
from dualnn.solvers.ode.stats import Status
from tests.solvers.ode.problems import DRIVEN, F64, METHODS, ROBERTSON, STIFF, driven, robertson

methods = pytest.mark.parametrize("method", METHODS)
TOL = {"bdf": 1e-10, "radau": 1e-9, "rodas5p": 1e-9, "dopri5": 1e-10, "dop853": 1e-10}


def tensor(*x):
    return torch.tensor(x, dtype=F64)


def decay(t, y, rate, level):
    return -rate * y


def left(t, y, rate, level):
    return y[..., 0] - level[..., 0]


def fall(t, y, g):
    return torch.stack([y[..., 1], -g[..., 0] - 0 * y[..., 0]], -1)


def height(t, y, g):
    return y[..., 0]


def differences(fn, h=1e-4):
    return (45 * (fn(h) - fn(-h)) - 9 * (fn(2 * h) - fn(-2 * h)) + (fn(3 * h) - fn(-3 * h))) / (60 * h)


@methods
def test_a_crossing_in_closed_form(method):
    """y0 exp(-rate t) = level at t = log(y0 / level) / rate: derivatives in all three, forward, reverse, second."""
    tol = TOL[method]

    def ours(y0, rate, level):
        t = tensor(0.0, 5.0)
        _, found = odeint(decay, y0, t, (rate, level), method, tol, tol, events=Event(left, terminal=True))
        assert found.counts == 1
        return torch.cat([found.t, found.y[0]])

    def exact(y0, rate, level):
        return torch.cat([torch.log(y0 / level) / rate, level])

    args = tensor(1.3), tensor(0.8), tensor(0.25)
    seeds = tuple(torch.eye(3, dtype=F64)[:, k : k + 1] for k in range(3))
    (value, moved), (wanted, slopes) = (dn.jvp(f, args, seeds) for f in (ours, exact))
    torch.testing.assert_close(value, wanted, rtol=2e-8, atol=0)
    torch.testing.assert_close(moved, slopes, rtol=2e-7, atol=1e-8)
    leaves = [a.clone().requires_grad_() for a in args]
    pulled = torch.autograd.grad(ours(*leaves)[0], leaves, create_graph=True)
    torch.testing.assert_close(torch.cat(pulled), moved[:, 0], rtol=1e-10, atol=1e-10)
    twice = torch.autograd.grad(sum(pulled), leaves)
    known = torch.autograd.grad(sum(torch.autograd.grad(exact(*leaves)[0], leaves, create_graph=True)), leaves)
    # radau's interpolant is of order 3: so is its curvature at the event, which only second derivatives ask for.
    torch.testing.assert_close(torch.cat(twice), torch.cat(known), rtol=2e-4 if method == "radau" else 1e-5, atol=0)
    _, over = dn.jvp(lambda *a: dn.jvp(ours, a, tuple(map(torch.ones_like, a)))[1][0], args, seeds)
    torch.testing.assert_close(over, torch.cat(twice), rtol=1e-8, atol=1e-8)


@methods
def test_derivatives_are_those_of_the_discrete_event(method):
    """With given steps, that an event must not change: to 1e-9 against differences."""
    y0, _, p = DRIVEN
    fixed = {"step_size": tensor(0.04, 0.1, 0.07, 0.1)}
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(x.shape, dtype=F64, generator=generator) for x in (y0, p))

    def event(t, y, p):
        return y[..., 0] ** 2 + 0.2 * y[..., 1] - 1.7 * p[..., 0] + 0.4 * t

    def solve(y0, p):
        _, found = odeint(driven, y0, tensor(0.0, 1.0), (p,), method, options=fixed, events=event)
        assert found.counts == 1
        return torch.cat([found.t, found.y[0]])

    value, moved = dn.jvp(solve, (y0, p), (v, w))
    assert 0.05 < float(value[0]) < 0.95
    torch.testing.assert_close(moved, differences(lambda s: solve(y0 + s * v, p + s * w)), rtol=1e-9, atol=1e-9)

    def slope(p):
        leaf = p.detach().clone().requires_grad_()
        return torch.autograd.grad(solve(y0, leaf).sum(), leaf)[0]

    leaf = p.clone().requires_grad_()
    (first,) = torch.autograd.grad(solve(y0, leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * w).sum(), leaf)
    torch.testing.assert_close(second, differences(lambda s: slope(p + s * w)), rtol=1e-7, atol=1e-7)


@methods
def test_a_bouncing_ball(method):
    """Three bounces by restarts at differentiable times; all in closed form."""
    keep = 0.8

    def ours(g, h0):
        y, start, times = torch.cat([h0, torch.zeros_like(h0)]), torch.zeros_like(g), []
        for _ in range(3):
            t = torch.cat([start, start + 10])
            event = Event(height, terminal=True, direction=-1)
            _, found = odeint(fall, y, t, (g,), method, 1e-10, 1e-10, events=event)
            times.append(found.t)
            start = found.t
            y = torch.stack([torch.zeros_like(found.y[0, 0]), -keep * found.y[0, 1]])
        return torch.cat(times)

    def exact(g, h0):
        first = torch.sqrt(2 * h0 / g)
        flights = [first, 2 * keep * first, 2 * keep**2 * first]
        return torch.cumsum(torch.cat(flights), 0)

    args, seeds = (tensor(9.81), tensor(1.5)), (tensor([1.0], [0.0]), tensor([0.0], [1.0]))
    (t, dt), (wanted, slopes) = (dn.jvp(f, args, seeds) for f in (ours, exact))
    torch.testing.assert_close(t, wanted, rtol=1e-7, atol=0)
    torch.testing.assert_close(dt, slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", STIFF)
def test_robertsons_roots(method):
    """Eight decades apart; SUNDIALS (cvsRoberts_dns, rtol 1e-4) prints both times, and they scale with the rates."""
    t = tensor(0.0, 4e10)
    events = [
        Event(lambda t, y, p: y[..., 0] - 1e-4, terminal=True, required=True),
        Event(lambda t, y, p: y[..., 2] - 0.01, direction=1, required=True),
    ]

    def roots(p):
        _, found = odeint(robertson, ROBERTSON.y0, t, (p,), method, 1e-6, 1e-12, events=events)
        return torch.cat([found[0].t, found[1].t])

    value, moved = dn.jvp(roots, (ROBERTSON.p,), (torch.eye(3, dtype=F64),))
    torch.testing.assert_close(value, tensor(2.0803e7, 0.26391), rtol=1e-3, atol=0)
    # All rates k times as large: all times 1 / k.
    torch.testing.assert_close((moved.mT @ ROBERTSON.p), -value, rtol=2e-5, atol=0)


@methods
def test_samples_end_each_at_its_own(method):
    tol = TOL[method]
    rate, level = tensor([0.5], [2.0], [0.01]), tensor([0.5], [0.1], [0.5])
    t = tensor(0.0, 0.7, 1.2, 3.0)

    def solve(rate):
        y0 = torch.ones(3, 1, dtype=F64)
        event = Event(left, terminal=True)
        y, found, stats = odeint(decay, y0, t, (rate, level), method, tol, tol, events=event, full_output=True)
        return y, found, stats

    leaf = rate.clone().requires_grad_()
    y, found, stats = solve(leaf)
    exact = torch.log(1 / level) / rate
    assert stats.status.tolist() == [Status.EVENT, Status.EVENT, Status.DONE] and bool(stats.done.all())
    assert found.counts.tolist() == [1, 1, 0]
    torch.testing.assert_close(found.t[0, :2], exact[:2, 0], rtol=1e-7, atol=0)
    torch.testing.assert_close(stats.time[:2], found.t[0, :2].detach())
    torch.testing.assert_close(found.y[0, :2], level[:2], rtol=1e-7, atol=0)
    assert bool(found.t[0, 2].isnan()) and bool(found.y[0, 2].isnan().all())
    reached = t[:, None] <= torch.where(exact[:, 0] < 3, exact[:, 0], torch.inf)
    assert torch.equal(~y[..., 0].isnan(), reached)
    curve = torch.exp(-rate[:, 0] * t[:, None])
    torch.testing.assert_close(y[..., 0][reached], curve[reached], rtol=1e-7, atol=0)
    (slope,) = torch.autograd.grad(found.t[0, :2].sum() + y[1].sum(), leaf)
    wanted = torch.where(exact < 3, -exact / rate, 0.0) - 0.7 * torch.exp(-0.7 * rate)
    torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-8)
    _, moved = dn.jvp(lambda r: solve(r)[1].t[0, :2], (rate,), (torch.ones_like(rate),))
    torch.testing.assert_close(moved, (-exact / rate)[:2, 0], rtol=1e-6, atol=0)


@methods
def test_several_events_directions_and_counts(method):
    """An oscillator: zeros of both components, rising or falling, the third of one ends it."""

    def turn(t, y, w):
        return torch.stack([w[..., 0] * y[..., 1], -w[..., 0] * y[..., 0]], -1)

    w = tensor([2.0], [3.0])
    y0 = tensor([0.0, 1.0], [0.0, 1.0])
    pi = torch.pi
    events = [
        lambda t, y, w: y[..., 0],
        Event(lambda t, y, w: y[..., 0], direction=1),
        Event(lambda t, y, w: y[..., 1], direction=-1),
        Event(lambda t, y, w: y[..., 1] - 0.5, terminal=3),
        lambda t, y, w: t.squeeze(-1) - 0.25,
    ]
    y, found = odeint(turn, y0, tensor(0.0, 9.0), (w,), method, TOL[method], TOL[method], events=events)
    assert bool(y[1].isnan().all())
    end = (2 * pi + pi / 3) / w[:, 0]
    wanted = [(pi, 2 * pi), (2 * pi,), (pi / 2,), (pi / 3, 5 * pi / 3, 7 * pi / 3)]
    for got, angles in zip(found, wanted, strict=False):
        assert got.t.shape == (len(angles), 2) and got.counts.tolist() == [len(angles)] * 2
        torch.testing.assert_close(got.t, tensor(*angles)[:, None] / w[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[3].t[-1], end, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[4].t[0], tensor(0.25, 0.25), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[4].y[0], torch.stack([torch.sin(w[:, 0] / 4), torch.cos(w[:, 0] / 4)], -1),
                               rtol=1e-6, atol=0)  # fmt: skip


@methods
def test_located_as_exactly_as_the_dtype_gives(method):
    """On the solution that the method has: its own state there is on the event to rounding."""
    y0, _, p = DRIVEN

    def event(t, y, p):
        return y[..., 0] * y[..., 1] + 0.02 * torch.cos(t)

    _, found = odeint(driven, y0, tensor(0.0, 3.0), (p,), method, events=event)
    assert int(found.counts) >= 1
    for k in range(int(found.counts)):
        assert float(event(found.t[k], found.y[k], p).abs()) < 1e-13


def test_backwards_in_time():
    args = tensor(1.0), tensor(3.0)
    _, found = odeint(decay, tensor(1.0), tensor(0.0, -2.0), args, "dop853", 1e-11, 1e-11, events=left)
    torch.testing.assert_close(found.t, -torch.log(tensor(3.0)), rtol=1e-9, atol=0)


def test_none_at_the_start_and_none_twice():
    """A start on the event does not count, nor does the restart of a ball that has just left the ground."""
    y0 = tensor(0.0, 3.0)
    _, found = odeint(fall, y0, tensor(0.0, 5.0), (tensor(10.0),), "radau", 1e-8, 1e-8, events=height)
    assert found.counts == 1
    torch.testing.assert_close(found.t, tensor(0.6), rtol=1e-6, atol=0)


def test_scipys_attributes():
    def event(t, y, g):
        return y[..., 0]

    event.terminal, event.direction = True, -0.5
    y, found = odeint(fall, tensor(1.0, 0.0), tensor(0.0, 5.0), (tensor(10.0),), events=event)
    assert bool(y[1].isnan().all()) and found.counts == 1


@methods
def test_an_event_that_does_not_occur(method):
    args = tensor(0.5), tensor(-1.0)
    y, found = odeint(decay, tensor(1.0), tensor(0.0, 1.0), args, method, events=left)
    assert found.t.shape == (1,) and found.y.shape == (1, 1) and found.counts == 0
    assert bool(found.t.isnan().all()) and bool(found.y.isnan().all()) and bool(y.isfinite().all())
    with pytest.raises(ConvergenceError, match="event 0 does not occur for the system.*required"):
        odeint(decay, tensor(1.0), tensor(0.0, 1.0), args, method, events=Event(left, required=True))


@pytest.mark.parametrize("kind", ["cubic", "step"])
def test_no_derivative_without_a_slope(kind):
    """Located all the same; differentiated, an error, and never a nan."""

    def event(t, y, rate):
        g = y[..., 0] - 0.5
        return g**3 if kind == "cubic" else torch.sign(g)

    def solve(rate, events=event):
        return odeint(lambda t, y, r: -r * y, tensor(1.0), tensor(0.0, 2.0), (rate,), "dop853", events=events)[1]

    torch.testing.assert_close(solve(tensor(1.0)).t, torch.log(tensor(2.0)), rtol=1e-5, atol=0)
    leaf = tensor(1.0).requires_grad_()
    with pytest.raises(SingularMatrixError, match="event 0 has no derivative.*no slope in time"):
        solve(leaf).t.sum().backward()
    with pytest.raises(SingularMatrixError, match="no slope"):
        dn.jvp(solve, (tensor(1.0),), (tensor(1.0),))


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (lambda t, y, *p: y, StructureError, r"one number a sample, torch.float64 \(\): got torch.float64 \(1,\)"),
        (lambda t, y, *p: y[..., 0].float(), StructureError, "float32"),
        (lambda t, y, *p: torch.log(0.5 - t) + 0 * y[..., 0], ConvergenceError, "nan or infinite for the system"),
        (3.0, DualInputError, "float"),
    ],
)
def test_what_is_refused(event, error, words):
    with pytest.raises(error, match=words):
        odeint(decay, tensor(1.0), tensor(0.0, 1.0), (tensor(1.0), tensor(0.5)), events=event)


def test_bad_options_of_an_event():
    for given in ({"direction": 2}, {"terminal": -1}):
        with pytest.raises(DualInputError, match="an event's"):
            Event(left, **given)


def test_what_an_event_captures_is_not_lost():
    level = tensor(0.5).requires_grad_()
    with pytest.raises(TangentLostError, match="requires grad"):
        odeint(lambda t, y: -y, tensor(1.0), tensor(0.0, 1.0), events=lambda t, y: y[..., 0] - level[0])
