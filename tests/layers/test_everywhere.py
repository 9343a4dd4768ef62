"""Every structure of `Dual` and every layer that solves for its output, wherever a layer may be differentiated."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dualnn.layers import ArgMin, Dual, FixedPoint, LeastSquares, LinearSolve, ODEBlock, Root
from tests.layers.functions import Channels

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore::dualnn.layers.local.EstimateWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor",  # dynamo looks at it at every graph break
)


class Rolls(nn.Module):
    """A loop that mixes a row, or the whole batch."""

    def __init__(self, dims, gradient=False):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.4, 0.9, 1.3], dtype=F64))
        self.dims, self.gradient = dims, gradient

    def forward(self, x):
        with contextlib.nullcontext() if self.gradient else torch.no_grad():
            y = x
            for _ in range(3):
                y = y + 0.3 * torch.tanh(self.gain * y).roll([1] * len(self.dims), self.dims)
            return y


class Cell(nn.Module):
    """Half a layer that contracts, or 100 of them."""

    def __init__(self, steps=0):
        super().__init__()
        self.inner, self.steps = nn.Linear(3, 3, dtype=F64), steps
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor([[0.2, -0.4, 0.1], [0.5, 0.3, -0.2], [0.0, 0.6, 0.1]]))
            self.inner.bias.copy_(torch.tensor([0.1, -0.3, 0.2]))

    def half(self, z, x):
        return 0.5 * torch.tanh(self.inner(z) + x)

    def forward(self, z, x=None):
        if x is not None:
            return self.half(z, x)
        x, z = z, torch.zeros_like(z)
        for _ in range(self.steps):
            z = self.half(z, x)
        return z


class Residual(Cell):
    """Vanishes at the cell's fixed point."""

    def forward(self, z, x=None):
        return super().forward(z) if x is None else z - self.half(z, x)


class Energy(Cell):
    """Convex in z; the loop beside it is ten Newton steps that autograd records."""

    def forward(self, z, x=None):
        if x is not None:
            return (torch.cosh(z).log() + 0.5 * (z - self.inner(x)).square()).sum(-1)
        target, z = self.inner(z), torch.zeros_like(z)
        for _ in range(self.steps):
            t = torch.tanh(z)
            z = z - (t + z - target) / (2 - t * t)
        return z


class Residuals(Energy):
    """More residuals than unknowns, which do not vanish; half their squares is the cell's energy to be."""

    def forward(self, z, x=None):
        if x is not None:
            return torch.cat([z - self.inner(x), torch.tanh(z)], -1)
        target, z = self.inner(z), torch.zeros_like(z)
        for _ in range(self.steps):
            t = torch.tanh(z)
            d = 1 - t * t
            z = z - (z - target + t * d) / (1 + d * d - 2 * t * t * d)
        return z


class Learned(nn.Module):
    """The inverse of a learned matrix, as autograd has it; or the matrices of a module."""

    def __init__(self, spd=False):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[2.0, 0.3, -0.1], [0.2, 1.5, 0.4], [-0.3, 0.1, 1.0]], dtype=F64))

    def forward(self, b):
        return b @ torch.linalg.inv(self.matrix).T


class Scaled(nn.Module):
    """A positive definite matrix for each sample."""

    def __init__(self):
        super().__init__()
        self.basis = nn.Parameter(torch.tensor([[1.0, 0.3, -0.1], [0.2, 1.5, 0.4], [-0.3, 0.1, 1.0]], dtype=F64))

    def forward(self, x):
        return self.basis @ self.basis.T + torch.diag_embed(x * x)


class OfItself(nn.Module):
    """``LinearSolve`` whose matrix depends on the right-hand side; without it, the same by an inverse."""

    def __init__(self, solver=None):
        super().__init__()
        self.layer = LinearSolve(Scaled(), "spd") if solver else Scaled()
        self.solver = solver

    def forward(self, x):
        if self.solver:
            return self.layer(x, x)
        return (torch.linalg.inv(self.layer(x)) @ x.unsqueeze(-1)).squeeze(-1)


class Field(Cell):
    """A vector field; the loop beside it is Runge and Kutta's method in small steps, to time 1/2."""

    def forward(self, t, z=None):
        if z is not None:
            return torch.tanh(self.inner(z)) - t * z
        z, h = t, 0.5 / (self.steps or 1)
        for i in range(self.steps):
            t = i * h
            a = self(t, z)
            b = self(t + h / 2, z + h / 2 * a)
            c = self(t + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + self(t + h, z + h * c))
        return z


def learned():
    layer = LinearSolve(3).double()
    layer.load_state_dict(Learned().state_dict())
    return layer


# name: (the layer, the same function as autograd follows it)
LAYERS = {
    "elementwise": (lambda: Dual(Channels(3), "elementwise"), lambda: Channels(3, gradient=True)),
    "block": (lambda: Dual(Rolls([-1]), "block"), lambda: Rolls([-1], gradient=True)),
    "dense": (lambda: Dual(Rolls([0, -1]), "dense"), lambda: Rolls([0, -1], gradient=True)),
    "auto": (lambda: Dual(Rolls([-1])), lambda: Rolls([-1], gradient=True)),
    "random": (lambda: Dual(Rolls([-1]), "random", tangents=2), lambda: Rolls([-1], gradient=True)),
    "fixed point": (lambda: FixedPoint(Cell()), lambda: Cell(steps=100)),
    "root": (lambda: Root(Residual()), lambda: Residual(steps=100)),
    "argmin": (lambda: ArgMin(Energy()), lambda: Energy(steps=10)),
    "least squares": (lambda: LeastSquares(Residuals()), lambda: Residuals(steps=15)),
    "linear solve": (learned, Learned),
    "linear solve, spd": (lambda: OfItself(True), OfItself),
    "ode": (lambda: ODEBlock(Field(), (0.0, 0.5), rtol=1e-10, atol=1e-11), lambda: Field(steps=40)),
}
#: What the solver is told under autocast: bf16 converges no further.
COARSE = ("fixed point", "root", "argmin", "least squares", "ode")


def coarse(name, *layers):
    """The layers with tolerances that bf16 reaches, where there are any."""
    for layer in layers if name in COARSE else ():
        for setting in ("rtol", "atol") if isinstance(layer, ODEBlock) else ("tol",):
            assert hasattr(layer, setting)
            setattr(layer, setting, 1e-2)


EXACT = [name for name in LAYERS if name != "random"]


def around(layer):
    """A small network that holds the layer; its weights are always the same."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 1)).double()


def nets(name):
    return tuple(around(make()) for make in LAYERS[name])


def batch():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=F64)


def gradients(net, x, run=None):
    """Of the network's weights and its input; ``run`` calls the network."""
    x = x.clone().requires_grad_()
    loss = (run or net)(x).float().square().sum()
    return torch.autograd.grad(loss, [x, *net.parameters()])


def assert_close(ours, theirs, tol=1e-9):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=tol, atol=tol)


@pytest.mark.parametrize("name", EXACT)
def test_backward(name):
    net, control = nets(name)
    assert_close(gradients(net, batch()), gradients(control, batch()), tol=1e-6)  # the loss is taken in float32
    if isinstance(net[1], Dual):
        assert net[1].local.chosen == {"auto": "block"}.get(name, name)


def test_the_random_estimate_is_one():
    net, control = nets("random")
    a, b = (torch.cat([g.flatten() for g in gradients(n, batch())]) for n in (net, control))
    assert net[1].local.chosen == "random" and not torch.allclose(a, b, rtol=0.01)
    torch.testing.assert_close(net(batch()), control(batch()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing(name, reentrant):
    net, twin = nets(name)[0], nets(name)[0]
    if name == "random":
        twin(batch())  # the backward pass recomputes, with the directions of a second call

    def run(x):
        return checkpoint(net, x, use_reentrant=reentrant)

    if reentrant:  # which knows loss.backward() only
        x = batch().requires_grad_()
        run(x).float().square().sum().backward()
        ours = [x.grad, *(p.grad for p in net.parameters())]
    else:
        ours = gradients(net, batch(), run)
    assert_close(ours, gradients(twin, batch()), tol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    net, twin = (nets(name)[0].float() for _ in range(2))
    coarse(name, net[1], twin[1])
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().sum()
    ours = torch.autograd.grad(loss, list(net.parameters()))
    theirs = gradients(twin, x)[1:]
    assert all(g.dtype == torch.float32 for g in ours)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (ours, theirs))
    assert float((a - b).norm() / b.norm()) < 0.03


@pytest.mark.parametrize("name", LAYERS)
def test_compiling_the_model_around_it(name):
    net, twin = nets(name)[0], nets(name)[0]
    assert_close(gradients(net, batch(), torch.compile(net, backend="aot_eager")), gradients(twin, batch()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", LAYERS)
def test_copies(name, clone):
    net = nets(name)[0]
    net(batch())
    twin = clone(net)
    assert_close(gradients(twin, batch()), gradients(net, batch()), tol=0)
    with torch.no_grad():
        for p in twin[1].parameters():
            p.mul_(0.5)  # zero would be a singular matrix
    twin(batch()).sum().backward()
    assert not torch.equal(twin(batch()), net(batch()))
    assert all(p.grad is None and p.abs().sum() for p in net.parameters())


def functional(net, transform):
    """A transform of the network as a function of its weights and one input."""
    weights = {k: p.detach() for k, p in net.named_parameters()}
    return transform(lambda w, x: torch.func.functional_call(net, w, (x,)).square().sum(), weights, batch())


TRANSFORMS = {
    "grad": lambda f, w, x: torch.func.grad(f, (0, 1))(w, x),
    "vmap of grad": lambda f, w, x: torch.func.vmap(torch.func.grad(f, (0, 1)), (None, 0))(w, x.unsqueeze(1)),
    "jvp": lambda f, w, x: torch.func.jvp(f, (w, x), (w, x))[1],
    "vmap": lambda f, w, x: torch.func.vmap(f, (None, 0))(w, torch.stack([x, -x])),
    "vmap of weights": lambda f, w, x: torch.func.vmap(f, ({k: 0 for k in w}, None))(
        {k: torch.stack([p, 2 * p]) for k, p in w.items()}, x
    ),
    "jacfwd": lambda f, w, x: torch.func.jacfwd(f, 1)(w, x),
    "jacrev": lambda f, w, x: torch.func.jacrev(f, 0)(w, x),
    "hessian": lambda f, w, x: torch.func.hessian(f, 1)(w, x),
    "grad of grad": lambda f, w, x: torch.func.grad(
        lambda w: sum(g.square().sum() for g in torch.func.grad(f)(w, x).values())
    )(w),
}
#: What does not need a gradient of the estimate is exact.
EXACT_ALWAYS = ["jvp", "vmap", "vmap of weights", "jacfwd"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_torch_func(name, transform):
    net, control = nets(name)
    if name == "random" and transform not in EXACT_ALWAYS:
        pytest.skip("tested below")
    ours, theirs = (functional(n, TRANSFORMS[transform]) for n in (net, control))
    assert_close(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), tol=1e-8)


def test_torch_func_of_a_random_estimate():
    net, twin = nets("random")[0], nets("random")[0]
    ours = functional(net, TRANSFORMS["grad"])
    x = batch().requires_grad_()
    theirs = torch.autograd.grad(twin(x).square().sum(), [*twin.parameters(), x])
    assert_close([*ours[0].values(), ours[1]], theirs)
    with pytest.raises(Exception, match="second derivative was taken through a random local estimate"):
        functional(net, TRANSFORMS["grad of grad"])
    with pytest.raises(Exception, match="second derivative was taken through a random local estimate"):
        functional(net, TRANSFORMS["hessian"])


def test_vmap_of_a_random_gradient_is_unbiased_and_its_rows_are_independent():
    layer, control, x = Dual(Rolls([-1]), "random", tangents=2), Rolls([-1], gradient=True), batch()[:1]

    def loss(f):
        return lambda row: f(row[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss(layer)))(x.expand(2000, 3))
    (exact,) = torch.func.vmap(torch.func.grad(loss(control)))(x)
    assert ((found.mean(0) - exact).abs() <= 4.5 * found.std(0) / 2000**0.5).all()
    assert len(found.unique(dim=0)) > 8


@pytest.mark.parametrize("name", LAYERS)
def test_names_in_the_state_dict_are_the_functions(name):
    layer = LAYERS[name][0]()
    own = [k.split(".", 1)[-1] for k, _ in layer.named_parameters()]
    layer(batch())
    names = [k.split(".", 1)[-1] for k in layer.state_dict()]
    assert names == (["calls", *own] if name == "random" else own)


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_after_autocast(name):
    """The second backward pass calls the function again, in the precision of its first call."""
    net, twin = (nets(name)[0].float() for _ in range(2))
    coarse(name, net[1], twin[1])

    def second(net, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(batch().float()).float().square().sum()
        first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        found = torch.autograd.grad(sum(g.square().sum() for g in first), list(net.parameters()))
        return torch.cat([g.flatten() for g in found])

    ours, theirs = second(net, True), second(twin, False)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
