"""A small network, small data and a trainer that says nothing."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from dualnn.data import ClassificationData, Split, TensorSplit
from dualnn.models import MLP


class Blobs(ClassificationData):
    """Three clouds of points in four dimensions: 40 training samples."""

    num_classes, input_shape = 3, (4,)

    def load(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(60) % 3
        x = torch.randn(60, 4, generator=generator) + torch.nn.functional.one_hot(y, 4) * 2
        return Split(TensorSplit(x[:40], y[:40]), TensorSplit(x[40:50], y[40:50]), TensorSplit(x[50:], y[50:]))


@pytest.fixture
def blobs():
    return lambda: Blobs(batch_size=8)


@pytest.fixture
def make_mlp():
    """A 4-6-3 network; its weights follow from the seed."""

    def make(cls=MLP, lr=0.1, seed=0, **kwargs):
        seed_everything(seed, verbose=False)
        options = {"in_features": 4, "hidden": [6], "classes": 3, "activation": "Tanh"} | kwargs
        return cls(**options, optimizer=lambda params: torch.optim.SGD(params, lr=lr))

    return make


@pytest.fixture
def make_trainer(monkeypatch):
    # seed_everything leaves its seed in the environment: give it back after the test.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def make(*callbacks, **options):
        options = {"max_epochs": 2, "logger": False} | options
        return Trainer(
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )

    return make
