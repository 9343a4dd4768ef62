"""What dualnn.training relies on in Lightning: if one of these fails, a new release works otherwise."""

import os

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader


class Scalar(LightningModule):
    """One weight w; the loss of sample x is w * x."""

    def __init__(self, calls=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0))
        self.calls = [] if calls is None else calls

    def training_step(self, batch, batch_idx):
        self.calls.append("training_step")
        return self.w * batch.mean()

    def backward(self, loss):
        self.calls.append("backward")
        loss.backward()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.calls.append("zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append("clip")
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Spy(Callback):
    """Note the hooks that are called, and what `look` finds then."""

    def __init__(self, look=lambda trainer, module: None):
        self.calls = []
        self.look = look

    def _note(self, hook, trainer, module):
        self.calls.append((hook, self.look(trainer, module)))

    def on_fit_start(self, trainer, pl_module):
        self._note("on_fit_start", trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note("on_train_batch_start", trainer, pl_module)

    def on_before_backward(self, trainer, pl_module, loss):
        self._note("on_before_backward", trainer, pl_module)

    def on_exception(self, trainer, pl_module, exception):
        self._note("on_exception", trainer, pl_module)

    def teardown(self, trainer, pl_module, stage):
        self._note("teardown", trainer, pl_module)


def data():
    return DataLoader(torch.arange(1.0, 5.0).view(4, 1), batch_size=1)


def trainer(*callbacks, **options):
    options = {"max_epochs": 1} | options
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_an_instance_attribute_stands_in_for_the_strategys_training_step():
    made = trainer()
    inner, seen = made.strategy.training_step, []

    def outer(*args, **kwargs):
        seen.append(args)
        return inner(*args, **kwargs)

    made.strategy.training_step = outer
    made.fit(Scalar(), data())
    assert len(seen) == 4


def test_the_parts_of_a_step_come_in_this_order():
    module = Scalar()
    trainer(gradient_clip_val=1.0, limit_train_batches=1).fit(module, data())
    assert module.calls == ["training_step", "zero_grad", "backward", "clip"]


def test_the_loss_is_divided_after_the_step_and_gradients_add_up_over_accumulated_batches():
    module = Scalar()
    trainer(accumulate_grad_batches=2, limit_train_batches=2).fit(module, data())
    assert module.w.item() == pytest.approx(1 - 0.1 * (1 + 2) / 2)
    assert module.calls == ["training_step", "zero_grad", "backward", "training_step", "backward", "clip"]


def test_the_loss_is_shown_before_its_backward():
    calls = []
    module = Scalar(calls)
    spy = Spy()
    spy.on_before_backward = lambda *_: calls.append("on_before_backward")
    trainer(spy, limit_train_batches=1).fit(module, data())
    assert calls.index("on_before_backward") == calls.index("backward") - 1


def test_the_precision_context_lies_inside_the_strategys_training_step():
    made, seen = trainer(precision="bf16-mixed", limit_train_batches=1), []
    inner = made.strategy.training_step

    class Looks(Scalar):
        def training_step(self, batch, batch_idx):
            seen.append(("inside", torch.is_autocast_enabled("cpu")))
            return super().training_step(batch, batch_idx)

    def outer(*args, **kwargs):
        seen.append(("outside", torch.is_autocast_enabled("cpu")))
        return inner(*args, **kwargs)

    made.strategy.training_step = outer
    made.fit(Looks(), data())
    assert seen == [("outside", False), ("inside", True)]


def test_the_batch_counter_goes_on_after_resuming(tmp_path):
    first = Spy(lambda t, m: t.fit_loop.epoch_loop.total_batch_idx)
    made = trainer(first, max_epochs=2)
    made.fit(Scalar(), data())
    assert [n for hook, n in first.calls if hook == "on_before_backward"] == list(range(8))
    made.save_checkpoint(tmp_path / "c.ckpt")
    second = Spy(lambda t, m: t.fit_loop.epoch_loop.total_batch_idx)
    trainer(second, max_epochs=3).fit(Scalar(), data(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert [n for hook, n in second.calls if hook == "on_before_backward"] == [8, 9, 10, 11]


def test_the_checkpoint_is_loaded_when_a_fit_starts(tmp_path):
    made = trainer()
    trained = Scalar()
    made.fit(trained, data())
    made.save_checkpoint(tmp_path / "c.ckpt")
    spy = Spy(lambda t, m: m.w.item())
    trainer(spy, max_epochs=2).fit(Scalar(), data(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert trained.w.item() != 1
    assert spy.calls[0] == ("on_fit_start", trained.w.item())


def test_optimizers_are_there_when_a_fit_starts():
    spy = Spy(lambda t, m: len(t.optimizers))
    trainer(spy).fit(Scalar(), data())
    assert spy.calls[0] == ("on_fit_start", 1)


def test_teardown_is_called_after_a_fit_and_not_after_an_exception():
    spy = Spy()
    trainer(spy).fit(Scalar(), data())
    assert [hook for hook, _ in spy.calls][-1] == "teardown"

    class Breaks(Scalar):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    spy = Spy()
    with pytest.raises(ZeroDivisionError):
        trainer(spy).fit(Breaks(), data())
    assert [hook for hook, _ in spy.calls][-1] == "on_exception"


def test_a_closure_that_is_called_again_runs_the_step_again_within_one_batch():
    module = Scalar()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), max_iter=3)
    spy = Spy()
    trainer(spy, limit_train_batches=1).fit(module, data())
    assert module.calls.count("training_step") > 1
    assert [hook for hook, _ in spy.calls].count("on_train_batch_start") == 1


def test_seed_everything_leaves_its_seed_in_the_environment(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    seed_everything(5, verbose=False)
    assert os.environ["PL_GLOBAL_SEED"] == "5"
