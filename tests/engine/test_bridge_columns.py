"""Functions with their whole Jacobian kept: every way of differentiating, any structure of outputs."""

import pytest
import torch

import dualnn as dn
from dualnn.engine import TangentLostError, UnsupportedOpError
from dualnn.engine.bridge_columns import dense
from tests.engine.oracles import five_point, rand

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

Y0 = torch.tensor([1.0, -0.5], dtype=torch.float64)
P = torch.tensor([0.8, 0.3, 1.2], dtype=torch.float64)


def reference(y, p):
    """Fifteen Euler steps of a damped nonlinear oscillator with three parameters."""
    q, v = y[0], y[1]
    for _ in range(15):
        q, v = q + 0.05 * v, v - 0.05 * (p[0] * q + p[1] * v + p[2] * q**3)
    return torch.stack([q, v])


def hidden(y, p):
    """The same under no_grad and in place."""
    with torch.no_grad():
        state = y.clone()
        for _ in range(15):
            q, v = state[0].clone(), state[1].clone()
            state[0] = q + 0.05 * v
            state[1] = v - 0.05 * (p[0] * q + p[1] * v + p[2] * q**3)
    return state


def fn(y, p):
    return dense(hidden, y, p)


def loss(f):
    return lambda y, p: (f(y, p) ** 2 * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum()


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_value_and_backward():
    y, p = Y0.clone().requires_grad_(), P.clone().requires_grad_()
    close(fn(Y0, P), reference(Y0, P), 1e-14)
    loss(fn)(y, p).backward()
    for got, expected in zip((y.grad, p.grad), torch.func.grad(loss(reference), argnums=(0, 1))(Y0, P), strict=True):
        close(got, expected)


def test_gradcheck_and_gradgradcheck():
    y, p = Y0.clone().requires_grad_(), P.clone().requires_grad_()
    assert torch.autograd.gradcheck(fn, (y, p)) and torch.autograd.gradgradcheck(fn, (y, p))


def test_third_order():
    def third(f):
        p = P.clone().requires_grad_()
        out = loss(f)(Y0, p)
        for _ in range(3):
            (g,) = torch.autograd.grad(out, p, create_graph=True)
            out = g.sum()
        return g

    close(third(fn), third(reference), 1e-7)


def test_torch_func():
    close(torch.func.jacrev(fn, argnums=1)(Y0, P), torch.func.jacrev(reference, argnums=1)(Y0, P))
    hessian = torch.func.hessian(loss(reference), argnums=1)(Y0, P)
    close(torch.func.jacrev(torch.func.grad(loss(fn), argnums=1), argnums=1)(Y0, P), hessian)
    batch = torch.stack([Y0, Y0 * 2, Y0 - 1])
    close(torch.vmap(fn, in_dims=(0, None))(batch, P), torch.vmap(reference, in_dims=(0, None))(batch, P))
    per_item = torch.vmap(torch.func.grad(loss(fn), argnums=1), in_dims=(0, None))
    close(per_item(batch, P), torch.vmap(torch.func.grad(loss(reference), argnums=1), in_dims=(0, None))(batch, P))
    v = rand(3)(3)
    close(torch.func.jvp(lambda p: fn(Y0, p), (P,), (v,))[1], five_point(lambda h: [reference(Y0, P + h * v)])[0], 1e-8)
    close(torch.func.jvp(lambda p: torch.func.grad(loss(fn), argnums=1)(Y0, p), (P,), (v,))[1], hessian @ v)


def test_jvp_of_jvp_raises():
    inner = lambda p: torch.func.jvp(lambda q: fn(Y0, q), (p,), (P,))[1]  # noqa: E731
    with pytest.raises(UnsupportedOpError, match="dualnn.jvp"):
        torch.func.jvp(inner, (P,), (P,))


def test_duals_and_nested_duals():
    v, w = rand(3)(4, 2), rand(4)(4, 3)
    out, pushed = dn.jvp(fn, (Y0, P), (v, w))
    for k in range(4):
        close(pushed[k], five_point(lambda h, k=k: [reference(Y0 + h * v[k], P + h * w[k])])[0], 1e-8)
    second = lambda f: dn.jacobian(lambda p: dn.jacobian(lambda q: f(Y0, q), p), P)  # noqa: E731
    close(second(fn), second(reference))
    mixed = lambda f: dn.jacobian(lambda y: dn.jacobian(lambda q: f(y, q), P), Y0)  # noqa: E731
    close(mixed(fn), mixed(reference))


def test_reverse_over_duals():
    def gradient(f):
        p = P.clone().requires_grad_()
        _, pushed = dn.jvp(lambda q: loss(f)(Y0, q), (p,), (P,))
        return torch.autograd.grad(pushed, p)[0]

    close(gradient(fn), gradient(reference))


def test_structures_and_constants():
    def several(x, n, flag):
        assert flag == "yes"
        with torch.no_grad():
            return {"sum": (x * n).sum(), "pair": (x.flip(0) ** 2, [x.argmax(), 3])}

    x = P.clone().requires_grad_()
    out = dense(several, x, 4, "yes")
    assert int(out["pair"][1][0]) == 2 and out["pair"][1][1] == 3
    (out["sum"] + (out["pair"][0] * Y0.new_tensor([1.0, 2.0, 3.0])).sum()).backward()
    close(x.grad, 4 + 2 * P * Y0.new_tensor([3.0, 2.0, 1.0]))
    _, pushed = dn.jvp(lambda x: dense(several, x, 4, "yes"), (P,), (torch.ones_like(P),))
    close(pushed["sum"], P.new_tensor(12.0))
    assert pushed["pair"][1][0] is None


def test_shapes():
    matrix = rand(1)(2, 3).requires_grad_()
    dense(lambda m: (m.T @ m).sum(), matrix).backward()
    close(matrix.grad, 2 * matrix.detach().sum(1, keepdim=True).expand(2, 3))
    scalar = torch.tensor(2.0, requires_grad=True)
    dense(lambda s: torch.stack([s, s * s]), scalar).sum().backward()
    assert float(scalar.grad) == 5.0
    empty = torch.zeros(0, requires_grad=True)
    dense(lambda e, s: e.sum() + s, empty, scalar).backward()
    assert empty.grad.shape == (0,)


def test_an_output_that_is_an_input():
    x = P.clone().requires_grad_()
    out = dense(lambda x: (x, x * 2), x)
    out[0].sum().backward()
    assert out[0] is not x and torch.equal(x.grad, torch.ones_like(P))


@pytest.mark.parametrize("cut", [lambda x: torch.ones(2), lambda x: x.detach() * 2, lambda x: torch.round(x)])
def test_a_cut_raises(cut):
    with pytest.raises(TangentLostError, match="detach"):
        dense(cut, P.clone().requires_grad_())


def test_memory_does_not_depend_on_the_iterations():
    meters = pytest.importorskip("dualnn.training.meters")

    def peak(steps):
        def euler(p):
            y = torch.ones_like(p)
            for _ in range(steps):
                y = y - 1e-3 * p * y
            return y

        p = P.clone().requires_grad_()
        with meters.LiveBytes() as live:
            dense(euler, p).sum().backward()
        return live.peak

    peak(2)
    assert peak(5) == peak(300)
