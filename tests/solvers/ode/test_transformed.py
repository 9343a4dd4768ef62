"""Inside torch.func's transforms, nested or not."""

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import TangentLostError, UnsupportedOpError
from dualnn.solvers import odeint
from tests.solvers.ode.problems import DRIVEN, F64, METHODS, driven

Y0, _, P = DRIVEN
T = torch.tensor([0.0, 0.15, 0.2], dtype=F64)
FIXED = {"step_size": 0.1}


def end(p, y0=Y0, t=T, method="radau", **more):
    return odeint(driven, y0, t, (p,), method, options=FIXED, **more)[-1]


@pytest.mark.parametrize("method", METHODS)
def test_first_and_second_derivatives(method):
    def value(p):
        return end(p, method=method)

    expected, second = dn.jacobian(value, P), dn.hessian(lambda p: value(p).sum(), P)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(value)(P), expected, rtol=1e-11, atol=1e-13)
    for outer, inner in (
        (torch.func.jacfwd, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacrev),
        (torch.func.jacrev, torch.func.jacfwd),
    ):
        found = outer(inner(lambda p: value(p).sum()))(P)
        torch.testing.assert_close(found, second, rtol=1e-8, atol=1e-10)


def test_all_arguments_and_vmap():
    mass = torch.tensor([[2.0, 0.3], [0.0, 1.0]], dtype=F64)

    def value(y0, t, p, m):
        return end(p, y0, t, mass=m).sum()

    leaves = [x.clone().requires_grad_() for x in (Y0, T, P, mass)]
    wanted = torch.autograd.grad(value(*leaves), leaves)
    found = torch.func.grad(value, (0, 1, 2, 3))(Y0, T, P, mass)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    many = torch.stack([P, 2 * P, -P])
    torch.testing.assert_close(torch.vmap(end)(many), torch.stack([end(p) for p in many]), rtol=1e-13, atol=0)
    starts = torch.stack([Y0, 2 * Y0])
    torch.testing.assert_close(torch.vmap(lambda y0: end(P, y0))(starts), torch.stack([end(P, y0) for y0 in starts]))
    slopes = torch.vmap(torch.func.grad(lambda p: end(p).sum()))(many)
    alone = torch.stack([torch.func.grad(lambda p: end(p).sum())(p) for p in many])
    torch.testing.assert_close(slopes, alone, rtol=1e-12, atol=1e-13)


def test_autograd_outside():
    leaf = P.clone().requires_grad_()
    _, moved = torch.func.jvp(end, (leaf,), (torch.ones_like(P),))
    (slope,) = torch.autograd.grad(moved.sum(), leaf)
    torch.testing.assert_close(slope, dn.hessian(lambda p: end(p).sum(), P).sum(1), rtol=1e-9, atol=1e-10)


def push(fn):
    return lambda p: torch.func.jvp(fn, (p,), (torch.ones_like(p),))[1]


@pytest.mark.parametrize("outer", [torch.func.grad, torch.func.vmap, push])
@pytest.mark.parametrize("inner", [None, torch.func.grad, torch.func.vmap, push])
def test_what_is_captured_is_not_lost(outer, inner):
    """By the outer transform, also from within another."""

    def captured(p):
        def value(y0):
            return odeint(lambda t, y: -p * y, y0, T)[-1].sum()

        y0 = torch.ones(1, dtype=F64)
        return value(y0) if inner is None else inner(value)(y0[None] if inner is torch.func.vmap else y0).sum()

    with pytest.raises(TangentLostError, match="or that torch.vmap runs over"):
        outer(captured)(P if outer is torch.func.vmap else P[0])


def test_what_autograd_under_the_transforms_differentiates_is_not_lost():
    leaf = P[:1].clone().requires_grad_()
    with pytest.raises(TangentLostError, match="not among its arguments"):
        torch.func.grad(lambda y0: odeint(lambda t, y: -leaf * y, y0, T)[-1].sum())(torch.ones(1, dtype=F64))


def test_a_modules_parameters_are_arguments():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=F64)

        def forward(self, t, y):
            return torch.tanh(self.layer(y))

    flow = Flow()
    slope = torch.func.grad(lambda y0: odeint(flow, y0, T, options=FIXED)[-1].sum())(Y0)
    leaf = Y0.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(odeint(flow, leaf, T, options=FIXED)[-1].sum(), leaf, create_graph=True)
    torch.testing.assert_close(slope, wanted)
    found, known = (torch.autograd.grad(x.sum(), list(flow.parameters()), allow_unused=True) for x in (slope, wanted))
    torch.testing.assert_close(found[0], known[0], rtol=1e-9, atol=1e-11)


def test_what_is_refused():
    with pytest.raises(UnsupportedOpError, match="events and full_output"):
        torch.func.grad(lambda p: odeint(driven, Y0, T, (p,), full_output=True)[0].sum())(P)
    with pytest.raises(UnsupportedOpError, match="not both"):
        dn.jvp(lambda q: torch.func.grad(lambda p: end(p, y0=q).sum())(P), (Y0,), (Y0,))
    with pytest.raises(UnsupportedOpError, match=r"dualnn\.jvp, which nests"):
        torch.func.jacfwd(torch.func.jacfwd(end))(P)
