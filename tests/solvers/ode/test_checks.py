"""Jacobians that the user gives."""

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.solvers import odeint
from tests.solvers.ode.problems import F64, ROBERTSON, STIFF, robertson

stiff = pytest.mark.parametrize("method", STIFF)
T = torch.tensor([0.0, 0.4], dtype=F64)


def jac(t, y, p):
    a, b, c = y.unbind(-1)
    p1, p2, p3 = p.unbind(-1)
    zero = torch.zeros_like(a)
    rows = [
        torch.stack([-p1 + zero, p2 * c, p2 * b], -1),
        torch.stack([p1 + zero, -p2 * c - 2 * p3 * b, -p2 * b], -1),
        torch.stack([zero, 2 * p3 * b, zero], -1),
    ]
    return torch.stack(rows, -2)


def solve(method, jac, p=ROBERTSON.p, y0=ROBERTSON.y0, fn=robertson):
    return odeint(fn, y0, T, (p,), method, 1e-6, 1e-10, jac=jac, full_output=True)


@stiff
def test_a_jacobian_of_ones_own_serves_the_values(method):
    calls = []

    def counted(t, y, p):
        calls.append(t)
        return jac(t, y, p)

    own, stats = solve(method, counted)
    engine, same = solve(method, None)
    torch.testing.assert_close(own, engine, rtol=1e-9, atol=1e-15)
    assert len(calls) == stats.jacobians and int(stats.steps) == int(same.steps)
    p = torch.stack([ROBERTSON.p, ROBERTSON.p * 2])
    moved = [
        dn.jvp(lambda p, j=j: solve(method, j, p, ROBERTSON.y0.expand(2, 3))[0], (p,), (torch.ones_like(p),))[1]
        for j in (jac, None)
    ]
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: -jac(*a), r"disagrees with fn's derivative at 7 of 9 entries: at \[0, 0\]"),
        (lambda *a: jac(*a).mT, "component i in y's component j"),
        (lambda *a: jac(*a) + torch.diag(torch.tensor([1e-5, 0, 0], dtype=F64)), "1 of 9"),
        (lambda *a: jac(*a)[:2], r"\(3, 3\), got torch.float64 \(2, 3\)"),
        (lambda *a: jac(*a).float(), "got torch.float32"),
        (lambda *a: None, "NoneType"),
    ],
)
def test_a_wrong_one_is_refused(wrong, words):
    with pytest.raises(StructureError, match=words):
        solve("radau", wrong)


def test_an_explicit_method_has_no_use_for_one():
    with pytest.raises(DualInputError, match="'dop853' is explicit"):
        solve("dop853", jac)


def test_a_matrix_is_no_function():
    with pytest.raises(DualInputError, match="jac must be a function"):
        solve("radau", jac(T[0], ROBERTSON.y0, ROBERTSON.p))


def test_it_gets_the_arguments_as_they_were_given():
    """A module's parameters are arguments inside; not so for jac."""

    class Chemistry(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, t, y, p):
            return self.factor * robertson(t, y, p)

    module = Chemistry()
    y, _ = solve("rodas5p", jac, fn=module)
    y[-1, 0].backward()
    slope = robertson(T[1], y[-1].detach(), ROBERTSON.p)
    torch.testing.assert_close(module.factor.grad, 0.4 * slope[0], rtol=1e-5, atol=0)
