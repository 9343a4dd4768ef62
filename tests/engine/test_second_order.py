"""`hessian`, `hvp` and `laplacian`; `jacobian` of a factorisation against torch.func."""

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import DualShapeError, UnknownNameError


def loss(x):
    return (torch.sin(x) * x.flip(0)).pow(3).sum() + torch.nn.functional.softplus(x).prod()


X = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)
H = torch.autograd.functional.hessian(loss, X)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_hessian(chunk):
    torch.testing.assert_close(dn.hessian(loss, X, chunk=chunk), H, rtol=1e-10, atol=1e-12)


def test_hessian_of_vectors_and_matrices():
    found = dn.hessian(lambda a: {"y": (a @ a).diagonal()}, torch.eye(2, dtype=torch.float64))["y"]
    assert found.shape == (2, 2, 2, 2, 2)
    assert found[0, 0, 0, 0, 0] == 2


@pytest.mark.parametrize("method", ["forward", "reverse"])
def test_hvp(method):
    v = torch.linspace(-1, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(dn.hvp(loss, X, v, method=method), H @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["forward", "reverse"])
def test_hvp_of_a_linear_function_is_zero(method):
    assert torch.equal(dn.hvp(torch.sum, X, X, method=method), torch.zeros_like(X))


def test_forward_hvp_sees_what_autograd_does_not():
    def hidden(x):
        with torch.no_grad():
            return (x**3).sum()

    torch.testing.assert_close(dn.hvp(hidden, X, torch.ones_like(X)), 6 * X)


def test_hvp_refuses_what_it_cannot_do():
    with pytest.raises(DualShapeError, match="needs a scalar function"):
        dn.hvp(torch.sin, X, X)
    with pytest.raises(DualShapeError, match="shape of x"):
        dn.hvp(loss, X, X[None])
    with pytest.raises(UnknownNameError, match="did you mean 'forward'"):
        dn.hvp(loss, X, X, method="foward")


@pytest.mark.parametrize("method", ["collapsed", "nested"])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_laplacian(chunk, method):
    found = dn.laplacian(loss, X, chunk=chunk, method=method)
    torch.testing.assert_close(found, H.trace(), rtol=1e-10, atol=1e-12)


# The first derivative is exactly zero at x = 0, the second is not: a zero tangent may still move.
FLAT = {
    "log": lambda x: torch.log(2 + x * x),
    "sqrt": lambda x: torch.sqrt(1 + x * x),
    "div": lambda x: 1 / (1 + x * x),
    "pow": lambda x: (1 + x**2) ** 3,
    "pow of pow": lambda x: torch.cos(x) ** 2.5,
    "atan2": lambda x: torch.atan2(1 + x * x, 2 + x),
    "asin": lambda x: torch.asin(x * x / 2),
    "hypot": lambda x: torch.hypot(1 + x * x, x),
    "xlogy": lambda x: torch.xlogy(x * x, 2 + x),
}


@pytest.mark.parametrize("name", FLAT)
def test_the_second_derivative_where_the_first_is_exactly_zero(name):
    fn, x = FLAT[name], torch.tensor(0.0, dtype=torch.float64)
    wanted = torch.autograd.functional.hessian(fn, x)
    torch.testing.assert_close(dn.hessian(fn, x), wanted)
    torch.testing.assert_close(dn.laplacian(fn, x), wanted)
    leaf = x.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(dn.jvp(fn, (leaf,), (torch.ones_like(x),))[1], leaf)
    torch.testing.assert_close(reverse, wanted)


def test_the_same_beside_an_infinite_derivative():
    def fn(x):
        return torch.sqrt(torch.stack([1 + x * x, x * 0]))[0]

    x = torch.tensor(0.0, dtype=torch.float64)
    assert float(dn.hessian(fn, x)) == 1


def test_laplacian_of_a_vector_field_keeps_its_structure():
    found = dn.laplacian(lambda x: (x**2, x.sum()), X)
    assert torch.equal(found[0], torch.full_like(X, 2.0)) and found[1] == 0


def test_a_chunk_must_be_positive():
    with pytest.raises(DualShapeError, match="at least 1"):
        dn.laplacian(loss, X, chunk=0)


def test_the_layer_norm_example_that_torch_gets_wrong():
    def f(t):
        return torch.nn.functional.layer_norm(torch.stack([-t, t]), (2,), eps=1.0)[0]

    t = torch.tensor(0.7, dtype=torch.float64)
    assert float(dn.hessian(f, t)) == pytest.approx(0.7749142079590942, rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("shape", [(16, 16), (4, 6, 6), (5, 3), (3, 5)], ids=str)
def test_the_jacobian_of_lu_equals_jacfwd(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ours, wanted in zip(dn.jacobian(torch.linalg.lu, a), torch.func.jacfwd(torch.linalg.lu)(a), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("shape", [(64, 64), (8, 16, 16)], ids=str)
def test_the_jacobian_of_a_large_lu_equals_jacfwd(shape):
    test_the_jacobian_of_lu_equals_jacfwd(shape)


def test_reverse_over_dual_where_torchs_own_gradient_is_wrong():
    """as_strided_scatter: torch sends the gradient of its first argument to the entries that are overwritten."""
    x, s, v, w = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (6, 4, 6, 6))

    def moved(x):
        def fn(x):
            return torch.as_strided_scatter(x * x, (s * s).reshape(2, 2), (2, 2), (2, 1), 1)

        return (dn.jvp(fn, (x,), (v[:6],))[1] * w).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(moved(leaf), leaf)
    expected = 2 * v * w * torch.tensor([1, 0, 0, 0, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
