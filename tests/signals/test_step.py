"""The contract of `signal_loss`, whatever the signal."""

import pytest
import torch
from torch import nn

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import DualInputError, TangentLostError, UnsupportedOpError
from dualnn.signals import ActivityPerturbation, Backprop, Exact, ForwardGradient, signal_loss
from tests.signals.estimators import problem

SIGNALS = {
    "weights": ForwardGradient,
    "weights-rank1": lambda: ForwardGradient(rank=1),
    "exact": Exact,
    "activity": ActivityPerturbation,
    "activity-batch": lambda: ActivityPerturbation(per_sample=False),
}
EVERY = {**SIGNALS, "backprop": Backprop}


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def unharmed(net):
    """Parameters are parameters, forwards the classes' own, gradients none."""
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert not any("forward" in m.__dict__ for m in net.modules())
    loss = net(torch.ones(2, 3)).sum()
    assert type(loss) is torch.Tensor
    loss.backward()


@pytest.mark.parametrize("signal", EVERY)
def test_a_dict_keeps_its_entries(net, signal):
    def step():
        y = net(torch.ones(2, 3))
        return {"a": 1, "loss": y.square().mean(), "logits": y, "nested": {"rows": [y[0], "text"]}}

    out = signal_loss(step, net, EVERY[signal](), key=0)
    assert list(out) == ["a", "loss", "logits", "nested"] and out["a"] == 1 and out["nested"]["rows"][1] == "text"
    for tensor in (out["loss"], out["logits"], out["nested"]["rows"][0]):
        assert type(tensor) is torch.Tensor
    assert torch.equal(out["logits"].detach(), net(torch.ones(2, 3)).detach())
    out["loss"].backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("signal", EVERY)
@pytest.mark.parametrize("output", [None, {"loss": None}])
def test_a_skipped_batch_passes(net, signal, output):
    assert signal_loss(lambda: output, net, EVERY[signal](), key=0) == output
    unharmed(net)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("output", [{"logits": 1}, 3.0, "loss", torch.ones(2)])
def test_what_is_no_loss(net, signal, output):
    def step():
        net(torch.ones(2, 3))
        return output

    with pytest.raises(DualInputError, match=r"loss"):
        signal_loss(step, net, SIGNALS[signal](), key=0)
    unharmed(net)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_loss_that_is_no_scalar(net, signal):
    with pytest.raises(DualInputError, match=r"scalar loss tensor, got \(2, 2\)"):
        signal_loss(lambda: net(torch.ones(2, 3)), net, SIGNALS[signal](), key=0)
    unharmed(net)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("cut", ["detach", "item", "argmax"])
def test_a_detached_loss(net, signal, cut):
    def step():
        y = net(torch.ones(2, 3))
        return {
            "detach": lambda: y.detach().mean(),
            "item": lambda: torch.tensor(y.mean().item()),
            "argmax": lambda: (y.argmax(1) == 0).double().mean(),
        }[cut]()

    with pytest.raises(TangentLostError, match="the loss carries no tangent"):
        signal_loss(step, net, SIGNALS[signal](), key=0)
    unharmed(net)


@pytest.mark.parametrize("signal", SIGNALS)
def test_an_op_without_a_rule_is_named(net, signal):
    with pytest.raises(UnsupportedOpError, match="airy_ai"):
        signal_loss(lambda: torch.special.airy_ai(net(torch.ones(2, 3))).mean(), net, SIGNALS[signal](), key=0)
    unharmed(net)


@pytest.mark.parametrize("signal", EVERY)
def test_other_peoples_patches_and_the_module_survive_an_exception(net, signal):
    patch = net[0].forward
    net[0].forward = patch

    def step():
        net(torch.ones(2, 3))
        raise KeyError("user's own")

    with pytest.raises(KeyError, match="user's own"):
        signal_loss(step, net, EVERY[signal](), key=0)
    assert net[0].__dict__["forward"] == patch
    del net[0].forward
    unharmed(net)


@pytest.mark.parametrize("signal", EVERY)
def test_submodules_see_duals_only_within_the_step(net, signal):
    seen = []
    net[1].register_forward_hook(lambda module, args, out: seen.append(type(out)))
    signal_loss(lambda: net(torch.ones(2, 3)).mean(), net, EVERY[signal](), key=0)
    assert seen == [torch.Tensor if signal == "backprop" else DualTensor]
    unharmed(net)


@pytest.mark.parametrize("signal", SIGNALS)
def test_nothing_to_train(signal):
    with pytest.raises(DualInputError, match="Tanh has no parameter with requires_grad=True"):
        signal_loss(lambda: torch.ones(()), nn.Tanh(), SIGNALS[signal](), key=0)


@pytest.mark.parametrize("wrong", ["backprop", Backprop, None])
def test_not_a_signal(net, wrong):
    with pytest.raises(DualInputError, match="must be a dualnn.signals.Signal"):
        signal_loss(lambda: net(torch.ones(2, 3)).mean(), net, wrong, key=0)


def test_not_a_step(net):
    with pytest.raises(DualInputError, match="a function without arguments"):
        signal_loss(net(torch.ones(2, 3)).mean(), net, Exact(), key=0)


@pytest.mark.parametrize("signal", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_parameters(net, signal, dtype):
    net.to(dtype)
    loss = signal_loss(lambda: net(torch.ones(2, 3, dtype=dtype)).square().mean(), net, EVERY[signal](), key=0)
    loss.backward()
    assert loss.dtype == dtype
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("signal", EVERY)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_autocast(signal, name):
    """Gradients under bf16 are near those in float32."""
    found = problem(name)
    found.module.float()
    x = torch.randn(4, 1, 4, 4) if name == "cnn" else torch.randn(4, 3)
    grads = []
    for enabled in (False, True):
        found.module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = signal_loss(lambda: found.module(x).square().mean(), found.module, EVERY[signal](), key=0)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in found.module.parameters()]))
        assert all(p.grad.dtype == torch.float32 for p in found.module.parameters())
    assert float((grads[0] - grads[1]).norm()) < 0.1 * float(grads[0].norm())


@pytest.mark.parametrize("signal", [ForwardGradient(2), ActivityPerturbation(2)], ids=repr)
def test_backward_as_torch_has_it(signal):
    """A factor on the loss, a retained graph, gradients that are written to: the gradient is what it was."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)

    def loss():
        for p in net.parameters():
            p.grad = None
        return signal_loss(lambda: net(x).square().mean(), net, signal, key=3)

    def gradients():
        return [p.grad.clone() for p in net.parameters()]

    loss().backward()
    once = gradients()
    (loss() * 3).backward()
    for g, expected in zip(gradients(), once, strict=True):
        torch.testing.assert_close(g, 3 * expected)
    kept = loss()
    kept.backward(retain_graph=True)
    for p in net.parameters():
        p.grad.zero_()  # an optimizer, or clipping
    kept.backward()
    for g, expected in zip(gradients(), once, strict=True):
        torch.testing.assert_close(g, expected)
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()
    first = loss()
    first.backward()
    before = [p.grad.data_ptr() for p in net.parameters()]
    signal_loss(lambda: net(x).square().mean(), net, signal, key=3).backward()  # accumulates
    for p, g, place in zip(net.parameters(), once, before, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
        assert p.grad.data_ptr() == place
