"""`Root`, `ArgMin`, `LeastSquares` and `LinearSolve` beyond what every layer must do (`test_everywhere.py`)."""

import pytest
import torch
from scipy import linalg, optimize
from torch import nn

import dualnn as dn
from dualnn.engine.errors import (
    ConvergenceError,
    DualInputError,
    DualShapeError,
    SingularMatrixError,
    StructureError,
    UnknownNameError,
)
from dualnn.layers import ArgMin, LeastSquares, LinearSolve, Root

F64 = torch.float64


class Coupled(nn.Module):
    """Three equations with one solution: monotone."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, z, x):
        return 2 * z + 0.5 * torch.tanh(self.inner(z)) - x


class Valley(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, z, x):
        return (torch.cosh(z).log() + (z - self.inner(x)) ** 2).sum(-1)


class Fit(nn.Module):
    """Five residuals for two unknowns; the fit is not exact."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.linspace(0, 1, 5, dtype=F64))

    def forward(self, z, x):
        return z[:, :1] * torch.exp(-z[:, 1:] * self.t) - x


def data():
    x = 2 * torch.exp(-3 * torch.linspace(0, 1, 5, dtype=F64)) + 0.1 * torch.randn(4, 5, dtype=F64)
    return x.requires_grad_(), torch.ones(4, 2, dtype=F64)


SOLVING = {
    "root": (lambda **k: Root(Coupled(), **k), lambda: (torch.randn(4, 3, dtype=F64, requires_grad=True),)),
    "argmin": (lambda **k: ArgMin(Valley(), **k), lambda: (torch.randn(4, 3, dtype=F64, requires_grad=True),)),
    "least squares": (lambda **k: LeastSquares(Fit(), **k), data),
}
METHODS = {
    "root": [{"method": "broyden"}, {"jacobian": "krylov"}, {"differentiate": "one_step"}],
    "argmin": [{"method": "bfgs"}, {"method": "lbfgs"}, {"differentiate": "one_step"}],
    "least squares": [{"method": "gauss_newton"}],
}


def scipys(name, layer, inputs):
    """The same solutions by scipy."""
    x = inputs[0].detach()

    def value(z, i):
        return layer.module(torch.from_numpy(z)[None], x[i : i + 1]).detach()

    found = []
    for i in range(len(x)):
        if name == "root":
            found.append(optimize.fsolve(lambda z, i=i: value(z, i)[0].numpy(), [0.0] * 3, xtol=1e-13))
        elif name == "argmin":
            found.append(optimize.minimize(lambda z, i=i: float(value(z, i)), [0.0] * 3, tol=1e-12).x)
        else:
            found.append(optimize.least_squares(lambda z, i=i: value(z, i)[0].numpy(), [1.0, 1.0], xtol=1e-14).x)
    return torch.stack([torch.from_numpy(z) for z in found])


@pytest.mark.parametrize("name", SOLVING)
def test_values_are_scipys(name):
    make, inputs = SOLVING[name]
    layer, given = make(), inputs()
    torch.testing.assert_close(layer(*given).detach(), scipys(name, layer, given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVING)
def test_derivatives_of_both_orders(name):
    make, inputs = SOLVING[name]
    layer, given = make(), [t.detach()[:2] for t in inputs()]
    dn.gradcheck(lambda x: layer(x, *given[1:]), (given[0],), order=2)
    weights = [(k, p.detach()) for k, p in layer.named_parameters()]

    def of_weights(*values):
        named = {k: v for (k, _), v in zip(weights, values, strict=True)}
        return torch.func.functional_call(layer, named, tuple(given))

    dn.gradcheck(of_weights, tuple(p for _, p in weights), order=1)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, several in METHODS.items() for o in several], ids=str)
def test_other_methods_give_the_same(name, options):
    make, inputs = SOLVING[name]
    given, found = inputs(), []
    torch.manual_seed(3)
    layer = make()
    torch.manual_seed(3)
    for one in (layer, make(**options)):
        z = one(*given)
        found.append([z, *torch.autograd.grad(z.square().sum(), [given[0], *one.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVING)
def test_images_and_starts_of_another_shape(name):
    class OfImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, z, x):
            residual = z + self.scale * torch.tanh(z) - x
            return residual if name != "argmin" else (residual**2).flatten(1).sum(1)

    kind = {"root": Root, "argmin": ArgMin, "least squares": LeastSquares}[name]
    layer, x = kind(OfImages()), torch.randn(2, 1, 3, 3, dtype=F64, requires_grad=True)
    z = layer(x, torch.zeros(2, 1, 3, 3, dtype=F64))
    assert z.shape == x.shape
    slope = 1 / (1 + 0.5 * (1 - torch.tanh(z.detach()) ** 2))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], slope)


@pytest.mark.parametrize("name", SOLVING)
def test_a_sample_that_fails_does_not_spoil_the_others(name):
    make, inputs = SOLVING[name]
    given = [t.detach().clone() for t in inputs()]
    good = make(on_failure="nan")
    z = good(*given)
    given[0][1] = torch.nan
    torch.manual_seed(0)
    with pytest.raises(ConvergenceError, match="1 of 4 samples"):
        good.on_failure = "raise"
        good(*given)
    good.on_failure = "nan"
    bad = good(*given)
    assert bool(bad[1].isnan().all())
    torch.testing.assert_close(bad[[0, 2, 3]], z[[0, 2, 3]])


@pytest.mark.parametrize("name", SOLVING)
def test_an_empty_batch_is_empty_and_teaches_nothing(name):
    make, inputs = SOLVING[name]
    layer, given = make(), [t.detach()[:0] for t in inputs()]
    z = layer(*given)
    assert z.shape == (0, 2 if name == "least squares" else 3)
    z.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", SOLVING)
def test_bad_input_is_named(name):
    make, inputs = SOLVING[name]
    layer, given = make(), inputs()
    with pytest.raises(DualInputError, match="int64: convert"):
        layer(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(DualInputError, match="floating point tensor, got list"):
        layer([1.0])
    with pytest.raises(DualShapeError, match=r"needs a batch axis and unknowns"):
        layer(given[0], torch.zeros(3, dtype=F64))
    with pytest.raises(UnknownNameError, match="unknown method 'nwton'"):
        make(method="nwton")
    with pytest.raises(UnknownNameError, match="on_failure"):
        make(on_failure="rise")
    layer.module = nn.Bilinear(given[-1].shape[1], given[0].shape[1], 7).double()
    if name != "least squares":
        with pytest.raises(StructureError, match="got \\(4, 7\\)"):
            layer(*given)


@pytest.mark.parametrize("name", SOLVING)
def test_the_repr_tells_the_settings_and_frozen_weights_stay(name):
    make, inputs = SOLVING[name]
    layer, given = make(tol=1e-8, max_steps=77, on_failure="last"), inputs()
    assert "tol=1e-08, max_steps=77" in repr(layer) and "on_failure='last'" in repr(layer)
    for p in layer.parameters():
        p.requires_grad_(False)
    layer(*given).sum().backward()
    assert given[0].grad is not None and all(p.grad is None for p in layer.parameters())


# -- linear systems ---------------------------------------------------------------------------------------------------

SCIPYS = {
    "general": lambda A, b: linalg.solve(A, b),
    "spd": lambda A, b: linalg.solve(A, b, assume_a="pos"),
    "lower": lambda A, b: linalg.solve_triangular(A, b, lower=True),
    "upper": lambda A, b: linalg.solve_triangular(A, b, lower=False),
}


def learned(structure):
    layer = LinearSolve(4, structure).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


class Given(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("structure", SCIPYS)
def test_a_learned_matrix(structure):
    layer, b = learned(structure), torch.randn(3, 5, 4, dtype=F64)
    A, z = layer.dense().detach(), layer(b)
    expected = SCIPYS[structure](A.numpy(), b.reshape(-1, 4).numpy().T).T
    torch.testing.assert_close(z.detach(), torch.from_numpy(expected).reshape(b.shape))
    if structure == "spd":
        assert bool((torch.linalg.eigvalsh(A) > 0).all()) and torch.equal(A, A.T)
    dn.gradcheck(layer, (b[0],), order=1)
    ours = torch.autograd.grad(z.square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad((b @ torch.linalg.inv(layer.dense()).T).square().sum(), list(layer.parameters()))
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", SCIPYS)
def test_matrices_of_a_module(structure):
    layer, b = LinearSolve(Given(), structure), torch.randn(5, 4, dtype=F64)
    A = torch.randn(5, 4, 4, dtype=F64) / 4 + torch.eye(4, dtype=F64)
    A = {"general": A, "spd": A @ A.mT, "lower": A.tril(), "upper": A.triu()}[structure]
    expected = [SCIPYS[structure](a.numpy(), c.numpy()) for a, c in zip(A, b, strict=True)]
    torch.testing.assert_close(layer(b, A), torch.stack([torch.from_numpy(e) for e in expected]))
    symmetric = {"spd": lambda a: (a + a.mT) / 2, "lower": torch.tril, "upper": torch.triu}.get(structure, lambda a: a)
    dn.gradcheck(lambda b, a: layer(b, symmetric(a)), (b[:2], A[:2]), order=2)
    torch.testing.assert_close(layer(b, A[0]), torch.linalg.solve(A[0], b.T).T)  # one for all


@pytest.mark.parametrize("structure", SCIPYS)
def test_singular_matrices(structure):
    A = torch.eye(3, dtype=F64).repeat(4, 1, 1)
    A[2, 1, 1] = 0
    b = torch.ones(4, 3, dtype=F64, requires_grad=True)
    with pytest.raises(SingularMatrixError, match="batch indices 2"):
        LinearSolve(Given(), structure)(b, A)
    z = LinearSolve(Given(), structure, on_failure="nan")(b, A)
    assert bool(z[2].isnan().all()) and torch.equal(z[[0, 1, 3]], torch.ones(3, 3, dtype=F64))
    z[[0, 1, 3]].sum().backward()
    assert torch.equal(b.grad[[0, 1, 3]], torch.ones(3, 3, dtype=F64))


def test_empty_batches_and_half_precision_of_linear_systems():
    layer = LinearSolve(3)
    assert layer(torch.zeros(0, 3)).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_bad_input_of_linear_systems_is_named():
    with pytest.raises(UnknownNameError, match="did you mean 'lower'"):
        LinearSolve(3, "lowr")
    with pytest.raises(UnknownNameError, match="on_failure"):
        LinearSolve(3, on_failure="last")
    with pytest.raises(DualInputError, match="integer >= 1, got 0"):
        LinearSolve(0)
    with pytest.raises(DualInputError, match="needs the second input"):
        LinearSolve(Given())(torch.ones(2, 3))
    with pytest.raises(DualInputError, match="takes no second input"):
        LinearSolve(3)(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(DualInputError, match="int64"):
        LinearSolve(3)(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(DualShapeError, match=r"\(\*, 3\), got \(2, 4\)"):
        LinearSolve(3)(torch.ones(2, 4))
    with pytest.raises(DualShapeError, match="the matrix must be"):
        LinearSolve(Given())(torch.ones(2, 3), torch.ones(5, 3, 3))
    with pytest.raises(DualShapeError, match="convert one"):
        LinearSolve(3)(torch.ones(2, 3, dtype=F64))
    with pytest.raises(DualInputError, match="comes from a module"):
        LinearSolve(Given()).dense()
