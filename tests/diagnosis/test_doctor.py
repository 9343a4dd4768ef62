"""Every kind of failure is found, with its line; the printed remedy works when it is applied."""

import functools
import linecache
import sys
import types
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import dualnn as dn
from dualnn.diagnosis import Report
from tests.diagnosis import patients
from tests.diagnosis.patients import PATIENTS, marked_lines


def diagnosed(name: str) -> tuple[nn.Module, tuple, Report]:
    torch.manual_seed(0)
    patient = PATIENTS[name]
    inputs = patient.inputs()
    model = patient.build()
    return model, inputs, dn.doctor(model, *inputs)


def test_there_are_enough_patients() -> None:
    assert len(PATIENTS) >= 30


@pytest.mark.parametrize("name", PATIENTS)
def test_the_failure_is_found_where_it_is(name: str) -> None:
    patient = PATIENTS[name]
    _, _, report = diagnosed(name)
    assert not report.ok
    (finding,) = report.findings
    assert (finding.kind, finding.path, finding.swap) == (patient.kind, patient.path, patient.swap)
    assert finding.cause and finding.remedy and finding.cost
    if patient.line:
        file, line = finding.line.rsplit(":", 1)
        assert file.endswith("patients.py") and int(line) in marked_lines(getattr(patients, name))


CODE = [n for n, p in PATIENTS.items() if p.kind != "memory"]


@pytest.mark.parametrize("name", CODE)
def test_the_remedy_works(name: str) -> None:
    patient = PATIENTS[name]
    model, inputs, report = diagnosed(name)
    finding = report.findings[0]
    if finding.remedy.startswith("#"):
        assert name in {
            "ThroughList", "LosesAFactor", "ForgetsAnInput", "BucketEdges", "PicksAnEmbedding", "RepeatedEigenvalues"
        }  # fmt: skip
        return
    if "model" in finding.remedy:
        scope: dict[str, Any] = {"dn": dn, "model": model, "torch": torch}
        exec(finding.remedy, scope)
        cured = scope["model"]
    else:
        cured = rewritten_model(name, finding.line, finding.remedy)
    report = dn.doctor(cured, *inputs)
    # A surrogate's derivative is another function's: the doctor says so, and calls it no failure.
    allowed = {"surrogate"} if patient.kind == "flat" else set()
    kinds = {f.kind for f in report.findings} - allowed
    if finding.swap == "estimate":
        kinds -= {"wrong", "cut", "unexamined"}  # the smoothed function's gradient is not the hard one's
    assert not kinds, str(report)
    loss = cured(*inputs).square().sum()
    gradients = torch.autograd.grad(loss, [p for p in cured.parameters()], allow_unused=True)
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def rewritten_model(name: str, where: str, remedy: str) -> nn.Module:
    """The patient built from its source with the line exchanged for the remedy."""
    line = int(where.rsplit(":", 1)[1])
    source = linecache.getlines(patients.__file__)
    indent = source[line - 1][: len(source[line - 1]) - len(source[line - 1].lstrip())]
    text = "".join([*source[: line - 1], indent + remedy + "\n", *source[line:]])
    module = types.ModuleType("cured_patients")
    sys.modules["cured_patients"] = module  # dataclasses look their module up
    try:
        # A file of its own: the doctor reads lines from it, pytest and inspect do not mind.
        exec(compile(text, "<cured>", "exec"), module.__dict__)
    finally:
        del sys.modules["cured_patients"]
    return module.PATIENTS[name].build()


def test_exact_local_duals_have_the_gradient_of_differences() -> None:
    model, (x,), report = diagnosed("NewtonNoGrad")
    model, x = model.double(), x.double()
    dn.layers.swap_forward(model, report.where)
    model(x).sum().backward()
    step = torch.zeros_like(model[0].bias)
    step[1] = 1e-5
    bias = model[0].bias.detach().clone()
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            model[0].bias.copy_(bias + sign * step)
            sums.append(float(model(x).sum()))
    assert abs(float(model[0].bias.grad[1]) - (sums[0] - sums[1]) / 2e-5) < 1e-7


class Memorable(nn.Module):
    """Three hundred steps on four numbers: right by backprop, which keeps them all."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(300):
            x = x - 0.005 * torch.sin(x)
        return x


def test_memory_over_budget() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Memorable())
    x = torch.randn(2, 3)
    assert dn.doctor(model, x).ok
    assert dn.doctor(model, x, memory_budget=1_000_000).ok
    report = dn.doctor(model, x, memory_budget=5_000)
    (finding,) = report.findings
    assert (finding.kind, finding.name, finding.swap) == ("memory", "1", "exact")
    assert "budget is 4.883 KiB" in finding.cause and "K = 1" in finding.cost
    want = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    exec(finding.remedy, {"dn": dn, "model": model})
    assert dn.doctor(model, x, memory_budget=5_000).ok
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), model[0].weight)[0], want)


def test_memory_of_weights_is_recomputed() -> None:
    wide = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())])
    model = nn.Sequential(nn.Linear(8, 64), wide)
    x = torch.randn(32, 8)
    report = dn.doctor(model, x, memory_budget=40_000)
    (finding,) = report.findings
    assert (finding.name, finding.swap) == ("1", None)
    before = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    exec(finding.remedy, {"torch": torch, "model": model, "functools": functools})
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), model[0].weight)[0], before)


class Straight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.round(x) - x).detach()


class StopGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach()


class Metric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.metric = nn.Linear(3, 3), Metric()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.lin(x)
        self.seen.append(float(y.mean()))
        with torch.no_grad():
            self.size = y.square().mean()
        return torch.tanh(y), self.metric(y)


@pytest.mark.parametrize(("layer", "kind"), [(Straight(), "surrogate"), (StopGradient(), "stop-gradient")])
def test_what_is_meant_is_information(layer: nn.Module, kind: str) -> None:
    report = dn.doctor(nn.Sequential(nn.Linear(3, 3), layer), torch.randn(4, 3))
    assert report.ok and [f.kind for f in report.findings] == [kind]


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
@pytest.mark.parametrize(
    "make", [lambda: dn.layers.Dual(Mixes(), "random", tangents=2), lambda: dn.layers.Smoothed(torch.tanh, 0.5, 20)]
)
def test_an_estimate_is_no_failure(make: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 2))
    report = dn.doctor(model, torch.randn(9, 8))
    assert report.ok and [(f.kind, "on purpose" in f.cause) for f in report.findings] == [("unexamined", True)]


class Mixes(nn.Module):
    """All numbers of the batch, unseen by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(x + x.flip(0).cumsum(1) * x.mean())


@pytest.mark.parametrize(("rows", "remedy"), [(40, "structure='random', tangents=256"), (4, "(model, ['1'])")])
def test_what_no_exact_structure_fits_is_estimated(rows: int, remedy: str) -> None:
    model = nn.Sequential(nn.Linear(30, 30), Mixes(), nn.Linear(30, 2))
    report = dn.doctor(model, torch.randn(rows, 30))
    (finding,) = report.failures
    assert remedy in finding.remedy
    if rows == 40:  # 1,200 numbers that mix: too many for a dense Jacobian
        assert (finding.swap, finding.tangents, report.estimates) == ("estimate", 256, {"1": 256})
        assert f"relative variance is about (n + 1) / K = {1201 / 256:.3g}, with n = 1200" in finding.cost
        assert report.where == [] and not report.ok
    else:
        assert (finding.swap, finding.tangents, report.where) == ("exact", None, ["1"])


def test_an_estimate_of_a_wrong_dual_pass_is_not_proposed() -> None:
    class Hides(Mixes):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.detach().sin()

    report = dn.doctor(nn.Sequential(nn.Linear(30, 30), Hides(), nn.Linear(30, 2)), torch.randn(40, 30))
    (finding,) = report.failures
    assert finding.swap is None and report.estimates == {}


def test_block_is_named_where_samples_do_not_mix() -> None:
    class Soft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x.softmax(-1)

    report = dn.doctor(nn.Sequential(nn.Linear(3, 3), Soft()), torch.randn(4, 3))
    assert report.findings[0].remedy == "dn.layers.swap_forward(model, ['1'], structure='block')"


def test_our_own_quantiser_is_information() -> None:
    report = dn.doctor(nn.Sequential(nn.Linear(3, 3), dn.activations.get("quantize")), torch.randn(4, 3))
    assert report.ok and [f.kind for f in report.findings] == ["surrogate"]


def test_values_read_for_a_log_are_no_failure() -> None:
    model = Logging()
    assert dn.doctor(model, torch.randn(4, 3)).findings == []
    assert model.seen == [] and not hasattr(model, "size")


def test_a_cut_before_which_nothing_is_trained_is_information() -> None:
    model = nn.Sequential(patients.NewtonNoGrad(), nn.Linear(3, 2))
    report = dn.doctor(model, torch.randn(4, 3))
    assert report.ok and [(f.kind, f.name) for f in report.findings] == [("unneeded", "0")]
    assert not dn.doctor(model, torch.randn(4, 3, requires_grad=True)).ok
    assert not dn.doctor(patients.NewtonNoGrad(), torch.randn(4, 3)).ok  # nothing else there: the input is meant


def test_two_failures_and_one_in_the_code_around_them() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b, self.odd = nn.Linear(3, 3), patients.NewtonNoGrad(), nn.Linear(3, 3), Spike()

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.a(x))
            with torch.no_grad():
                h = torch.sin(h)
            return self.b(h)

    class Spike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x.dtype)

    report = dn.doctor(Whole(), torch.randn(4, 3))
    assert [(f.name, f.kind) for f in report.failures] == [("", "cut"), ("act", "cut")]


def test_a_compiled_module_has_its_own_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(patients.NewtonNoGrad()))
    x = torch.randn(4, 3)
    (finding,) = dn.doctor(model, x).findings
    assert (finding.name, finding.path) == ("1", "1._orig_mod")


def test_a_frozen_part_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), patients.NewtonNoGrad(), nn.Linear(3, 2))
    report = dn.doctor(model, torch.randn(4, 3))
    assert report.ok


def test_single_precision_constants() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.eye(3) + torch.ones(3, dtype=torch.float32)

    class Lost(Constant):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    assert dn.doctor(nn.Sequential(nn.Linear(3, 3), Constant()), torch.randn(4, 3)).findings == []
    (finding,) = dn.doctor(nn.Sequential(nn.Linear(3, 3), Lost()), torch.randn(4, 3)).findings
    assert (finding.kind, finding.name) == ("cut", "1")


def test_overflow_that_double_precision_does_not_have() -> None:
    class Big(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = 1e-25 * x
            return 1e25 * torch.sqrt(z * z)  # the square underflows

    model = nn.Sequential(nn.Linear(3, 3), Big())
    report = dn.doctor(model, torch.randn(4, 3))
    assert [f.kind for f in report.failures] == ["nonfinite"]
    assert "float64 it is finite" in report.failures[0].cause


def test_a_lightning_style_step_is_examined() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Tensor]:
            x, y = batch
            return {"loss": nn.functional.mse_loss(self.lin(x).detach(), y)}

    batch = (torch.randn(4, 3), torch.randn(4, 2))
    report = dn.diagnosis.examine(Step(), (batch, 0), {}, method="training_step")
    (finding,) = report.failures
    assert (finding.name, finding.kind, finding.op) == ("", "cut", "detach")
    assert finding.remedy == "return {'loss': nn.functional.mse_loss(self.lin(x), y)}"
