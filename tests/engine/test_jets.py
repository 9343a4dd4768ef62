"""The collapsed Laplacian: equals the trace of the Hessian, op by op and through networks; what it carries."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dualnn as dn
from dualnn.engine.errors import UnknownNameError, UnsupportedOpError
from dualnn.engine.jets import LINEAR, MULTILINEAR
from dualnn.engine.registry import RULES, SPECS
from dualnn.training.meters import LiveBytes
from tests.engine.oracles import five_point, rand, separated

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.block(x.reshape(1, 3, 4))).sum()


def mlp(*activations):
    width = [12, *[8] * len(activations)]
    layers = [m for i, a in enumerate(activations) for m in (nn.Linear(width[i], 8), a)]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def matrices(x):
    a = x.reshape(3, 4)
    return torch.einsum("ij,kj->ik", a, torch.tanh(a)) @ (a @ a.mT) / (1 + a.norm())


NETWORKS = {
    "tanh": lambda: mlp(nn.Tanh(), nn.Tanh()),
    "gelu": lambda: mlp(nn.GELU(), nn.GELU(approximate="tanh")),
    "softmax": lambda: mlp(nn.Softmax(-1), nn.SiLU()),
    "layer_norm": lambda: mlp(nn.LayerNorm(8), nn.Tanh(), nn.RMSNorm(8)),
    "attention": Attention,
    "matmul": lambda: matrices,
    "conv": lambda: nn.Sequential(nn.Unflatten(0, (1, 1, 12)), nn.Conv1d(1, 2, 3), nn.Softplus(), nn.AvgPool1d(2)),
    "batch_norm": lambda: nn.Sequential(nn.Unflatten(0, (4, 3)), nn.BatchNorm1d(3), nn.Tanh()),
    "prod": lambda: lambda x: torch.sin(x).prod() + torch.linalg.det(x[:9].reshape(3, 3)),
    "dual": lambda: lambda x: dn.jvp(lambda z: torch.exp(z * x), (x,), (torch.sin(x),))[1],
}


def network(name):
    torch.manual_seed(0)
    found = NETWORKS[name]()
    return found.double() if isinstance(found, nn.Module) else found


@pytest.mark.parametrize("name", NETWORKS)
def test_it_equals_the_trace_of_both_hessians(name):
    fn, x = network(name), rand(3)(12)
    found = dn.laplacian(fn, x)
    torch.testing.assert_close(found, dn.hessian(fn, x).diagonal(0, -2, -1).sum(-1), rtol=1e-9, atol=1e-10)
    if name != "dual":  # autograd cannot see through ours from outside
        with sdpa_kernel(SDPBackend.MATH):
            if name != "batch_norm":  # counts its batches in place, which torch.func refuses
                theirs = torch.func.hessian(fn)(x).diagonal(0, -2, -1).sum(-1)
                torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(found.reshape(-1), trace(fn, x).detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dn.laplacian(fn, x, chunk=5), found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "softmax", "layer_norm", "attention", "prod"])
def test_a_batch_by_vmap(name):
    fn, points = network(name), rand(4)(5, 12)
    if name == "prod":
        with pytest.raises(UnsupportedOpError, match="inside torch.func"):  # torch's reverse mode serves prod
            torch.func.vmap(lambda x: dn.laplacian(fn, x))(points)
        return
    found = torch.func.vmap(lambda x: dn.laplacian(fn, x))(points)
    torch.testing.assert_close(found, torch.stack([dn.laplacian(fn, x) for x in points]), rtol=1e-10, atol=1e-12)


def trace(fn, x):
    """The Laplacian by reverse mode over reverse mode."""
    leaf = x.clone().requires_grad_()
    found = []
    for out in fn(leaf).reshape(-1):
        (slope,) = torch.autograd.grad(out, leaf, create_graph=True)
        rows = [torch.autograd.grad(s, leaf, create_graph=True)[0][i] for i, s in enumerate(slope)]
        found.append(sum(rows))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["tanh", "gelu", "softmax", "layer_norm", "attention"])
def test_its_gradient_in_the_weights(name):
    """What a physics-informed network trains on. (torch's third derivative of layer_norm by reverse mode is wrong.)"""
    net, x = network(name), rand(5)(12)
    weights = tuple(net.parameters())
    directions = [rand(6 + i)(*w.shape) for i, w in enumerate(weights)]
    grads = torch.autograd.grad(dn.laplacian(net, x).pow(2).sum(), weights, allow_unused=True)
    along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)

    def moved(h):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            names = [n for n, _ in net.named_parameters()]
            at = {n: w + h * d for n, w, d in zip(names, weights, directions, strict=True)}
            with torch.enable_grad():
                return [trace(lambda z: torch.func.functional_call(net, at, z), x).pow(2).sum().detach()]

    torch.testing.assert_close(along, five_point(moved)[0], rtol=1e-7, atol=1e-9)
    if name in ("tanh", "gelu", "softmax"):
        theirs = torch.autograd.grad(trace(net, x).pow(2).sum(), weights, allow_unused=True)
        for a, b in zip(grads, theirs, strict=True):
            if a is None or b is None:  # the last bias
                assert all(g is None or not g.any() for g in (a, b))
            else:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# Every registered op, on its own samples: all float inputs move.
CASES = [
    pytest.param(name, i, id=f"{name}-{i}")
    for name, spec in sorted(SPECS.items())
    for i in range(len(list(spec.samples(rand()))))
]


@pytest.mark.parametrize("name, index", CASES)
def test_every_rule_collapses(name, index):
    spec = SPECS[name]
    inputs, call, _ = separated(list(spec.samples(rand()))[index])
    sizes = [x.numel() for x in inputs]
    flat = torch.cat([x.reshape(-1) for x in inputs])

    def fn(z):
        parts = [p.reshape(x.shape) for p, x in zip(z.split(sizes), inputs, strict=True)]
        return call(spec.op, *parts)

    found, wanted = dn.laplacian(fn, flat), dn.laplacian(fn, flat, method="nested")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_lists_of_linear_ops_name_ops():
    known = {getattr(f, "__name__", "") for f in RULES} | {"detach"}
    assert LINEAR | MULTILINEAR <= known


# What the collapsed pass does where it cannot be as simple.

X = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)


def agree(fn, x=X):
    found, wanted = dn.laplacian(fn, x), dn.laplacian(fn, x, method="nested")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    return found


def test_control_flow_and_loops():
    def fn(x):
        y, steps = x, 0
        while float(y.norm()) < 10:
            y, steps = y * (1.5 + x.sin().sum() ** 2), steps + 1
        return y.sum() if bool(y[0] > 0) else -y.prod()

    assert agree(fn) != 0


def test_in_place_writes():
    def fn(x):
        y = torch.zeros_like(x)
        for i in range(len(x)):
            y[i] = x[i] ** 3 * x[0]
        y *= x
        y.tanh_()
        return y.sum()

    agree(fn)


def test_a_write_to_what_a_view_shows_raises_and_the_other_method_follows():
    def fn(x):
        y = x * x
        row = y[1:]
        row.mul_(x[0])
        return y.sum()

    with pytest.raises(UnsupportedOpError, match="method='nested'"):
        dn.laplacian(fn, X)
    torch.testing.assert_close(
        dn.laplacian(fn, X, method="nested"), dn.laplacian(lambda x: x[0] ** 2 + (x[1:] ** 2 * x[0]).sum(), X)
    )


def test_tangents_that_the_function_reads_raise():
    with pytest.raises(UnsupportedOpError, match="reads tangents itself"):
        dn.laplacian(lambda x: x.tangent.sum(), X)


def test_a_custom_derivative_raises():
    exp = dn.custom_dual(partials=lambda y, x: (y,))(lambda x: torch.exp(x))
    with pytest.raises(UnsupportedOpError, match="method='nested'"):
        dn.laplacian(lambda x: exp(x).sum(), X)
    torch.testing.assert_close(dn.laplacian(lambda x: exp(x).sum(), X, method="nested"), X.exp().sum())


def test_nested_laplacians_and_other_levels():
    wave = lambda z: torch.exp(torch.sin(z).log().sum())  # noqa: E731  (the product of the sines)
    x = X.abs()
    biharmonic = dn.laplacian(lambda x: dn.laplacian(wave, x), x)
    torch.testing.assert_close(biharmonic, 16 * torch.sin(x).prod())
    with pytest.raises(UnsupportedOpError, match="method='nested'"):  # torch's reverse mode serves prod
        dn.laplacian(lambda x: dn.laplacian(lambda z: torch.sin(z).prod(), x), x)
    slope = dn.jacobian(lambda x: dn.laplacian(lambda z: (z**3 * x.sum()).sum(), x), X)
    torch.testing.assert_close(slope, torch.autograd.functional.jacobian(lambda x: 6 * x.sum() ** 2, X))
    inner = dn.laplacian(lambda x: dn.hvp(lambda z: (z**5).sum(), x, torch.ones_like(x)).sum(), X)
    torch.testing.assert_close(inner, (20 * 3 * 2 * X).sum())


def test_outputs_that_do_not_depend_and_integers():
    found = dn.laplacian(lambda x: {"a": x.sum(), "b": torch.ones(2), "c": x.argmax(), "d": x > 0, "e": 3}, X)
    assert found["a"] == 0 and torch.equal(found["b"], torch.zeros(2))
    assert found["c"] is None and found["d"] is None and found["e"] is None
    assert dn.laplacian(lambda x: x.sum(), torch.zeros(0)) == 0


def test_one_random_draw_serves_value_and_derivatives():
    torch.manual_seed(0)
    found = dn.laplacian(lambda x: (torch.dropout(x, 0.5, True) ** 2).sum(), X)
    torch.manual_seed(0)
    kept = torch.dropout(X, 0.5, True) != 0
    torch.testing.assert_close(found, 8 * kept.sum().double())


def test_running_statistics_are_updated_once():
    norm = nn.BatchNorm1d(2).double()
    dn.laplacian(lambda x: norm(x.reshape(2, 2)).sin().sum(), X)
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * X.reshape(2, 2).mean(0))


def test_values_are_bit_for_bit_the_plain_ones():
    net, x = network("attention"), rand(3)(12)
    seen = []
    dn.laplacian(lambda z: seen.append(net(z).primal) or net(z), x)
    assert torch.equal(seen[0], net(x))


def test_an_unknown_method():
    with pytest.raises(UnknownNameError, match="did you mean 'nested'"):
        dn.laplacian(torch.sum, X, method="nestd")


def test_it_carries_k_plus_two_tensors_and_not_k_squared():
    """The peak of live bytes through a deep network, in units of one activation."""
    torch.manual_seed(0)
    width, directions = 4096, 16
    scale = torch.rand(width, dtype=torch.float64)

    def fn(x):
        y = x.sum() * scale
        for _ in range(6):
            y = torch.tanh(y * scale + y.roll(1))
        return y.sum()

    def peak(method):
        with LiveBytes() as live:
            dn.laplacian(fn, torch.rand(directions, dtype=torch.float64), chunk=directions, method=method)
        return live.peak / (8 * width)

    dn.laplacian(fn, torch.rand(2, dtype=torch.float64))
    assert peak("collapsed") < 8 * directions
    assert peak("nested") > directions**2
