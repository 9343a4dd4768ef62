import copy
import pickle

import jsonargparse
import pytest
import torch
import yaml
from torch import nn

import dualnn as dn
from dualnn.engine.errors import ConvergenceError, DualInputError, DualShapeError, StructureError, UnknownNameError
from dualnn.layers import ODEBlock
from dualnn.solvers import odeint

F64 = torch.float64
METHODS = ["dopri5", "radau", "rodas5p", "bdf"]
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


class Linear(nn.Module):
    """y' = W y, whose solution is exp(W t) x."""

    def __init__(self, features: int = 3, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features, dtype=dtype) / 2)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y @ self.weight.T


class Images(nn.Module):
    """A convolution in a field that depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1).double()

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(y), 1, 1, 1)
        return torch.tanh(self.conv(y)) * torch.cos(t)


def exact(block: ODEBlock, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
    span = block.t[-1] - block.t[0] if t is None else t[-1] - t[0]
    return x @ torch.linalg.matrix_exp(span * block.fn.weight).T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [(0.0, 1.0), (2.0, 0.5)])
def test_a_linear_field_is_the_matrix_exponential(method, t):
    tol = {"rtol": 1e-7, "atol": 1e-8} if method == "bdf" else TIGHT
    block, x = ODEBlock(Linear(), t, method, **tol), torch.randn(4, 3, dtype=F64, requires_grad=True)
    weight, leaves = torch.randn(4, 3, dtype=F64), [x, *block.parameters()]
    ours, theirs = block(x), exact(block, x)
    close = 1e-4 if method == "bdf" else 1e-7
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * close, atol=10 * close)


def test_second_order():
    block, x = ODEBlock(Linear(), **TIGHT), torch.randn(2, 3, dtype=F64, requires_grad=True)
    leaves, second = [x, *block.parameters()], []
    for y in (block(x), exact(block, x)):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_times_are_differentiated():
    block, x = ODEBlock(Linear(), **TIGHT), torch.randn(2, 3, dtype=F64)
    t = torch.tensor([0.3, 0.9], dtype=F64, requires_grad=True)
    y = block(x, t)
    torch.testing.assert_close(y, exact(block, x, t), rtol=1e-7, atol=1e-7)
    (ours,) = torch.autograd.grad(y.sum(), t)
    (theirs,) = torch.autograd.grad(exact(block, x, t).sum(), t)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_and_all_times():
    block, x = ODEBlock(Images(), (0.0, 0.5, 1.0), returns="all"), torch.randn(2, 2, 3, 3, dtype=F64)
    y = block(x)
    assert y.shape == (3, 2, 2, 3, 3) and torch.equal(y[0], x)

    def field(t, y):
        return block.fn(t[..., None, None], y.reshape(x.shape)).reshape(2, -1)

    with torch.no_grad():
        theirs = odeint(field, x.reshape(2, -1), torch.tensor(block.t, dtype=F64), (), "dopri5", 1e-10, 1e-10)
    torch.testing.assert_close(y.reshape(3, 2, -1), theirs, rtol=1e-3, atol=1e-3)
    block.returns = "last"
    assert torch.equal(block(x), y[-1])


def test_forward_equals_reverse():
    block, x = ODEBlock(Images()), torch.randn(2, 2, 3, 3, dtype=F64)
    v = torch.randn(2, *x.shape, dtype=F64)
    _, pushed = dn.jvp(block, (x,), (v,))
    weight, leaf = torch.randn_like(x), x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad((block(leaf) * weight).sum(), leaf)
    torch.testing.assert_close((pushed * weight).sum((1, 2, 3, 4)), (v * pulled).sum((1, 2, 3, 4)))


def step(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def test_an_exact_forward_signal_is_the_gradient_of_backprop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), ODEBlock(Linear(2, torch.float32), rtol=1e-5), nn.Linear(2, 1)).double()
    batch = torch.randn(6, 2, dtype=F64), torch.randn(6, 1, dtype=F64)
    grads = []
    for signal in (dn.signals.Backprop(), dn.signals.Exact()):
        model.zero_grad()
        dn.signals.signal_loss(lambda: step(model, batch), model, signal, 0).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("signal", [None, dn.signals.ActivityPerturbation(tangents=16)])
def test_trains(signal):
    torch.manual_seed(0)
    x = torch.randn(32, 2)
    batch = x, torch.stack([x[:, 1], -x[:, 0]], 1)  # a quarter of a turn
    block, losses = ODEBlock(Linear(2, torch.float32)), []
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1)
    for key in range(40):
        optimizer.zero_grad()
        loss = step(block, batch)
        (loss if signal is None else dn.signals.signal_loss(lambda: step(block, batch), block, signal, key)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_course_of_the_last_call_is_kept():
    block = ODEBlock(Linear())
    assert block.stats is None
    block(torch.randn(3, 3, dtype=F64))
    first = block.stats
    assert first.steps.shape == (3,) and bool(first.done.all()) and first.evaluations > 6
    block(100 * torch.randn(3, 3, dtype=F64), torch.tensor([0.0, 5.0], dtype=F64))
    assert bool((block.stats.steps > first.steps).all()) and not any("stats" in k for k in block.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "pickle"])
def test_copies_and_names(clone):
    block, x = ODEBlock(Linear(), (0.0, 1.0, 3.0), "radau", options={"max_steps": 50}), torch.randn(2, 3, dtype=F64)
    assert list(block.state_dict()) == ["fn.weight"]
    assert "t=(0.0, 1.0, 3.0), method='radau', rtol=0.0001" in repr(block)
    before = block(x)
    twin = clone(block)
    assert repr(twin) == repr(block) and torch.equal(twin(x), before)
    twin.fn.weight.data.zero_()
    torch.testing.assert_close(twin(x), x)
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    torch.manual_seed(0)
    block, x = ODEBlock(Linear(dtype=torch.float32), rtol=1e-2, atol=1e-2), torch.randn(2, 3)
    expected = exact(block, x)
    y = block.to(dtype)(x.to(dtype))
    y.sum().backward()
    assert y.dtype == block.fn.weight.grad.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_an_empty_batch_stays_on_the_graph():
    block = ODEBlock(Linear(), (0.0, 1.0, 2.0), returns="all")
    y = block(torch.zeros(0, 3, dtype=F64, requires_grad=True))
    y.sum().backward()
    assert y.shape == (3, 0, 3) and not block.fn.weight.grad.any()


class Explodes(nn.Module):
    def forward(self, t, y):
        return y * y


def test_samples_that_cannot_be_integrated():
    x = torch.tensor([[0.5], [10.0]])
    with pytest.raises(ConvergenceError, match=r"1 of 2 samples \(first: \[1\]\)"):
        ODEBlock(Explodes())(x)
    y = ODEBlock(Explodes(), on_failure="nan")(x)
    torch.testing.assert_close(y[0], torch.ones(1), rtol=1e-3, atol=1e-3)
    assert bool(y[1].isnan().all())


BAD = [
    (lambda: ODEBlock(torch.tanh), DualInputError, "fn must be an nn.Module"),
    (lambda: ODEBlock(Linear(), (0.0,)), DualInputError, r"t must be two times or more.*got \[0.0\]"),
    (lambda: ODEBlock(Linear(), (0.0, 1.0, 1.0)), DualInputError, "increasing or decreasing"),
    (lambda: ODEBlock(Linear(), rtol=0.0), DualInputError, "rtol and atol must be > 0, got 0.0"),
    (lambda: ODEBlock(Linear(), method="dopri"), UnknownNameError, "did you mean 'dopri5'"),
    (lambda: ODEBlock(Linear(), returns="first"), UnknownNameError, "returns"),
    (lambda: ODEBlock(Linear(), on_failure="last"), UnknownNameError, "on_failure"),
    (lambda: ODEBlock(Linear(), options={"max_stps": 3}), UnknownNameError, "did you mean 'max_steps'"),
    (lambda: ODEBlock(Linear())(torch.ones(2, 3, dtype=torch.int64)), DualInputError, "int64"),
    (lambda: ODEBlock(Linear())(torch.ones(3)), DualShapeError, r"needs a batch axis.*\(3,\)"),
    (lambda: ODEBlock(Linear())(torch.ones(2, 3, dtype=F64), [0, 1]), DualInputError, "t must be a floating"),
    (lambda: ODEBlock(nn.Bilinear(1, 3, 2).double())(torch.ones(2, 3, dtype=F64)), StructureError, r"shape \(2, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_misuse_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_named_in_yaml():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    written = {
        "class_path": "dualnn.layers.ODEBlock",
        "init_args": {
            "fn": {"class_path": f"{__name__}.Linear", "init_args": {"features": 2}},
            "t": [0.0, 0.5, 2.0],
            "method": "radau",
            "options": {"max_steps": 100},
            "returns": "all",
        },
    }
    block = parser.instantiate_classes(parser.parse_string(yaml.safe_dump({"net": written}))).net
    assert block(torch.randn(4, 2, dtype=F64)).shape == (3, 4, 2) and block.t == (0.0, 0.5, 2.0)
