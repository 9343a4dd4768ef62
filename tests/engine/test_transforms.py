"""The contract of jvp and jacobian: structures, directions with and without K, constants, errors."""

import collections

import pytest
import torch

import dualnn as dn
from dualnn.engine import DualShapeError, StructureError, UnknownNameError
from tests.engine.oracles import rand

F64 = torch.float64
X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
V = rand(7)(4, 3)
Pair = collections.namedtuple("Pair", "first second")


def test_one_tensor():
    out, pushed = dn.jvp(torch.sin, (X,), (V,))
    assert type(out) is torch.Tensor and torch.equal(out, X.sin())
    torch.testing.assert_close(pushed, V * X.cos())


def test_without_k_there_is_no_k():
    _, pushed = dn.jvp(torch.sin, (X,), (V[0],))
    assert pushed.shape == X.shape
    torch.testing.assert_close(pushed, V[0] * X.cos())
    _, scalar = dn.jvp(torch.exp, (torch.tensor(0.0),), (torch.tensor(2.0),))
    assert scalar.shape == () and float(scalar) == 2.0
    _, many = dn.jvp(torch.exp, (torch.tensor(0.0),), (torch.tensor([1.0, 2.0]),))
    assert torch.equal(many, torch.tensor([1.0, 2.0]))


def test_no_directions():
    out, pushed = dn.jvp(lambda x: (x.sin(), x.sum()), (X,), (X.new_zeros(0, 3),))
    assert pushed[0].shape == (0, 3) and pushed[1].shape == (0,) and torch.equal(out[0], X.sin())


def test_several_inputs():
    w = rand(8)(2, 3)
    t = rand(9)(4, 2, 3)
    out, pushed = dn.jvp(lambda x, w: w @ x, (X, w), (V, t))
    torch.testing.assert_close(pushed, V @ w.T + t @ X)
    assert out.shape == (2,) and pushed.shape == (4, 2)


@pytest.mark.parametrize("single", [False, True])
def test_structures(single):
    def fn(x):
        return {"a": (x * 2, [x.sum()]), "b": Pair(x**2, 3), "c": None, "d": "text"}

    v = V[0] if single else V
    out, pushed = dn.jvp(fn, (X,), (v,))
    assert torch.equal(out["a"][0], 2 * X) and isinstance(out["b"], Pair) and out["b"].second == 3
    assert isinstance(pushed["b"], Pair) and isinstance(pushed["a"][1], list)
    torch.testing.assert_close(pushed["a"][0], 2 * v)
    torch.testing.assert_close(pushed["a"][1][0], v.sum(-1))
    torch.testing.assert_close(pushed["b"].first, 2 * X * v)
    assert pushed["b"].second is None and out["c"] is None and pushed["d"] is None


def test_constants_and_integers():
    constant = torch.ones(2, dtype=F64)

    def fn(x):
        return x, constant, x.argmax(), (x > 0), torch.zeros_like(x), x.detach(), torch.floor(x)

    out, pushed = dn.jvp(fn, (X,), (V,))
    assert out[1] is constant
    for i, shape in {1: (4, 2), 4: (4, 3), 5: (4, 3), 6: (4, 3)}.items():
        assert pushed[i].shape == shape and not pushed[i].any() and pushed[i].dtype == F64
    assert pushed[2] is None and pushed[3] is None
    assert int(out[2]) == 2 and type(out[3]) is torch.Tensor


def test_an_output_that_is_the_input():
    out, pushed = dn.jvp(lambda x: x, (X,), (V,))
    assert torch.equal(out, X) and torch.equal(pushed, V)


def test_nothing_is_taped():
    leaf = X.clone().requires_grad_()
    with torch.no_grad():
        out, pushed = dn.jvp(lambda x: torch.exp(x) * x, (leaf,), (V,))
    assert not out.requires_grad and not pushed.requires_grad


@pytest.mark.parametrize(
    ("primals", "tangents", "message"),
    [
        (X, X, "tuples"),
        ((X,), X, "tuples"),
        ([X], [X], "tuples"),
        ((X,), (X, X), "as many"),
        ((), (), "as many"),
        ((X,), (V[:, :2],), "does not fit"),
        ((X, X), (V, V[:2]), r"K = \[4, 2\]"),
        ((X, X), (V, X), "either all"),
        ((X.long(),), (X.long(),), "floating point"),
        ((X,), (V.float(),), "float32"),
        ((1.0,), (1.0,), "float"),
        ((X,), (None,), "NoneType"),
    ],
)
def test_wrong_calls(primals, tangents, message):
    with pytest.raises(DualShapeError, match=message):
        dn.jvp(lambda *x: x[0], primals, tangents)


def test_dense_jacobian():
    w = rand(8)(2, 3)
    torch.testing.assert_close(dn.jacobian(lambda x: w @ x, X), w)
    matrix = rand(8)(2, 3)
    full = dn.jacobian(lambda m: m.T @ m, matrix)
    assert full.shape == (3, 3, 2, 3)
    torch.testing.assert_close(full, torch.autograd.functional.jacobian(lambda m: m.T @ m, matrix))
    assert dn.jacobian(torch.sin, torch.tensor(0.0)).shape == ()
    assert dn.jacobian(lambda x: x.sum(), X).shape == (3,)
    assert dn.jacobian(lambda x: x.sum(), torch.zeros(0)).shape == (0,)
    assert dn.jacobian(lambda x: x * 2, torch.zeros(0, 2)).shape == (0, 2, 0, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_chunks(chunk):
    def fn(x):
        return torch.outer(x, x.sin()), x.prod(), x.argmax()

    whole, parts = dn.jacobian(fn, X), dn.jacobian(fn, X, chunk=chunk)
    assert isinstance(parts, tuple) and whole[2] is None and parts[2] is None
    for a, b in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert whole[0].shape == (3, 3, 3) and whole[1].shape == (3,)


def test_jacobian_structures_of_outputs():
    out = dn.jacobian(lambda x: {"a": x * 2, "b": [x.sum(), torch.ones(2)]}, X)
    torch.testing.assert_close(out["a"], 2 * torch.eye(3, dtype=F64))
    assert out["b"][0].shape == (3,) and out["b"][1].shape == (2, 3) and not out["b"][1].any()


def test_elementwise_jacobian():
    slope = dn.jacobian(lambda x: x * x.sin(), X, structure="elementwise")
    torch.testing.assert_close(slope, X.sin() + X * X.cos())
    assert dn.jacobian(lambda x: x * 2, torch.zeros(2, 3), structure="elementwise").shape == (2, 3)
    before = torch.get_rng_state()
    dn.jacobian(torch.sin, X, structure="elementwise")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "mixing", [lambda x: x.softmax(0), lambda x: x - x.mean(), lambda x: x.flip(0), lambda x: x.cumsum(0)]
)
def test_a_function_that_mixes_is_not_elementwise(mixing):
    with pytest.raises(StructureError, match="not elementwise"):
        dn.jacobian(mixing, X, structure="elementwise")


def test_elementwise_needs_the_same_shape():
    for fn in (lambda x: x.sum(), lambda x: (x, x)):
        with pytest.raises(StructureError, match="maps"):
            dn.jacobian(fn, X, structure="elementwise")


def test_wrong_jacobian_calls():
    with pytest.raises(UnknownNameError, match="did you mean 'dense'"):
        dn.jacobian(torch.sin, X, structure="dens")
    with pytest.raises(DualShapeError, match="chunk"):
        dn.jacobian(torch.sin, X, chunk=0)
    with pytest.raises(DualShapeError, match="int64"):
        dn.jacobian(lambda x: x, X.long())


def test_second_derivative_by_nesting():
    def fn(x):
        return torch.exp(x[0] * x[1]) + x[2] ** 3 * x[0]

    hessian = dn.jacobian(lambda x: dn.jacobian(fn, x), X)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(fn, X))
    third = dn.jacobian(lambda x: dn.jacobian(lambda x: dn.jacobian(fn, x), x), X)
    torch.testing.assert_close(
        third,
        torch.autograd.functional.jacobian(lambda x: torch.autograd.functional.hessian(fn, x, create_graph=True), X),
    )
    slope = dn.jacobian(lambda x: dn.jacobian(torch.tanh, x, structure="elementwise"), X, structure="elementwise")
    torch.testing.assert_close(slope, -2 * X.tanh() * (1 - X.tanh() ** 2))


def test_newton_loop_with_a_data_dependent_stop():
    """x = cos(a x): code that autograd would have to unroll, with a stop that looks at values."""

    def solve(a):
        x = torch.ones_like(a)
        for _ in range(100):
            step = (x - torch.cos(a * x)) / (1 + a * torch.sin(a * x))
            x = x - step
            if float(step.abs().max()) == 0.0:
                break
        return x

    x, slope = dn.jvp(solve, (X.abs(),), (torch.ones_like(X),))
    a = X.abs()
    torch.testing.assert_close(slope, -x * torch.sin(a * x) / (1 + a * torch.sin(a * x)), rtol=1e-12, atol=1e-14)


def test_elimination_by_hand():
    """Gaussian elimination with pivoting, written as loops over a matrix in place."""

    def solve(a, b):
        a, b, n = a.clone(), b.clone(), len(b)
        for i in range(n):
            p = i + int(a[i:, i].abs().argmax())
            order = list(range(n))
            order[i], order[p] = order[p], order[i]
            a, b = a[order], b[order]
            for j in range(i + 1, n):
                factor = a[j, i] / a[i, i]
                a[j] = a[j] - factor * a[i]
                b[j] = b[j] - factor * b[i]
        x = torch.zeros_like(b)
        for i in reversed(range(n)):
            x[i] = (b[i] - (a[i, i + 1 :] * x[i + 1 :]).sum()) / a[i, i]
        return x

    draw = rand(3)
    a, b, da, db = draw(3, 3), draw(3), draw(2, 3, 3), draw(2, 3)
    x, dx = dn.jvp(solve, (a, b), (da, db))
    torch.testing.assert_close(x, torch.linalg.solve(a, b))
    expected = torch.linalg.solve(a, (db - da @ x).unsqueeze(-1)).squeeze(-1)  # A dx = db - dA x
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dn.jvp(torch.linalg.solve, (a, b), (da, db))[1], expected)


def test_qr_of_numbers_page():
    base, direction = torch.tensor([[1.0, 2], [3, 4]], dtype=F64), torch.tensor([[1.0, 0], [0, 0]], dtype=F64)
    _, (_, dr) = dn.jvp(lambda a: tuple(torch.linalg.qr(a)), (base,), (direction,))
    assert float(dr[0, 0].abs()) == pytest.approx(10**-0.5)
