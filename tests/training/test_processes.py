"""Local duals in several processes: the gradients of one process on the joined batch, and the same modules swapped."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dualnn.diagnosis import Report
from dualnn.diagnosis.report import Finding
from dualnn.engine.errors import UnpicklableError
from dualnn.layers import BlackBox, Dual, Smoothed, Surrogate
from dualnn.training import DualPropagation, TrainingSetupError
from dualnn.training.automatic import examine_first, merged, swapped_forwards

# Python 3.12 and later warn of a fork where torch has started threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Curve(nn.Module):
    """tanh by a loop under no_grad, with a learnable scale; on request it only cuts the graph for negative inputs."""

    def __init__(self, only_negative=False):
        super().__init__()
        self.scale, self.only_negative = nn.Parameter(torch.tensor([0.7, 1.1, 1.3])), only_negative

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.only_negative and bool((x > 0).all())):
            y = x
            for _ in range(3):
                y = y - 0.2 * torch.tanh(self.scale * y)
            return y


class Net(LightningModule):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.act, self.head = nn.Linear(3, 3), layer, nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.head(self.act(self.inner(x))) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    """16 samples in order, dealt out to the processes one by one: their batches join to those of a single process."""

    def __init__(self, signs=(1, 1)):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)
        if signs != (1, 1):
            x = x.abs() * torch.tensor(signs).repeat(8).unsqueeze(1)
        self.samples = TensorDataset(x, y)

    def train_dataloader(self):
        size, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(Subset(self.samples, range(rank, 16, size)), batch_size=8 // size)


class Keep(Callback):
    """Every process writes its weights and what it swapped."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        swapped = list(swapped_forwards(pl_module))
        torch.save((pl_module.state_dict(), swapped), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def train(module, callbacks, devices, folder, strategy="ddp_fork", **options):
    Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        max_epochs=2,
        precision="64-true",
        use_distributed_sampler=False,
        logger=False,
        callbacks=[*callbacks, Keep(folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=Data(**options))
    return [torch.load(folder / f"{devices}-{rank}.pt") for rank in range(devices)]


WAYS = {
    "layer": (lambda: Dual(Curve(), "elementwise"), list),
    "dense": (lambda: Dual(Curve(), "dense"), list),
    "names": (Curve, lambda: [DualPropagation(where=["act"])]),
    "auto": (Curve, lambda: [DualPropagation(where="auto")]),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one_on_the_joined_batch(way, tmp_path, capfd):
    layer, callbacks = WAYS[way]
    (one, _), *_ = train(Net(layer()), callbacks(), 1, tmp_path)
    first, second = train(Net(layer()), callbacks(), 2, tmp_path)
    start = Net(layer()).double().state_dict()
    for name, value in one.items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-10, atol=1e-12)
        assert torch.equal(first[0][name], second[0][name]) and not torch.equal(value, start[name])
    assert first[1] == second[1] == ([] if way in ("layer", "dense") else ["act"])
    assert capfd.readouterr().out.count("swapped for exact local duals: act") == (2 if way == "auto" else 0)


def test_a_failure_that_one_process_sees_is_swapped_in_all(tmp_path, capfd):
    module = Net(Curve(only_negative=True))
    with torch.no_grad():
        module.inner.weight.copy_(torch.eye(3))
        module.inner.bias.zero_()
    first, second = train(module, [DualPropagation(where="auto")], 2, tmp_path, signs=(1, -1))
    assert first[1] == second[1] == ["act"]
    assert capfd.readouterr().out.count("swapped for exact local duals: act") == 1


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_processes_draw_other_directions(tmp_path):
    layer = functools.partial(Dual, Curve(), "random", tangents=2)
    (one, _), *_ = train(Net(layer()), [], 1, tmp_path)
    first, second = train(Net(layer()), [], 2, tmp_path)
    assert all(torch.equal(first[0][name], value) for name, value in second[0].items())
    assert not torch.equal(first[0]["inner.weight"], one["inner.weight"])


def finding(name, kind="cut", swap="exact"):
    return Finding(name, kind, "why", "", "remedy", "cost", swap, name)


def test_reports_are_merged():
    one = Report([finding("a"), finding("b", "surrogate", None)], "Net", ("a", "b"))
    two = Report([finding("a"), finding("b"), finding("c", "unneeded", None)], "Net", ("a", "b", "c"))
    both = merged([one, two])
    assert [(f.name, f.kind) for f in both.findings] == [("a", "cut"), ("b", "cut"), ("b", "surrogate")]
    assert both.examined == ("a", "b", "c") and both.where == ["a", "b"]
    assert merged([one]) == one


def test_sync_batchnorm_is_refused():
    class Two:
        world_size = 2

    with pytest.raises(TrainingSetupError, match="SyncBatchNorm"):
        examine_first(Two(), Net(nn.SyncBatchNorm(3)), None, 0)


def closure():
    return lambda x: x * 2


HELD = {
    "Dual": (lambda: Dual(closure()), "fn"),
    "partial": (lambda: Dual(functools.partial(closure(), 1)), "fn"),
    "BlackBox": (lambda: BlackBox(closure()), "fn"),
    "its jacobian": (lambda: BlackBox(torch.tanh, jacobian=closure()), "jacobian"),
    "Smoothed": (lambda: Smoothed(closure(), 1.0, 1), "fn"),
    "Surrogate": (lambda: Surrogate(closure(), "identity"), "fn"),
}


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_a_function_that_a_spawned_process_cannot_find(name, callback, tmp_path):
    make, attribute = HELD[name]
    callbacks = [DualPropagation(where=["act"])] if callback else []
    with pytest.raises(UnpicklableError, match=r"closure\.<locals>\.<lambda>.*test_processes\.py:\d+") as caught:
        train(Net(make()), callbacks, 2, tmp_path, "ddp_spawn")
    said = str(caught.value)
    assert f"as .{attribute}" in said and "top level" in said
    assert ("act holds" in said) == callback
    assert not list(tmp_path.iterdir())


def test_a_patched_forward_that_a_spawned_process_cannot_find(tmp_path):
    net = Net(nn.Tanh())
    net.act.forward = closure()
    with pytest.raises(UnpicklableError, match=r"act holds .*closure.* as \.forward"):
        train(net, [DualPropagation(where=["act"])], 2, tmp_path, "ddp_spawn")


@pytest.mark.slow  # two processes that import torch
def test_importable_functions_are_spawned(tmp_path):
    net = Net(Dual(torch.tanh, "elementwise"))
    first, second = train(net, [DualPropagation(where=["inner"])], 2, tmp_path, "ddp_spawn")
    assert first[1] == second[1] == ["inner"]
