"""What every signal must pass."""

import pytest
import torch

from dualnn.signals import ActivityPerturbation, Backprop, Exact, ForwardGradient, signal_loss
from tests.signals.estimators import (
    MIXING,
    NAMES,
    assert_exact,
    assert_unbiased,
    gradient,
    problem,
    random_states,
)


def _size(module):
    return sum(p.numel() for p in module.parameters())


FULL = {
    "weights": lambda m: ForwardGradient(_size(m), "basis"),
    "weights-rank1": lambda m: ForwardGradient(_size(m), "basis", rank=1),
    "exact": lambda m: Exact(),
    "exact-chunks": lambda m: Exact(chunk=7),
    "activity": lambda m: ActivityPerturbation(128, sampler="basis"),
    "activity-batch": lambda m: ActivityPerturbation(320, per_sample=False, sampler="basis"),
    "checkpointed": lambda m: Backprop(checkpoint=[name for name, _ in m.named_children()] or ["*"]),
}
RANDOM = {
    f"{name}-{sampler}": (lambda k=kind, s=sampler: k(s))
    for sampler in ("rademacher", "gaussian")
    for name, kind in {
        "weights": lambda s: ForwardGradient(3, s),
        "weights-rank1": lambda s: ForwardGradient(3, s, rank=1),
        "weights-rank2": lambda s: ForwardGradient(3, s, rank=2),
        "activity": lambda s: ActivityPerturbation(3, sampler=s),
        "activity-batch": lambda s: ActivityPerturbation(3, per_sample=False, sampler=s),
    }.items()
}
EVERY = {
    **RANDOM,
    "backprop": Backprop,
    "exact": Exact,
    "exact-chunks": lambda: Exact(chunk=7),
}


@pytest.mark.parametrize("signal", FULL)
@pytest.mark.parametrize("name", NAMES)
def test_full_basis_gives_the_gradient(name, signal):
    if (signal == "activity" and name in MIXING) or (signal == "checkpointed" and name == "logistic"):
        pytest.skip("not defined there")
    found = problem(name)
    assert_exact(found, FULL[signal](found.module))


@pytest.mark.parametrize("signal", RANDOM)
def test_estimates_are_unbiased(signal):
    assert_unbiased(problem("mlp"), RANDOM[signal]())


@pytest.mark.parametrize("signal", ["weights-rank1-rademacher", "activity-gaussian"])
def test_estimates_are_unbiased_on_a_convnet(signal):
    assert_unbiased(problem("cnn"), RANDOM[signal](), keys=200)


@pytest.mark.parametrize("signal", EVERY)
def test_the_key_decides(signal):
    found = problem("mlp")
    one, again, other = (gradient(found, EVERY[signal](), key) for key in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    if signal in RANDOM:
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("signal", EVERY)
def test_value_and_random_states_are_those_of_the_plain_step(signal):
    found = problem("dropout")
    torch.manual_seed(5)
    value = found.step().detach()
    states = random_states()
    torch.manual_seed(5)
    loss = signal_loss(found.step, found.module, EVERY[signal](), key=9)
    loss.backward()
    assert torch.equal(loss.detach(), value)
    assert type(loss) is torch.Tensor and loss.requires_grad
    assert random_states() == states


@pytest.mark.parametrize("signal", EVERY)
def test_buffers_are_those_of_the_plain_step(signal):
    if signal.startswith("activity-") and "batch" not in signal:
        pytest.skip("BatchNorm mixes samples")
    found, control = (torch.manual_seed(2) and problem("batchnorm") for _ in range(2))
    control.step()
    signal_loss(found.step, found.module, EVERY[signal](), key=0).backward()
    for ours, theirs in zip(found.module.buffers(), control.module.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("signal", EVERY)
def test_backward_adds_and_scales(signal):
    found = problem("mlp")
    once = gradient(found, EVERY[signal](), key=1)
    for factor in (1.0, 65536.0):
        torch.manual_seed(1)
        (signal_loss(found.step, found.module, EVERY[signal](), key=1) * factor).backward()
    for p, g in zip(found.module.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 65537 * g)


@pytest.mark.parametrize("signal", EVERY)
def test_the_scaled_loss_of_a_step_scales_the_gradient(signal):
    found = problem("mlp")
    once = gradient(found, EVERY[signal]())
    thrice = gradient(found._replace(step=lambda: 3 * found.step()), EVERY[signal]())
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("signal", EVERY)
def test_frozen_parameters_are_left_alone(signal):
    found = problem("mlp")
    found.module[0].weight.requires_grad_(False)
    signal_loss(found.step, found.module, EVERY[signal](), key=0).backward()
    assert [p.grad is None for p in found.module.parameters()] == [True, False, False, False]


@pytest.mark.parametrize("signal", EVERY)
def test_gradients_belong_to_a_plain_optimizer(signal):
    found = problem("mlp")
    optimizer = torch.optim.Adam(found.module.parameters(), lr=0.01)
    first = found.step().item()
    for key in range(60):
        optimizer.zero_grad()
        signal_loss(found.step, found.module, EVERY[signal](), key).backward()
        torch.nn.utils.clip_grad_norm_(found.module.parameters(), 1.0)
        optimizer.step()
    assert found.step().item() < first
