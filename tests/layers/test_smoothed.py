"""Smoothed: unbiased for the smoothed function, with the variance it states, the same in forward and reverse mode."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils.checkpoint import checkpoint

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError, UnknownNameError, UnsupportedOpError
from dualnn.layers import Smoothed

# torch's forward AD loads decompositions with the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")

F64 = torch.float64
NORMAL = torch.distributions.Normal(0.0, 1.0)


def density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def estimates(layer: Smoothed, x: Tensor, keys: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values (keys, *y) and gradients (keys, *x) of independent estimates, of fixed keys."""
    leaf = x.expand(keys, *x.shape).clone().requires_grad_()
    # Samples of a batch are drawn apart, so that one call makes many estimates; a dense function has no batch.
    y = layer(leaf, key=0) if layer.structure != "dense" else torch.stack([layer(r, key=k) for k, r in enumerate(leaf)])
    (g,) = torch.autograd.grad((y * weights).sum(), leaf)
    return y.detach(), g


def assert_mean(found: Tensor, truth: Tensor) -> None:
    """Within four standard errors."""
    error = found.std(0) / math.sqrt(len(found)) + 1e-12
    worst = ((found.mean(0) - truth).abs() / error).max()
    assert worst < 4, f"{float(worst):.2f} standard errors"


def best_of(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1])


SIGMA = 0.7
X = torch.tensor([-1.3, -0.4, 0.0, 0.25, 2.0], dtype=F64)
PAIRS = torch.tensor([[0.3, -0.2], [1.0, 0.9]], dtype=F64)
GAP = (PAIRS[:, 0] - PAIRS[:, 1]) / (SIGMA * math.sqrt(2))
SLOPE = density(GAP) / (SIGMA * math.sqrt(2))
# fn, structure, x, smoothed value and gradient (of the sum) at SIGMA
CASES = {
    "sign": (torch.sign, "elementwise", X, torch.erf(X / SIGMA / math.sqrt(2)), 2 * density(X / SIGMA) / SIGMA),
    "relu": (
        torch.relu,
        "elementwise",
        X,
        X * NORMAL.cdf(X / SIGMA) + SIGMA * density(X / SIGMA),
        NORMAL.cdf(X / SIGMA),
    ),
    "square": (torch.square, "elementwise", X, X**2 + SIGMA**2, 2 * X),
    "argmax of two": (
        lambda x: best_of(x)[..., 0],
        "block",
        PAIRS,
        NORMAL.cdf(GAP),
        torch.stack([SLOPE, -SLOPE], -1),
    ),
    "whole": (lambda x: x.square().sum(), "dense", PAIRS, PAIRS.square().sum() + 4 * SIGMA**2, 2 * PAIRS),
}


@pytest.mark.filterwarnings("ignore:.*relative variance")
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_unbiased_for_the_smoothed_function(case, antithetic: bool) -> None:
    fn, structure, x, value, grad = case
    layer = Smoothed(fn, SIGMA, 4, antithetic, structure)
    values, grads = estimates(layer, x, 400 if structure == "dense" else 5000, torch.ones(()))
    assert_mean(values, value)
    assert_mean(grads, grad)


@pytest.mark.filterwarnings("ignore:.*relative variance")
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize(("structure", "n"), [("elementwise", 1), ("block", 5), ("dense", 10)])
def test_the_variance_law_of_a_linear_function(structure: str, n: int, antithetic: bool) -> None:
    x, keys, samples = torch.randn(2, 5, dtype=F64), 4000 if structure == "dense" else 20000, 3
    layer = Smoothed(lambda x: 3 * x, 0.1, samples, antithetic, structure)
    weights = torch.zeros(2, 5, dtype=F64)
    weights[0, 0] = 1  # the gradient of one output
    grads = estimates(layer, x, keys, weights)[1]
    truth = 3 * weights
    law = (truth.square().sum() + truth**2) / samples  # Var g_j = (|g|^2 + g_j^2) / samples
    if structure == "block":
        law[1] = 0
    if structure == "elementwise":
        law = 2 * truth**2 / samples
    squares = (grads - truth).square()
    assert_mean(squares, law)
    relative = squares.flatten(1).sum(1) / truth.square().sum()
    assert_mean(relative, torch.tensor(layer.relative_variance(n), dtype=F64))


def test_the_variance_at_a_step() -> None:
    a, samples = 2.0, 4
    layer = Smoothed(torch.sign, SIGMA, samples, structure="elementwise")
    grads = estimates(layer, X, 20000, torch.ones(()))[1]
    c = X.abs() / SIGMA
    g = a * density(c) / SIGMA
    law = (a**2 / (2 * SIGMA**2) * (c * density(c) + 1 - NORMAL.cdf(c)) - g**2) / samples
    assert_mean((grads - g).square(), law)


def test_antithetic_pairs_pay_for_the_value_and_for_even_functions() -> None:
    def spread(fn, antithetic: bool) -> tuple[float, float]:
        layer = Smoothed(fn, 0.5, 8 if antithetic else 16, antithetic, "elementwise")  # as many evaluations
        values, grads = estimates(layer, torch.zeros(1, dtype=F64), 2000, torch.ones(()))
        return float(values.var()), float(grads.var())

    assert spread(torch.sin, True)[0] < 1e-20 < spread(torch.sin, False)[0]  # odd: the value is exact
    assert spread(torch.cos, True)[1] < 1e-20 < spread(torch.cos, False)[1]  # even: the gradient is exact


@pytest.mark.filterwarnings("ignore:.*relative variance")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_reverse_give_the_same_estimate(case) -> None:
    fn, structure, x, *_ = case
    layer = Smoothed(fn, SIGMA, 3, structure=structure)
    f = lambda x: layer(x, key=7)  # noqa: E731
    v = torch.randn(4, *x.shape, dtype=F64)
    y, pushed = dn.jvp(f, (x,), (v,))
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    w = torch.randn_like(out)
    (g,) = torch.autograd.grad((out * w).sum(), leaf)
    torch.testing.assert_close(y, out.detach())
    torch.testing.assert_close((pushed * w).reshape(4, -1).sum(1), (v * g).reshape(4, -1).sum(1))
    jac = func.jacrev(f)(x)
    torch.testing.assert_close(func.jacfwd(f)(x), jac)
    torch.testing.assert_close(dn.jacobian(f, x), jac)
    torch.testing.assert_close(func.grad(lambda x: (f(x) * w).sum())(x), g)


@pytest.mark.parametrize("structure", ["elementwise", "block"])
def test_vmap_draws_for_every_sample(structure: str) -> None:
    layer, x = Smoothed(torch.sign, 1.0, 20, structure=structure), torch.full((6, 3), 0.4, dtype=F64)
    f = lambda x: layer(x, key=3)  # noqa: E731
    torch.testing.assert_close(func.vmap(f)(x), f(x))
    assert len(set(f(x).flatten().tolist())) > 3
    grads = func.vmap(func.grad(lambda x: f(x).sum()))(x)
    leaf = x.clone().requires_grad_()
    f(leaf).sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


def test_the_samples_of_backward_are_those_of_forward() -> None:
    count = 0

    def fn(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * x

    layer, x = Smoothed(fn, 0.5, 10, structure="elementwise"), torch.ones(3, dtype=F64, requires_grad=True)
    layer(x, key=1)
    count = 0
    y = layer(x, key=1)
    assert count == 20
    y.sum().backward()
    assert count == 20  # the evaluations of the forward pass serve
    again = x.detach().clone().requires_grad_()
    with torch.no_grad():
        value, count = layer(again, key=1), 0
    torch.testing.assert_close(value, y.detach(), rtol=0, atol=0)
    (slope,) = dn.jvp(lambda x: layer(x, key=1), (x.detach(),), (torch.ones(3, dtype=F64),))[1:]
    torch.testing.assert_close(slope, x.grad)


def test_keys_decide_and_nothing_else() -> None:
    layer = Smoothed(torch.sign, 1.0, 5, structure="elementwise", seed=3)
    x = torch.full((50,), 0.4)
    before = torch.get_rng_state()
    assert torch.equal(layer(x, key=1), layer(x, key=1)) and not torch.equal(layer(x, key=1), layer(x, key=2))
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second) and int(layer.calls) == 2
    assert torch.equal(before, torch.get_rng_state())
    twin = Smoothed(torch.sign, 1.0, 5, structure="elementwise", seed=3)
    assert torch.equal(twin(x), first)
    twin.load_state_dict(layer.state_dict())  # a resumed run goes on
    assert torch.equal(twin(x), layer(x))
    other = Smoothed(torch.sign, 1.0, 5, structure="elementwise", seed=4)
    assert not torch.equal(other(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and int(layer.calls) == 3


def test_checkpointing_wants_a_key() -> None:
    layer, x = Smoothed(torch.sign, 1.0, 5, structure="elementwise"), torch.zeros(3, requires_grad=True)
    y = checkpoint(lambda x: layer(x, key=4), x, use_reentrant=False)
    plain = layer(x, key=4)
    torch.testing.assert_close(*(torch.autograd.grad(f.sum(), x)[0] for f in (y, plain)))
    y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(UnsupportedOpError, match="activation checkpointing.*Pass it a key"):
        y.sum().backward()


def test_a_second_derivative_is_a_named_error() -> None:
    for structure in ("elementwise", "block", "dense"):
        layer = Smoothed(torch.sign, 1.0, 50, structure=structure)
        x = torch.zeros(3, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        with pytest.raises(
            UnsupportedOpError, match=r"gradient of Smoothed\(sign\) has no derivative.*layers.Surrogate"
        ):
            g.sum().backward()


def test_it_trains_a_threshold() -> None:
    torch.manual_seed(0)
    x = torch.rand(256, 1) * 4 - 2
    target = (x > 0.8).float()
    net = nn.Sequential(nn.Linear(1, 1), Smoothed(lambda u: (u > 0).to(u), 0.5, 8, structure="elementwise"))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    threshold = -float((net[0].bias / net[0].weight).detach())
    assert abs(threshold - 0.8) < 0.15


@pytest.mark.filterwarnings("ignore:.*relative variance")
@pytest.mark.parametrize(
    ("fn", "structure", "error", "message"),
    [
        (lambda x: x.sum(), "elementwise", StructureError, r"must return shape \(4, 3\), got \(\)"),
        (lambda x: x.cumsum(-1), "elementwise", StructureError, "moving half of the entries moved.*'block' or 'dense'"),
        (lambda x: x - x.mean(0), "block", StructureError, "moving half of the samples moved.*'dense'"),
        (lambda x: x.sum(), "block", StructureError, r"starts with \(4,\)"),
        (lambda x: (x, x), "dense", StructureError, "one tensor, got tuple"),
    ],
)
def test_wrong_functions_are_named(fn, structure: str, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Smoothed(fn, 0.1, 4, structure=structure)(torch.rand(4, 3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([1, 2]), "got torch.int64"),
        (torch.tensor([1.0, math.nan]), "1 numbers of 2 that are not finite"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
    ],
)
def test_bad_input_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        Smoothed(torch.sign, 0.1, 4, structure="elementwise")(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"sigma": math.inf}, "sigma must be positive"),
        ({"samples": 0}, "samples must be an integer >= 1, got 0"),
        ({"samples": 2.0}, "samples must be an integer"),
        ({"probe_every": 0}, "probe_every must be"),
        ({"fn": "sign"}, "wraps a function"),
    ],
)
def test_bad_options_are_named(options, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        Smoothed(**{"fn": torch.sign, "sigma": 1.0, "samples": 4, **options})


def test_an_unknown_structure_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'elementwise'"):
        Smoothed(torch.sign, 1.0, 4, structure="element")


def test_a_high_variance_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    layer = Smoothed(torch.sign, 1.0, 4)
    with pytest.warns(UserWarning, match="4 samples for 100 numbers .* relative variance 25.2"):
        layer(torch.rand(2, 100))
    recwarn.clear()
    layer(torch.rand(2, 100))
    Smoothed(torch.sign, 1.0, 4, structure="elementwise")(torch.rand(2, 100))
    assert not len(recwarn)


def test_a_function_that_works_in_place_gets_its_own_tensor() -> None:
    for antithetic in (True, False):
        x = torch.ones(3, dtype=F64, requires_grad=True)
        layer = Smoothed(lambda x: x.mul_(x), 0.1, 500, antithetic, "elementwise")
        layer(x, key=0).sum().backward()
        assert x.tolist() == [1.0] * 3
        torch.testing.assert_close(x.grad, torch.full((3,), 2.0, dtype=F64), rtol=0.3, atol=0)


@pytest.mark.parametrize("structure", ["elementwise", "block"])
def test_empty_batch(structure: str) -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    y = Smoothed(torch.sign, 0.1, 4, structure=structure)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype, requires_grad=True)
    y = Smoothed(torch.sign, 1.0, 100, structure="elementwise")(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), torch.full((3,), math.sqrt(2 / math.pi)), rtol=0.3, atol=0)


def test_copies_and_pickles() -> None:
    layer = Smoothed(torch.sign, 1.0, 4, structure="elementwise")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(torch.ones(9)), Smoothed(torch.sign, 1.0, 4, structure="elementwise")(torch.ones(9)))
    assert repr(layer) == "Smoothed(sign, sigma=1.0, 4 antithetic pairs, structure='elementwise')"
