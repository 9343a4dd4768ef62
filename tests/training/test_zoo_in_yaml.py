"""Activations and layers named in a configuration of `dualnn fit`: built by its parser, trained by its trainer."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from dualnn import activations
from dualnn.layers import ODEBlock
from dualnn.training.cli import main
from dualnn.training.dual_cli import DualCLI

ONE_STEP = {
    "accelerator": "cpu",
    "max_steps": 1,
    "limit_val_batches": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def config(**model):
    return {"seed_everything": 0, "trainer": ONE_STEP, "data": {"class_path": "Digits"}, "model": model}


def trained(written):
    """The model after the step that a configuration asks for, and its weights before."""
    cli = DualCLI(yaml.safe_load(yaml.safe_dump(written)), run=False, save_config=False)
    before = {name: p.detach().clone() for name, p in cli.model.named_parameters()}
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 1
    return cli.model, before


@pytest.mark.parametrize("name", activations.available())
def test_every_activation_is_named_and_trained(name):
    model, before = trained(config(class_path="MLP", init_args={"hidden": [6], "activation": name}))
    assert type(model.net.act0) is activations.get_class(name)
    for key, p in model.named_parameters():
        assert bool(p.isfinite().all()), key
    assert not torch.equal(model.net.linear0.weight, before["net.linear0.weight"])


def test_its_arguments_are_written_beside_it():
    options = {"damping": 2.0, "method": "dopri5", "steps": 4}
    arguments = {"hidden": [6], "activation": "van_der_pol", "activation_kwargs": options}
    model, _ = trained(config(class_path="MLP", init_args=arguments))
    act = model.net.act0
    assert (act.method, act.steps) == ("dopri5", 4)
    torch.testing.assert_close(act.natural()[0], torch.full((6,), 2.0), rtol=0.1, atol=0)


class Field(torch.nn.Module):
    """Of 64 numbers, the pixels: the first ten at the end are the logits."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, t, y):
        return torch.tanh(self.linear(y)) * (1 + t)


def test_a_neural_ode():
    arguments = {"fn": {"class_path": f"{__name__}.Field"}, "t": [0.0, 1.0], "rtol": 1e-3}
    net = {"class_path": "dualnn.layers.ODEBlock", "init_args": arguments}
    model, before = trained(config(class_path="Classifier", init_args={"net": net}))
    assert type(model.net) is ODEBlock and bool(model.net.stats.done.all())
    assert not torch.equal(model.net.fn.linear.weight, before["net.fn.linear.weight"])


@pytest.mark.parametrize("name", ["van_der_pol", "sparsemax"])
def test_the_command(name, capsys):
    Path("zoo.yaml").write_text(yaml.safe_dump(config(class_path="MLP", init_args={"hidden": [6], "activation": name})))
    assert main(["fit", "--config", "zoo.yaml"]) == 0
    assert "1 steps: train/acc" in capsys.readouterr().out
