import copy

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import ConvergenceError, StructureError
from dualnn.layers import FixedPoint
from dualnn.training.meters import LiveBytes

F64 = torch.float64


class Cell(nn.Module):
    def __init__(self, contraction=0.5):
        super().__init__()
        self.inner, self.contraction = nn.Linear(4, 4).double(), contraction

    def forward(self, z, x):
        return self.contraction * torch.tanh(self.inner(z) + x)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1).double(), nn.GroupNorm(1, 2).double()

    def forward(self, z, x):
        return 0.2 * torch.tanh(self.conv(z) + self.norm(x))


def unrolled(cell, x, steps=120):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return z


@pytest.mark.parametrize(("cell", "shape"), [(Cell, (5, 4)), (Images, (2, 2, 3, 3))])
def test_value_and_gradients_are_those_of_the_unrolled_loop(cell, shape):
    layer, x = FixedPoint(cell()), torch.randn(*shape, dtype=F64, requires_grad=True)
    weight, leaves = torch.randn(*shape, dtype=F64), [x, *layer.parameters()]
    ours, theirs = layer(x), unrolled(layer.module, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad((z * weight).sum(), leaves) for z in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_second_order():
    layer, x = FixedPoint(Cell()), torch.randn(2, 4, dtype=F64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    second = []
    for z in (layer(x), unrolled(layer.module, x)):
        first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_duals_pass_through():
    layer, x, v = FixedPoint(Cell()), torch.randn(3, 4, dtype=F64), torch.randn(2, 3, 4, dtype=F64)
    ours, theirs = (dn.jvp(f, (x,), (v,)) for f in (layer, lambda x: unrolled(layer.module, x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_start_of_another_shape():
    class Sum(nn.Module):
        def forward(self, z, x):
            return 0.3 * torch.sin(z) + x.sum(1, keepdim=True)

    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    z = FixedPoint(Sum())(x, torch.zeros(3, 1, dtype=F64))
    z.sum().backward()
    torch.testing.assert_close(x.grad, (1 / (1 - 0.3 * torch.cos(z))).expand(3, 4))


@pytest.mark.parametrize(("options", "rtol"), [({"jacobian": "krylov"}, 1e-8), ({"differentiate": "one_step"}, 0.5)])
def test_other_ways_to_the_gradient(options, rtol):
    cell, x = Cell(), torch.randn(3, 4, dtype=F64)

    def gradient(**options):
        layer = FixedPoint(cell, **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(layer(x).sum(), list(cell.parameters()))])

    exact, ours = gradient(), gradient(**options)
    assert float((ours - exact).norm() / exact.norm()) < rtol
    assert (rtol == 0.5) == bool((ours - exact).norm() > 1e-3 * exact.norm())


def test_on_failure():
    x = torch.randn(3, 4, dtype=F64)
    assert bool(FixedPoint(Cell(), max_steps=1, on_failure="nan")(x).isnan().all())


def test_frozen_weights_and_no_grad():
    layer, x = FixedPoint(Cell()), torch.randn(3, 4, dtype=F64)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.module.inner.bias.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.module.inner.bias.grad is None and layer.module.inner.weight.grad is not None


def test_a_copy_runs_on_its_own_weights():
    layer = FixedPoint(Cell(), tol=1e-10, max_steps=50, memory=3)
    assert list(layer.state_dict()) == ["module.inner.weight", "module.inner.bias"]
    assert "tol=1e-10, max_steps=50, memory=3" in repr(layer)
    twin, x = copy.deepcopy(layer), torch.randn(3, 4, dtype=F64)
    before = layer(x)
    twin.module.inner.bias.data.fill_(1)
    twin(x).sum().backward()
    assert torch.equal(layer(x), before) and layer.module.inner.bias.grad is None


def test_what_cannot_be_solved():
    x = torch.randn(3, 4, dtype=F64)
    with pytest.raises(ConvergenceError, match="of 3 samples"):
        FixedPoint(Cell(), tol=0.0, max_steps=2)(x)
    assert all(type(p) is nn.Parameter for p in FixedPoint(Cell()).parameters())
    with pytest.raises(StructureError, match="of z's shape"):
        FixedPoint(Cell())(x, torch.zeros(1, 4, dtype=F64))


def test_weights_are_put_back_after_an_exception():
    layer = FixedPoint(Cell(), tol=0.0, max_steps=1)
    weights = list(layer.parameters())
    with pytest.raises(ConvergenceError):
        dn.jvp(layer, (torch.randn(3, 4, dtype=F64),), (torch.randn(3, 4, dtype=F64),))
    assert all(a is b for a, b in zip(layer.parameters(), weights, strict=True))


def test_live_bytes_do_not_depend_on_the_iterations():
    def live(contraction):
        layer, x = FixedPoint(Cell(contraction), memory=1, max_steps=2000), torch.randn(3, 4, dtype=F64)
        steps = []
        layer.module.register_forward_hook(lambda *_: steps.append(1))
        with LiveBytes() as meter:
            layer(x).sum().backward()
        return meter.peak, len(steps)

    (few_bytes, few), (many_bytes, many) = live(0.05), live(0.9)
    assert many > 2 * few and many_bytes == few_bytes


def test_under_autocast():
    layer, x = FixedPoint(Cell(), tol=1e-2), torch.randn(3, 4)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    z.sum().backward()
    torch.testing.assert_close(z, unrolled(layer.module, x), rtol=0, atol=0.03)
    assert bool(layer.module.inner.weight.grad.isfinite().all())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it at every graph break
def test_torch_compile_of_the_model():
    net, x = nn.Sequential(nn.Linear(4, 4).double(), FixedPoint(Cell())), torch.randn(3, 4, dtype=F64)
    compiled = torch.compile(net, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x).sum(), list(net.parameters())) for f in (compiled, net))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
