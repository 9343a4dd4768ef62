"""``where="auto"``: found, said, swapped, undone; and a resumed run keeps what was chosen."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dualnn.data import Digits
from dualnn.layers import Dual
from dualnn.models import FailingMLP
from dualnn.training import DualPropagation, TrainingSetupError
from dualnn.training.automatic import examine_step, to_swap
from dualnn.training.cli import main

FOUR = ["net.act0", "net.act1", "net.act2", "net.act3"]


def fit(model, callbacks, steps=6, logger=False, **kwargs):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, Digits(batch_size=64), **kwargs)
    return trainer


def seeded(**kwargs):
    torch.manual_seed(3)
    return FailingMLP(width=16, **kwargs)


def batch():
    data = Digits(batch_size=32)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_the_four_failures_are_found_with_their_lines():
    report = examine_step(seeded(), batch(), 0)
    kinds = {f.name: f.kind for f in report.failures}
    assert kinds == {"net.act0": "raises", "net.act1": "cut", "net.act2": "raises", "net.act3": "nonfinite"}
    assert all("failing.py" in f.line or "newton_tanh.py" in f.line for f in report.failures)
    assert to_swap(report) == dict.fromkeys(FOUR)


def test_auto_trains_as_hand_written_derivatives_do(capsys):
    torch.set_default_dtype(torch.float64)
    try:
        auto, hand = seeded().double(), seeded(failing=[]).double()
        fit_double(auto, [DualPropagation(where="auto")])
        fit_double(hand, [])
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(auto.state_dict().items(), hand.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)
    said = capsys.readouterr().out
    assert "swapped for exact local duals: " + ", ".join(FOUR) in said


def fit_double(model, callbacks):
    class Double(Digits):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0].double(), batch[1]]

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=5, logger=False, callbacks=callbacks, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(model, Double(batch_size=64))


def test_everything_is_undone_and_the_state_dict_loads_into_the_plain_module():
    model = seeded()
    names = list(model.state_dict())
    fit(model, [DualPropagation(where="auto")], steps=2)
    assert all("forward" not in vars(m) for m in model.modules())
    assert not {"log", "log_dict"} & vars(model).keys()
    assert list(model.state_dict()) == names
    seeded().load_state_dict(model.state_dict())


def test_everything_is_undone_when_the_run_breaks():
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("on purpose")

    model = seeded()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, [DualPropagation(where="auto"), Breaks()])
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_healthy_module_is_left_alone(capsys):
    model = seeded(failing=[])
    callback = DualPropagation(where="auto")
    fit(model, [callback], steps=1)
    assert "nothing to swap: backprop works" in capsys.readouterr().out
    assert callback.state_dict()["swapped"] == {}


def test_the_examination_does_not_change_the_run():
    """Weights after training are those of a run that was told the names: no random number was used up."""
    auto, named = seeded(), seeded()
    fit(auto, [DualPropagation(where="auto")])
    fit(named, [DualPropagation(where=FOUR)])
    for a, b in zip(auto.parameters(), named.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_report_is_written_to_tensorboard(tmp_path):
    fit(seeded(), [DualPropagation(where="auto")], steps=1, logger=TensorBoardLogger(tmp_path, name="", version="run"))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "doctor/text_summary" in events.Tags()["tensors"]


def test_what_has_no_exact_remedy_ends_the_run_with_its_remedy():
    class Rounds(FailingMLP):
        def __init__(self):
            super().__init__(width=16, failing=[])
            self.net.act0 = Round()

    with pytest.raises(TrainingSetupError, match=r"net\.act0.*Remedy"):
        fit(Rounds(), [DualPropagation(where="auto")], steps=1)


class Wide(torch.nn.Module):
    """Mixes the batch under no_grad: no exact structure but a dense one, which is too wide."""

    def forward(self, x):
        with torch.no_grad():
            return torch.tanh(x + x.flip(0).cumsum(1) * x.mean())


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_what_is_too_wide_is_estimated_and_its_variance_said(capsys):
    torch.manual_seed(3)
    model = FailingMLP(width=20, failing=["newton"])
    model.net.act2 = Wide()
    before = [p.clone() for p in model.parameters()]
    callback = DualPropagation(where="auto")
    fit(model, [callback], steps=2)
    said = capsys.readouterr().out
    assert "swapped for exact local duals: net.act1\n" in said
    line = next(
        text for text in said.splitlines() if text.startswith("swapped for 256 random local tangents: net.act2")
    )
    # 64 samples of 20 numbers mix, and there are no parameters.
    assert f"relative variance is about (n + 1) / K = {1281 / 256:.3g}, with n = 1280" in line
    assert callback.state_dict()["swapped"] == {"net.act1": None, "net.act2": 256}
    assert callback.state_dict()["calls"] == {"net.act1": 2, "net.act2": 2}
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class OwnEstimate(FailingMLP):
    """With a layer that the user placed, whose estimate depends on the number of its calls."""

    def __init__(self):
        super().__init__(width=16, failing=[])
        self.net.act2 = Dual(Wide(), "random", tangents=4)


class SwappedEstimate(FailingMLP):
    def __init__(self):
        super().__init__(width=16, failing=["newton"])
        self.net.act2 = Wide()


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
@pytest.mark.parametrize(("kind", "callback"), [(OwnEstimate, False), (OwnEstimate, True), (SwappedEstimate, True)])
def test_a_resumed_run_goes_on_with_the_same_directions(kind, callback, tmp_path):
    def run(epochs, checkpoint=None, seed=0):
        pl.seed_everything(seed, verbose=False)
        model = kind()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, limit_train_batches=4, limit_val_batches=0, logger=False,
            callbacks=[DualPropagation(where="auto")] * callback, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, Digits(batch_size=70, shuffle_seed=1), ckpt_path=checkpoint, weights_only=True)
        return trainer, model

    half, _ = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    (_, whole), (_, resumed), (_, again) = run(2), run(2, tmp_path / "half.ckpt", seed=1), run(2)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name
    if kind is OwnEstimate:
        assert int(whole.state_dict()["net.act2.calls"]) == 8


class Round(torch.nn.Module):
    def forward(self, x):
        return torch.round(x)


def test_the_doctor_command(capsys):
    base = ["doctor", "--config", "configs/base.yaml"]
    assert main(base) == 0
    assert "backprop works" in capsys.readouterr().out
    assert main([*base, "--config", "configs/signal/auto.yaml"]) == 1
    assert "fails in 4 of" in capsys.readouterr().out
