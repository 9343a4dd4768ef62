import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from dualnn.data import Digits
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.models import CNN, MLP, Classifier, LogisticRegression

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_logistic_regression_learns_the_digits():
    torch.manual_seed(0)
    data, model = Digits(shuffle_seed=0), LogisticRegression()
    trainer = Trainer(max_epochs=15, **QUIET)
    trainer.fit(model, data)
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= trainer.callback_metrics.keys()
    (test,) = trainer.test(model, data, verbose=False)
    assert test["test/acc"] >= 0.95
    logits = torch.cat(trainer.predict(model, data))
    accuracy = (logits.argmax(1) == data.split.test.y).float().mean()
    assert accuracy == pytest.approx(test["test/acc"])


@pytest.mark.parametrize("model", [LogisticRegression, MLP, CNN])
def test_training_lowers_the_loss(model):
    torch.manual_seed(0)
    trainer = Trainer(max_epochs=3, **QUIET)
    data, model = Digits(as_image=True, shuffle_seed=0), model()
    before = trainer.validate(model, data, verbose=False)[0]["val/loss"]
    trainer.fit(model, data)
    assert trainer.callback_metrics["val/loss"] < before / 2


def test_names_of_the_parts():
    assert [n for n, _ in MLP(hidden=[3, 4]).net.named_children()] == [
        "flatten", "linear0", "act0", "linear1", "act1", "head",
    ]  # fmt: skip
    assert [n for n, _ in CNN(channels=[3]).net.named_children()] == ["conv0", "act0", "pool0", "flatten", "head"]
    assert isinstance(MLP().net, nn.Sequential)


def test_mlp_without_hidden_layers_is_logistic_regression():
    mlp, logistic = MLP(hidden=[]), LogisticRegression()
    mlp.load_state_dict(logistic.state_dict())
    x = torch.randn(5, 64)
    assert torch.equal(mlp(x), logistic(x))


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8), (64, 1)])
def test_mlp_takes_inputs_of_any_shape(shape):
    assert MLP()(torch.zeros(3, *shape)).shape == (3, 10)


@pytest.mark.parametrize("size", [8, 28])
def test_cnn_fits_its_images(size):
    assert CNN(input_shape=(1, size, size))(torch.zeros(3, 1, size, size)).shape == (3, 10)


def test_step_is_cross_entropy():
    model = MLP(hidden=[8])
    x, y = torch.randn(6, 64), torch.randint(10, (6,))
    loss = Classifier._step(_silent(model), (x, y), "train")
    expected = -model(x).log_softmax(1)[torch.arange(6), y].mean()
    torch.testing.assert_close(loss, expected)


def _silent(model):
    model.log_dict = lambda *args, **kwargs: None
    return model


def test_optimizer_is_configurable():
    assert isinstance(MLP().configure_optimizers(), torch.optim.SGD)
    assert MLP().configure_optimizers().param_groups[0]["lr"] == 0.1
    assert isinstance(MLP(optimizer=torch.optim.Adam).configure_optimizers(), torch.optim.Adam)


def test_copies_are_independent():
    model = MLP()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.net.head.weight)
    assert model.net.head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(hidden=[8, 0]), r"must be positive, got \[64, 8, 0, 10\]"),
        (lambda: MLP(hidden=[-1]), "must be positive"),
        (lambda: MLP(in_features=0), "must be positive"),
        (lambda: LogisticRegression(classes=0), "must be positive"),
        (lambda: CNN(channels=[4, 0]), "must be positive"),
        (lambda: CNN(channels=[4, 4, 4, 4]), "4 blocks each halve a 8 x 8 image: at most 3 fit"),
    ],
)
def test_bad_sizes_are_named(build, message):
    with pytest.raises(DualInputError, match=message):
        build()


@pytest.mark.parametrize("model", [MLP, CNN])
def test_unknown_activation_names_the_nearest(model):
    with pytest.raises(UnknownNameError, match="did you mean 'Tanh'"):
        model(activation="Tahn")
