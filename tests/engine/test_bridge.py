"""Local functions inside every way of differentiating: backward of all orders, torch.func, duals of all levels."""

import pytest
import torch
from torch import Tensor

import dualnn as dn
from dualnn.engine import StructureError, TangentLostError, UnsupportedOpError
from dualnn.engine.bridge import ClosedForm, Equation, Opaque, elementwise, slopes
from tests.engine.oracles import five_point, rand

# torch.func.jvp loads its decompositions with a deprecation warning about torch's own code.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def reference(x: Tensor, a: Tensor | float) -> Tensor:
    """y + a tanh(y) = x, by unrolled Newton in plain torch: every way of differentiating applies."""
    y = x
    for _ in range(30):
        t = torch.tanh(y)
        y = y - (y + a * t - x) / (1 + a * (1 - t * t))
    return y


def solve_in_place(x, a):
    """The same root by code that autograd cannot follow: no_grad, in place, a stop that depends on the data."""
    y = x.detach().clone() if not isinstance(x, dn.DualTensor) else x.clone()
    y = y.expand(torch.broadcast_shapes(x.shape, a.shape if isinstance(a, Tensor) else ())).clone()
    with torch.no_grad():
        for _ in range(100):
            t = torch.tanh(y)
            step = (y + a * t - x) / (1 + a * (1 - t * t))
            y -= step
            if bool((step.abs() < 1e-15).all()):
                break
    return y


def residual(y, x, a):
    return y + a * torch.tanh(y) - x


def formula(y, x, a):
    t = torch.tanh(y)
    slope = 1 / (1 + a * (1 - t * t))
    return (slope, -t * slope) if isinstance(a, Tensor) else (slope,)


LOCALS = {
    "ClosedForm": ClosedForm(solve_in_place, formula),
    "Equation": Equation(solve_in_place, residual),
    "Opaque": Opaque(solve_in_place),
}
X = rand(1)(4, 3)
A = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)  # per channel
OUT = rand(2)(4, 3)


@pytest.fixture(params=LOCALS)
def fn(request):
    local = LOCALS[request.param]
    return lambda *args: elementwise(local, *args)


def total(fn):
    return lambda x, a: (OUT * fn(x, a) ** 2).sum()


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_value(fn):
    close(fn(X, A), reference(X, A), 1e-13)
    assert type(fn(X, A)) is Tensor and not fn(X, A).requires_grad


def test_backward(fn):
    x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
    total(fn)(x, a).backward()
    expected = torch.func.grad(total(reference), argnums=(0, 1))(X, A)
    close(x.grad, expected[0])
    close(a.grad, expected[1])
    assert a.grad.shape == A.shape


def test_only_one_argument_asks_for_a_gradient(fn):
    for i in range(2):
        args = [X.clone(), A.clone()]
        args[i].requires_grad_()
        (got,) = torch.autograd.grad(total(fn)(*args), args[i])
        close(got, torch.func.grad(total(reference), argnums=i)(X, A))


def test_gradcheck_and_gradgradcheck(fn):
    x, a = X[:2, :2].clone().requires_grad_(), A[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(fn, (x, a))
    assert torch.autograd.gradgradcheck(fn, (x, a))


def test_third_order_by_backward(fn):
    def third(f):
        x = X[0].clone().requires_grad_()
        y = f(x, A).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sum()
        return g

    close(third(fn), third(reference), 1e-7)


def test_torch_func_grad_and_hessian(fn):
    close(torch.func.grad(total(fn))(X, A), torch.func.grad(total(reference))(X, A))
    x, a = X[0], A
    scalar = lambda f: lambda x: (f(x, a) ** 2).sum()  # noqa: E731
    close(torch.func.jacrev(torch.func.grad(scalar(fn)))(x), torch.func.hessian(scalar(reference))(x), 1e-8)

    def third(f):
        g = scalar(f)
        for _ in range(2):
            g = (lambda h: lambda x: torch.func.grad(h)(x).sum())(g)
        return torch.func.grad(g)(x)

    close(third(fn), third(reference), 1e-7)


def test_torch_func_vmap(fn):
    close(torch.vmap(fn, in_dims=(0, None))(X, A), reference(X, A), 1e-12)
    close(torch.vmap(fn, in_dims=(1, 0), out_dims=1)(X, A), reference(X, A), 1e-12)
    close(torch.vmap(fn, in_dims=(None, 0))(X, A.unsqueeze(0)), reference(X, A).unsqueeze(0), 1e-12)
    single = lambda f: lambda x: (f(x, A) ** 2).sum()  # noqa: E731
    close(torch.vmap(torch.func.grad(single(fn)))(X), torch.func.grad(single(reference))(X))


def test_torch_func_jvp(fn):
    v, w = rand(3)(4, 3), rand(4)(3)
    out, pushed = torch.func.jvp(fn, (X, A), (v, w))
    expected = five_point(lambda h: [reference(X + h * v, A + h * w)])[0]
    close(pushed, expected, 1e-8)
    close(out, reference(X, A), 1e-12)
    _, partial = torch.func.jvp(lambda x: fn(x, A), (X,), (v,))
    close(partial, five_point(lambda h: [reference(X + h * v, A)])[0], 1e-8)


def test_jvp_of_grad_and_grad_of_jvp(fn):
    v = rand(3)(3)
    scalar = lambda f: lambda x: (f(x, A) ** 2).sum()  # noqa: E731
    expected = torch.func.hessian(scalar(reference))(X[0]) @ v
    close(torch.func.jvp(torch.func.grad(scalar(fn)), (X[0],), (v,))[1], expected, 1e-8)
    close(torch.func.grad(lambda x: torch.func.jvp(scalar(fn), (x,), (v,))[1])(X[0]), expected, 1e-8)


def test_jvp_of_jvp_raises(fn):
    one = torch.ones_like(X)
    inner = lambda x: torch.func.jvp(lambda z: fn(z, A), (x,), (one,))[1]  # noqa: E731
    with pytest.raises(UnsupportedOpError, match="dualnn.jvp"):
        torch.func.jvp(inner, (X,), (one,))


def test_duals(fn):
    v, w = rand(3)(2, 4, 3), rand(4)(2, 3)
    out, pushed = dn.jvp(fn, (X, A), (v, w))
    close(out, reference(X, A), 1e-12)
    for k in range(2):
        close(pushed[k], five_point(lambda h, k=k: [reference(X + h * v[k], A + h * w[k])])[0], 1e-8)
    close(dn.jvp(lambda a: fn(X, a), (A,), (w,))[1][0], five_point(lambda h: [reference(X, A + h * w[0])])[0], 1e-8)


def test_nested_duals(fn):
    one = torch.ones(3, dtype=torch.float64)
    push = lambda f: lambda x: dn.jvp(f, (x,), (one,))[1]  # noqa: E731
    ours, theirs = lambda x: fn(x, A), lambda x: reference(x, A)
    for tol in (1e-10, 1e-9, 1e-7):
        ours, theirs = push(ours), push(theirs)
        close(ours(X[0]), theirs(X[0]), tol)


def test_mixed_partials_by_nested_duals(fn):
    mixed = lambda f: dn.jvp(lambda x: dn.jvp(lambda a: f(x, a), (A,), (A,))[1], (X[0],), (X[1],))[1]  # noqa: E731
    close(mixed(fn), mixed(reference), 1e-9)


def test_reverse_over_duals(fn):
    def gradient(f):
        x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
        _, pushed = dn.jvp(lambda x, a: (OUT * f(x, a)).sum(), (x, a), (OUT, A))
        return torch.autograd.grad(pushed, (x, a))

    for ours, theirs in zip(gradient(fn), gradient(reference), strict=True):
        close(ours, theirs, 1e-8)


def test_jacobian(fn):
    close(dn.jacobian(lambda x: fn(x, A), X, structure="elementwise"), slopes(reference, (X, A))[1][0])
    close(dn.jacobian(lambda a: fn(X[0], a), A), torch.diag(slopes(reference, (X[0], A))[1][1]))


def test_constants_are_constants(fn):
    x = X.clone().requires_grad_()
    fn(x, 0.5).sum().backward()
    close(x.grad, torch.func.grad(lambda x: reference(x, 0.5).sum())(X))
    assert dn.jvp(lambda x: fn(x, 0.5), (X,), (X,))[1].shape == X.shape
    close(torch.vmap(lambda x: fn(x, 0.5))(X), reference(X, 0.5), 1e-12)


def test_broadcasting_both_ways(fn):
    column, row = rand(5)(4, 1).requires_grad_(), (rand(6)(3) ** 2 + 0.1).requires_grad_()
    total(fn)(column, row).backward()
    expected = torch.func.grad(total(reference), argnums=(0, 1))(column.detach(), row.detach())
    close(column.grad, expected[0])
    close(row.grad, expected[1])
    scalar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    fn(scalar, A).sum().backward()
    assert scalar.grad.shape == ()


def test_the_same_tensor_twice(fn):
    x = (A * 0.7).clone().requires_grad_()
    fn(x, x).sum().backward()
    close(x.grad, torch.func.grad(lambda x: reference(x, x).sum())(A * 0.7))


def test_single_precision_and_autocast(fn):
    x = X.float().requires_grad_()
    fn(x, A.float()).sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(
        x.grad.double(), torch.func.grad(lambda x: reference(x, A).sum())(X), rtol=1e-4, atol=1e-4
    )


def test_empty(fn):
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    y = fn(x, A)
    y.sum().backward()
    assert y.shape == (0, 3) and x.grad.shape == (0, 3)


def test_a_value_that_is_its_argument():
    x = X.clone().requires_grad_()
    y = elementwise(ClosedForm(lambda x: x, lambda y, x: (torch.full_like(x, 3.0),)), x)
    y.sum().backward()
    assert y is not x and torch.equal(x.grad, torch.full_like(X, 3.0))


def test_a_backward_twice_differentiated_is_not_the_naive_one():
    """Multiplying by partials that are constants to autograd would lose the second derivative without a word."""
    x = X[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(elementwise(LOCALS["Opaque"], x, A).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), x)
    assert float(second.abs().min()) > 1e-3


@pytest.mark.parametrize("constant", [lambda x: torch.ones_like(x), lambda x: x.detach() * 2, lambda x: torch.floor(x)])
def test_opaque_code_that_cuts_raises(constant):
    with pytest.raises(TangentLostError, match="detach"):
        elementwise(Opaque(constant), X.clone().requires_grad_())
    assert torch.equal(elementwise(Opaque(constant, strict=False), X), constant(X))


def test_item_on_the_way_raises():
    with pytest.raises(TangentLostError, match="item"):
        elementwise(Opaque(lambda x: torch.tensor([v.item() for v in x])), torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("fn", [lambda x: x.sum(), lambda x: x[:2], lambda x: (x, x), lambda x: x.unsqueeze(0)])
def test_wrong_shapes_raise(fn):
    with pytest.raises(StructureError, match="dense"):
        elementwise(Opaque(fn), X.clone().requires_grad_())


def test_an_op_without_a_rule_is_named():
    with pytest.raises(UnsupportedOpError, match="bessel_j0"):
        elementwise(Opaque(torch.special.bessel_j0), X.clone().requires_grad_())


def test_memory_does_not_depend_on_the_iterations(fn):
    meters = pytest.importorskip("dualnn.training.meters")

    def peak(steps):
        def slow(x):
            y = x.clone()
            for _ in range(steps):
                y = y - (y + torch.tanh(y) - x) / 4
            return y

        local = {
            "op": Opaque(slow),
            "eq": Equation(slow, lambda y, x: y + torch.tanh(y) - x),
            "cf": ClosedForm(slow, lambda y, x: (1 / (2 - torch.tanh(y) ** 2),)),
        }
        found = []
        for one in local.values():
            x = rand(0)(2000).requires_grad_()
            with meters.LiveBytes() as live:
                elementwise(one, x).sum().backward()
            found.append(live.peak)
        return found

    peak(2)
    assert peak(5) == peak(200)


def test_one_node_is_saved():
    x = X.clone().requires_grad_()
    y = elementwise(LOCALS["Equation"], x, A)
    assert [n for n, _ in y.grad_fn.next_functions if n is not None][0].variable is x
