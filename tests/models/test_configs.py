"""The committed YAML files build what they name, and fit one another."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

CONFIGS = Path(__file__).parents[2] / "configs"


def build(kind, name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments({"data": LightningDataModule, "model": LightningModule}[kind], kind)
    parser.add_argument("--config", action="config")
    return parser.instantiate_classes(parser.parse_args([f"--config={CONFIGS / kind / name}.yaml"]))[kind]


def names(kind):
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


@pytest.mark.parametrize("name", names("data"))
def test_data(name):
    data = build("data", name)
    assert data.num_classes == 10 and data.batch_size == 64


@pytest.mark.parametrize("name", names("model"))
def test_models_fit_their_data(name):
    data = build("data", "digits_image" if name == "cnn" else "digits")
    x, y = next(iter(data.train_dataloader()))
    model = build("model", name)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize("kind", ["data", "model"])
def test_headers_show_the_command(kind):
    for name in names(kind):
        header = (CONFIGS / kind / f"{name}.yaml").read_text().split("\ndata:")[0].split("\nmodel:")[0]
        assert "#   dualnn fit --config configs/base.yaml" in header and f"configs/{kind}/{name}.yaml" in header
