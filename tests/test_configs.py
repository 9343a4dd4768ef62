"""Every YAML under configs/ and experiments/ runs, and does what its header says."""

import re
import shlex
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dualnn.training.cli import main
from dualnn.training.compare import load_experiment
from dualnn.training.compare.experiment import overlay
from dualnn.training.compare.run import train
from dualnn.training.errors import RunError

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs" / "base.yaml"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*/compare.yaml"))
OTHERS = sorted(set((ROOT / "experiments").rglob("*.yaml")) - set(EXPERIMENTS))
FEW = {"max_epochs": 1, "check_val_every_n_epoch": 1, "limit_train_batches": 2, "limit_val_batches": 1}
ARMS = [(file, name) for file in EXPERIMENTS for name in yaml.safe_load(file.read_text())["arms"]]


def ident(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def commands(file):
    """The command lines of a file's header."""
    lines = re.findall(r"^# +dualnn (.*?)(?: {2,}.*)?$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [[str(ROOT / word) if word.endswith(".yaml") else word for word in shlex.split(line)] for line in lines]


@pytest.mark.parametrize("file", [*CONFIGS, *OTHERS], ids=ident)
def test_the_commands_of_the_header_run(file):
    if file.name == "mnist.yaml":
        write_mnist(Path(".data/MNIST/raw"))
    assert commands(file), "the header shows no command"
    for words in commands(file):
        assert str(file) in words or file == BASE
        for name, value in FEW.items():
            words += [f"--trainer.{name}", str(value)]
        words += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
        # The doctor is shown on what fails: its findings are its exit code.
        assert main(words) == (1 if words[0] == "doctor" else 0)


def write_mnist(folder):
    """Noise in MNIST's format."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = torch.randint(0, 256, (40, 28, 28)), torch.arange(40) % 10
        for name, data in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">{1 + data.ndim}i", 0x800 + data.ndim, *data.shape)
            (folder / name).write_bytes(head + data.to(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(("file", "name"), ARMS, ids=ident)
def test_arms_run(file, name):
    experiment = load_experiment(file, fast=True)
    arm = experiment.arms[name]
    few = replace(arm, config=overlay(arm.config, {"trainer": FEW}))
    if arm.fails:  # that is what the experiment shows
        with pytest.raises(RunError):
            train(experiment, few, experiment.seeds[0], logs=None)
        return
    assert train(experiment, few, experiment.seeds[0], logs=None)["steps"] == 2


@pytest.mark.parametrize("file", EXPERIMENTS, ids=ident)
def test_an_experiment_is_complete(file):
    experiment = load_experiment(file)
    assert experiment.name == file.parent.name and len(experiment.seeds) >= 3
    for arm in experiment.arms.values():
        grid = experiment.tuning.grid
        assert grid[0] < arm.lr < grid[-1], f"{arm.name}: the committed lr {arm.lr} lies at the edge of the grid"
        assert arm.lr in grid
    readme = (file.parent / "README.md").read_text(encoding="utf-8")
    assert f"dualnn compare --config experiments/{experiment.name}/compare.yaml" in readme
    missing = [name for name in experiment.arms if f"`{name}`" not in readme]
    assert not missing, f"{file.parent.name}/README.md does not say what {missing} are"
