"""`Dual` with one Jacobian block per sample, and with random local tangents."""

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError, UnsupportedOpError
from dualnn.layers import Dual
from dualnn.layers.local import EstimateWarning


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixes_the_last(x, p):
    y = torch.softmax(x * p[0], -1) * p[1]
    return y.cumsum(-1)[..., :2], (x * x).sum(-1)


def loss(outputs):
    a, b = outputs
    weights = torch.arange(1, a.numel() + 1, dtype=a.dtype).reshape(a.shape)
    return (a.sin() * weights).sum() + (b**2).sum()


def three_orders(fn, x, p):
    inputs = [x.clone().requires_grad_(), p.clone().requires_grad_()]
    first = torch.autograd.grad(loss(fn(*inputs)), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g**3).sum() for g in first), inputs, create_graph=True)
    third = torch.autograd.grad(sum((g**2).sum() for g in second), inputs)
    return [*first, *second, *third]


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (3,)])
@pytest.mark.parametrize("structure", ["block", "dense"])
def test_exact_to_third_order(structure, shape):
    if structure == "block" and len(shape) == 1:
        pytest.skip("no batch axis")
    x, p = draw(*shape), torch.tensor([0.7, 1.3], dtype=torch.float64)
    ours = three_orders(Dual(mixes_the_last, structure=structure), x, p)
    for a, b in zip(ours, three_orders(mixes_the_last, x, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_block_in_forward_mode_and_torch_func():
    x, p = draw(5, 3), torch.tensor([0.7, 1.3], dtype=torch.float64)
    layer = Dual(mixes_the_last, structure="block")
    for push in (dn.jvp, torch.func.jvp):
        for a, b in zip(push(layer, (x, p), (x, p))[1], dn.jvp(mixes_the_last, (x, p), (x, p))[1], strict=True):
            torch.testing.assert_close(a, b)
    each = torch.func.vmap(torch.func.grad(lambda row: layer(row[None], p)[1].sum()))(x)
    torch.testing.assert_close(each, 2 * x)


def test_block_shares_its_tangents_over_the_batch():
    seen = []

    def watched(x):
        seen.append(getattr(x, "num_tangents", None))
        return torch.softmax(x, -1)

    Dual(watched, structure="block")(draw(50, 4).requires_grad_())
    assert seen[-1] == 4


@pytest.mark.parametrize(
    "mixing",
    [lambda x: x - x.mean(0), lambda x: x - x.mean(0).detach(), lambda x: x.flip(0), lambda x: x.cumsum(0)],
)
def test_block_refuses_functions_that_mix_samples(mixing):
    with pytest.raises(StructureError, match="samples mix"):
        Dual(mixing, structure="block")(draw(6, 3).requires_grad_())


def test_auto_prefers_exact_structures_and_says_what_it_chose():
    for fn, expected in [
        (torch.tanh, "elementwise"),
        (lambda x: x.softmax(-1), "block"),
        (lambda x: x.flip(0) * x, "dense"),
    ]:
        layer = Dual(fn)
        layer(draw(4, 3))
        assert layer.local.chosen == expected


def test_auto_takes_an_estimate_only_if_allowed():
    x = draw(80, 60)
    with pytest.raises(StructureError, match="tangents=K"):
        Dual(lambda x: x.flip(0).cumsum(1) * x.sum())(x)
    layer = Dual(lambda x: x.flip(0).cumsum(1) * x.sum(), tangents=4)
    with pytest.warns(EstimateWarning, match="relative variance"):
        layer(x)
    assert layer.local.chosen == "random"


def estimates(layer, x, count, batch):
    """Gradients of a fixed linear loss, from consecutive calls (each has its own directions)."""
    w = draw(*layer(x).shape, seed=9)
    found = []
    for _ in range(count):
        leaf = x.clone().requires_grad_()
        (layer(leaf) * w).sum().backward()
        found.append(leaf.grad)
    return torch.stack(found), w


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
@pytest.mark.parametrize("fn", [lambda x: x.softmax(-1) * x, lambda x: (x * x).flip(0).cumsum(1)])
def test_random_is_unbiased(fn):
    x = draw(3, 4)
    found, w = estimates(Dual(fn, structure="random", tangents=2), x, 3000, 3)
    exact = torch.autograd.functional.vjp(fn, x, w)[1]
    error = found.std(0) / found.shape[0] ** 0.5
    assert ((found.mean(0) - exact).abs() <= 4 * error + 1e-12).all()


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
@pytest.mark.parametrize("batch", [2, 8])
def test_random_variance_counts_one_sample(batch):
    """Relative squared error (n - 1)/K for Rademacher, n the inputs of one sample, whatever the batch."""
    n, num = 6, 2
    x = draw(batch, n)
    found, w = estimates(Dual(lambda x: x.softmax(-1), structure="random", tangents=num), x, 4000, batch)
    exact = torch.autograd.functional.vjp(lambda x: x.softmax(-1), x, w)[1]
    relative = ((found - exact) ** 2).sum(2) / (exact**2).sum(1)  # (calls, batch)
    error = relative.std(0) / relative.shape[0] ** 0.5
    assert ((relative.mean(0) - (n - 1) / num).abs() <= 4 * error).all()


def test_random_with_enough_tangents_is_exact():
    layer = Dual(lambda x: x.softmax(-1), structure="random", tangents=3)
    x = draw(5, 3).requires_grad_()
    layer(x)[:, 0].sum().backward()
    again = x.detach().requires_grad_()
    again.softmax(-1)[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert layer.local.chosen == "block"


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_random_estimates_parameters_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(draw(4, seed=5))

        def forward(self, x):
            with torch.no_grad():
                return (x * self.w).softmax(-1)

    net, x = Net(), draw(6, 4)
    layer, w = Dual(net, structure="random", tangents=3), draw(6, 4, seed=9)
    found = []
    for _ in range(3000):
        net.zero_grad()
        (layer(x) * w).sum().backward()
        found.append(net.w.grad.clone())
    stacked = torch.stack(found)
    leaf = net.w.detach().requires_grad_()
    ((x * leaf).softmax(-1) * w).sum().backward()
    assert ((stacked.mean(0) - leaf.grad).abs() <= 4 * stacked.std(0) / 3000**0.5).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_random_forward_is_exact_and_a_second_derivative_raises():
    layer = Dual(lambda x: x.softmax(-1), structure="random", tangents=1)
    x = draw(4, 3)
    torch.testing.assert_close(dn.jvp(layer, (x,), (x,))[1], dn.jvp(lambda x: x.softmax(-1), (x,), (x,))[1])
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], dn.jvp(layer, (x,), (x,))[1])
    leaf = x.requires_grad_()
    (g,) = torch.autograd.grad((layer(leaf) ** 2).sum(), leaf, create_graph=True)
    with pytest.raises(UnsupportedOpError, match="second derivative"):
        g.sum().backward()


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_random_directions_follow_from_the_seed_and_the_call():
    def gradients(seed):
        layer = Dual(lambda x: x.softmax(-1), structure="random", tangents=1, seed=seed)
        out = []
        for _ in range(2):
            x = draw(4, 3).requires_grad_()
            layer(x)[:, 0].sum().backward()
            out.append(x.grad)
        return out

    state = torch.get_rng_state()
    first, second = gradients(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert torch.equal(first, gradients(0)[0]) and not torch.equal(first, gradients(1)[0])


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"structure": "random"}, DualInputError),
        ({"structure": "random", "tangents": 0}, DualInputError),
        ({"structure": "block", "tangents": 3}, DualInputError),
        ({"structure": "blok"}, ValueError),
        ({"batch_dims": -1}, DualInputError),
    ],
)
def test_bad_arguments(kwargs, error):
    with pytest.raises(error):
        Dual(torch.tanh, **kwargs)


def test_a_limit_on_the_variance_is_kept():
    layer = Dual(lambda x: x.softmax(-1), structure="random", tangents=2, max_relative_variance=1.0)
    with pytest.raises(DualInputError, match="raise tangents"):
        layer(draw(4, 10))


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_two_estimates_in_a_row_are_unbiased():
    """With the same directions in both, the mean would be off by more than the gradient itself."""

    def fn(x):
        return x.softmax(-1) * 3

    layers = [Dual(fn, structure="random", tangents=1) for _ in range(2)]
    x = draw(1, 3)
    found, w = estimates(nn.Sequential(layers[0], nn.Identity(), layers[1]), x, 4000, 1)
    exact = torch.autograd.functional.vjp(lambda x: fn(fn(x)), x, w)[1]
    assert ((found.mean(0) - exact).abs() <= 4.5 * found.std(0) / found.shape[0] ** 0.5).all()
