"""The doctor leaves no trace: parameters, buffers, gradients, hooks, modes, attributes, inputs, generators."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dualnn as dn
from dualnn.diagnosis.state import ModuleState, RandomStates
from tests.diagnosis import patients


class Messy(nn.Module):
    """Changes all that it can: statistics, a counter, a cache, a list, its own weights, its input, the generators."""

    def __init__(self, raises: bool = False) -> None:
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.act = patients.NewtonNoGrad()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.history: list[float] = []
        self.cache: dict[str, Any] = {"last": None}
        self.raises = raises

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        x.add_(1.0)
        self.lin.weight.data.clamp_(-0.4, 0.4)
        y = self.act(self.drop(self.norm(self.lin(x))))
        self.history.append(float(y.sum()) + random.random() + float(np.random.rand()))
        self.cache["last"] = y
        self.late = y
        if self.raises:
            raise ArithmeticError("on purpose")
        return y


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "identities": [id(p) for p in model.parameters()] + [id(b) for b in [model.norm.running_mean]],
        "versions": [b._version for b in model.norm.buffers()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "keys": [sorted(m.__dict__) for m in model.modules()],
        "attributes": (model.calls, list(model.history), dict(model.cache)),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("budget", [None, 10])
def test_nothing_changes(raises: bool, budget: int | None) -> None:
    model = Messy(raises)
    model.norm.eval()
    model.lin.weight.grad = torch.ones(3, 3)
    model.lin.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 3)
    before, given = everything(model), x.clone()
    report = dn.doctor(model, x, memory_budget=budget)
    after = everything(model)
    changed = [k for k in before if not same(before[k], after[k])]
    assert not changed
    assert torch.equal(x, given) and x.grad is None
    assert [f.name for f in report.failures if f.kind == "cut"] == ["act"]
    assert ("on purpose" in str(report)) == raises


def test_a_forward_that_raises_is_a_finding_with_its_line() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Messy(raises=True))
    report = dn.doctor(model, torch.randn(4, 3))
    finding = next(f for f in report.failures if "on purpose" in f.cause)
    assert finding.kind == "raises" and finding.name == "1" and "test_untouched.py:" in finding.line


def test_wrong_inputs_are_a_finding() -> None:
    report = dn.doctor(nn.Sequential(nn.Linear(3, 3)), torch.randn(4, 5))
    (finding,) = report.failures
    assert finding.name == "0" and "shapes cannot be multiplied" in finding.cause


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_grad_mode(mode: Any) -> None:
    with mode():
        x = torch.randn(4, 3)
        report = dn.doctor(nn.Sequential(nn.Linear(3, 3), patients.NewtonNoGrad()), x)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert [f.name for f in report.failures] == ["1"]


def test_a_pending_backward_still_works() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    x = torch.randn(4, 3)
    loss = model(x).sum()
    assert dn.doctor(model, x).ok
    loss.backward()  # raises if a saved tensor was written to
    assert model[0].weight.grad is not None


def test_user_hooks_keep_their_order() -> None:
    order: list[str] = []
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda *_: order.append("pre"))
    layer.register_forward_hook(lambda *_: order.append("post"))
    dn.doctor(nn.Sequential(layer), torch.randn(2, 3))
    order.clear()
    layer(torch.randn(2, 3))
    assert order == ["pre", "post"]


def test_a_module_that_keeps_its_last_result() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.last = torch.tanh(self.lin(x))
            return self.last

    model = Keeps()
    kept = model(torch.randn(2, 3))  # torch does not deep-copy such a tensor
    assert dn.doctor(model, torch.randn(2, 3)).findings == []
    assert model.last is kept


def test_a_module_that_cannot_be_copied_is_said_to_be_unexamined() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.stream = nn.Linear(3, 3), (i for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.lin(x))

    report = dn.doctor(Holds(), torch.randn(2, 3))
    assert report.ok and [(f.name, f.kind) for f in report.findings] == [("", "unexamined")]
    assert "cannot pickle 'generator'" in report.findings[0].cause


def test_bad_calls() -> None:
    with pytest.raises(dn.engine.errors.DualInputError, match="torch.nn.Module, got function"):
        dn.doctor(lambda x: x, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(dn.engine.errors.DualInputError, match="lazy parameters"):
        dn.doctor(nn.LazyLinear(3), torch.ones(1, 2))


def test_module_state_restores_shapes_and_containers() -> None:
    layer = nn.Linear(2, 2)
    layer.notes = [1]  # type: ignore[assignment]
    state = ModuleState(layer)
    weight = layer.weight.detach().clone()
    layer.weight.data = torch.zeros(3, 3)
    layer.notes.append(2)  # type: ignore[operator, union-attr]
    layer.extra = 1  # type: ignore[assignment]
    layer.weight.requires_grad_(False)
    state.restore()
    assert torch.equal(layer.weight, weight) and layer.weight.requires_grad
    assert layer.notes == [1] and not hasattr(layer, "extra")


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_an_estimate_goes_on_with_its_own_directions() -> None:
    model = nn.Sequential(nn.Linear(3, 3), dn.layers.Dual(lambda x: x.flip(0) * x, "random", tangents=2))
    x = torch.randn(4, 3)
    for calls in range(2):
        twin = copy.deepcopy(model)
        dn.doctor(model, x)
        grads = [torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (model, twin)]
        assert model[1].local.calls == twin[1].local.calls == calls + 1
        assert same(*grads)


def test_random_states() -> None:
    states = RandomStates()
    first = (torch.rand(()), random.random(), np.random.rand())
    states.restore()
    assert (torch.rand(()), random.random(), np.random.rand()) == first
