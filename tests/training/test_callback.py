import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from dualnn.engine.errors import UnknownNameError
from dualnn.models import MLP
from dualnn.signals import ActivityPerturbation, Backprop, Exact, ForwardGradient
from dualnn.training import DualPropagation, NonFiniteLossError, ResumeError, TrainingSetupError
from dualnn.training.callback import _check_trainer, describe

NEWTON = "dualnn.models.NewtonTanh"

# name: (makes the callback, activation of the network)
METHODS = {
    "backprop": (lambda: DualPropagation(Backprop()), "Tanh"),
    "checkpointing": (lambda: DualPropagation(Backprop(checkpoint=True)), "Tanh"),
    "weights": (lambda: DualPropagation(ForwardGradient(tangents=4)), "Tanh"),
    "rank-1": (lambda: DualPropagation(ForwardGradient(tangents=4, rank=1)), "Tanh"),
    "activity": (lambda: DualPropagation(ActivityPerturbation(tangents=4)), "Tanh"),
    "exact": (lambda: DualPropagation(Exact()), "Tanh"),
    "where": (lambda: DualPropagation(where=["net.act*"]), NEWTON),
}
# How Lightning may treat the gradient after the signal has written it.
TREATMENTS = {
    "plain": {},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "all": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a, b, tol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tol, msg=lambda text, name=name: f"{name}: {text}")


class SaveAfter(Callback):
    """Save a checkpoint after so many batches."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


class TestTraining:
    @pytest.mark.parametrize("treatment", TREATMENTS)
    def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
        self, method, treatment, make_mlp, make_trainer, blobs, tmp_path, monkeypatch
    ):
        make_callback, activation = method
        options = TREATMENTS[treatment]
        # Four of ten batches: inside the first epoch of five, at the end of an accumulation.
        save = SaveAfter(4, tmp_path / "half.ckpt")
        module = make_mlp(activation=activation, seed=3)
        start = weights(module)
        make_trainer(make_callback(), save, **options).fit(module, blobs())

        # Another process: other initial weights, another global seed; the checkpoint knows the directions' seed.
        resumed = make_mlp(activation=activation, seed=4)
        make_trainer(make_callback(), **options).fit(
            resumed, blobs(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
        assert any(not torch.equal(start[name], value) for name, value in module.state_dict().items())
        assert_equal(weights(resumed), weights(module))

    def test_two_runs_are_equal_and_another_seed_is_another_run(self, make_mlp, make_trainer, blobs):
        runs = []
        for seed in (0, 0, 1):
            module = make_mlp(seed=0)
            make_trainer(DualPropagation(ForwardGradient(tangents=4), seed=seed)).fit(module, blobs())
            runs.append(weights(module))
        assert_equal(runs[0], runs[1])
        assert not torch.equal(runs[0]["net.head.weight"], runs[2]["net.head.weight"])

    def test_the_seed_is_that_of_seed_everything_by_default(self, make_mlp, make_trainer, blobs):
        runs = []
        for seed in (None, 7):
            module = make_mlp(seed=7)
            make_trainer(DualPropagation(ForwardGradient(tangents=4), seed=seed)).fit(module, blobs())
            runs.append(weights(module))
        assert_equal(*runs)

    @pytest.mark.parametrize("treatment", ["plain", "clipping", "accumulation"])
    def test_the_exact_signal_trains_as_backprop_does(self, treatment, make_mlp, make_trainer, blobs):
        runs = []
        for callbacks in ([], [DualPropagation(Exact())]):
            module = make_mlp()
            make_trainer(*callbacks, precision="64-true", **TREATMENTS[treatment]).fit(module, blobs())
            runs.append(weights(module))
        assert_equal(*runs, tol=1e-10)

    def test_a_local_dual_trains_as_the_unrolled_loop_does(self, make_mlp, make_trainer, blobs):
        runs = []
        for callbacks, gradient in (([DualPropagation(where=["net.act*"])], "no_grad"), ([], "unrolled")):
            module = make_mlp(activation=NEWTON, activation_kwargs={"gradient": gradient})
            make_trainer(*callbacks, precision="64-true").fit(module, blobs())
            runs.append(weights(module))
        assert_equal(*runs, tol=1e-9)

    def test_without_it_the_layers_before_the_loop_learn_nothing(self, make_mlp, make_trainer, blobs):
        module = make_mlp(activation=NEWTON)
        before = weights(module)
        make_trainer().fit(module, blobs())
        after = weights(module)
        assert torch.equal(before["net.linear0.weight"], after["net.linear0.weight"])
        assert not torch.equal(before["net.head.weight"], after["net.head.weight"])

    def test_clipping_acts_on_the_signals_gradient(self, make_mlp, make_trainer, blobs):
        moved = []
        for options in ({}, {"gradient_clip_val": 1e-3}):
            module = make_mlp(lr=1.0)
            before = weights(module)
            callback = DualPropagation(ForwardGradient(tangents=4))
            make_trainer(callback, max_epochs=1, limit_train_batches=1, **options).fit(module, blobs())
            after = weights(module)
            moved.append(math.sqrt(sum((after[n] - before[n]).square().sum().item() for n in before)))
        assert moved[0] > 1e-2
        assert moved[1] == pytest.approx(1e-3, rel=1e-3)

    def test_the_users_step_runs_inside_the_precision_plugins_context(self, make_mlp, make_trainer, blobs):
        seen = []

        class Looks(MLP):
            def training_step(self, batch, batch_idx):
                seen.append((torch.is_autocast_enabled("cpu"), self(batch[0]).dtype))
                return super().training_step(batch, batch_idx)

        callback = DualPropagation(ForwardGradient(tangents=2))
        trainer = make_trainer(callback, precision="bf16-mixed", max_epochs=1, limit_train_batches=1)
        trainer.fit(make_mlp(Looks), blobs())
        assert seen == [(True, torch.bfloat16)]

    def test_global_random_numbers_are_those_of_a_run_without_a_signal(self, method, make_mlp, make_trainer, blobs):
        make_callback, activation = method
        states = []
        for callbacks in ([], [make_callback()]):
            module = make_mlp(activation=activation)
            module.net.add_module("drop", nn.Dropout(0.5))
            make_trainer(*callbacks, limit_val_batches=0).fit(module, blobs())
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_logged_values_are_plain_numbers(self, make_mlp, make_trainer, blobs):
        trainer = make_trainer(DualPropagation(ForwardGradient(tangents=4)))
        trainer.fit(make_mlp(), blobs())
        assert set(trainer.callback_metrics) >= {"train/loss", "train/acc", "val/acc"}
        assert all(type(value) is torch.Tensor for value in trainer.callback_metrics.values())

    def test_a_step_may_return_a_dict_or_nothing(self, make_mlp, make_trainer, blobs):
        class Dicts(MLP):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return {"loss": loss, "extra": 1} if batch_idx else None

        module = make_mlp(Dicts)
        before = weights(module)
        with pytest.warns(UserWarning, match="returned `None`"):
            make_trainer(DualPropagation(ForwardGradient(tangents=4)), max_epochs=1).fit(module, blobs())
        assert not torch.equal(before["net.head.weight"], module.net.head.weight)


class TestUndoing:
    def assert_untouched(self, trainer, module):
        assert "training_step" not in vars(trainer.strategy)
        assert all("forward" not in vars(part) for part in module.modules())

    def test_nothing_is_left_after_a_fit(self, method, make_mlp, make_trainer, blobs):
        make_callback, activation = method
        module = make_mlp(activation=activation)
        trainer = make_trainer(make_callback(), max_epochs=1)
        trainer.fit(module, blobs())
        self.assert_untouched(trainer, module)

    def test_nothing_is_left_after_an_exception(self, method, make_mlp, make_trainer, blobs):
        class Breaks(MLP):
            def training_step(self, batch, batch_idx):
                if batch_idx == 2:
                    raise ZeroDivisionError
                return super().training_step(batch, batch_idx)

        make_callback, activation = method
        module = make_mlp(Breaks, activation=activation)
        trainer = make_trainer(make_callback())
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, blobs())
        self.assert_untouched(trainer, module)
        assert all(type(p) is nn.Parameter for p in module.parameters())

    def test_the_callback_serves_a_second_fit(self, make_mlp, make_trainer, blobs):
        callback = DualPropagation(ForwardGradient(tangents=4))
        runs = []
        for _ in range(2):
            module = make_mlp()
            make_trainer(callback).fit(module, blobs())
            runs.append(weights(module))
        assert_equal(*runs)

    def test_somebody_elses_wrapper_around_ours_stays_and_works(self, make_mlp, make_trainer, blobs):
        class Counts(Callback):
            def on_fit_start(self, trainer, pl_module):
                inner, self.calls = trainer.strategy.training_step, 0

                def counted(*args):
                    self.calls += 1
                    return inner(*args)

                trainer.strategy.training_step = counted

        counts, module = Counts(), make_mlp()
        trainer = make_trainer(DualPropagation(ForwardGradient(tangents=4)), counts, max_epochs=1)
        trainer.fit(module, blobs())
        assert counts.calls == 5
        # Ours is still in the chain and passes on: the loss is the step's own.
        module.training_step = lambda x: module.net.head.bias.sum() * x
        assert torch.autograd.grad(trainer.strategy.training_step(2.0), module.net.head.bias)[0].tolist() == [2, 2, 2]

    def test_the_module_pickles_while_it_is_trained(self, method, make_mlp, make_trainer, blobs):
        class Pickles(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.copy = pickle.loads(pickle.dumps(pl_module.net))

        make_callback, activation = method
        pickles, module = Pickles(), make_mlp(activation=activation)
        make_trainer(make_callback(), pickles, max_epochs=1, limit_train_batches=2).fit(module, blobs())
        x = torch.randn(3, 4)
        torch.testing.assert_close(pickles.copy(x), module.net(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs a signal"),
            ({"where": "net.act*"}, r"give a list, where=\['net.act\*'\]"),
            ({"where": []}, "at least one name"),
            ({"where": ["net", 3]}, "at least one name"),
            ({"where": ["net.act0"], "signal": ForwardGradient()}, "replaces backprop altogether"),
            ({"signal": "ForwardGradient"}, "must be a signal"),
            ({"signal": ForwardGradient}, "must be a signal"),
        ],
    )
    def test_arguments_that_contradict_each_other(self, arguments, message):
        with pytest.raises(TrainingSetupError, match=message):
            DualPropagation(**arguments)

    def test_a_misspelt_where_names_the_nearest(self):
        with pytest.raises(UnknownNameError, match="did you mean 'all'"):
            DualPropagation(ForwardGradient(), where="al")

    def test_a_name_that_no_module_has(self, make_mlp, make_trainer, blobs):
        with pytest.raises(ValueError, match="net.atc"):
            make_trainer(DualPropagation(where=["net.atc*"])).fit(make_mlp(), blobs())

    def test_manual_optimization(self, make_trainer, blobs):
        class Manual(LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.net = nn.Linear(4, 3)

            def training_step(self, batch, batch_idx):
                raise AssertionError("must not be reached")

            def validation_step(self, batch, batch_idx):
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        with pytest.raises(TrainingSetupError, match="Manual optimizes manually"):
            make_trainer(DualPropagation(ForwardGradient())).fit(Manual(), blobs())

    def test_lbfgs(self, make_mlp, make_trainer, blobs):
        module = make_mlp()
        module.optimizer = torch.optim.LBFGS
        with pytest.raises(TrainingSetupError, match="LBFGS evaluates the step several times"):
            make_trainer(DualPropagation(ForwardGradient())).fit(module, blobs())
        make_trainer(DualPropagation(Backprop()), max_epochs=1, limit_train_batches=1).fit(module, blobs())

    def test_any_optimizer_that_calls_the_step_again(self, make_mlp, make_trainer, blobs):
        class Twice(torch.optim.SGD):
            def step(self, closure=None):
                closure()
                return super().step(closure)

        module = make_mlp()
        module.optimizer = Twice
        with pytest.raises(TrainingSetupError, match="Twice evaluates the step several times"):
            make_trainer(DualPropagation(ForwardGradient())).fit(module, blobs())

    def test_several_processes(self):
        trainer = SimpleNamespace(world_size=2, optimizers=[])
        module = SimpleNamespace(automatic_optimization=True)
        with pytest.raises(TrainingSetupError, match=r"several processes.*\(this trainer has 2\)"):
            _check_trainer(trainer, module, ForwardGradient())
        _check_trainer(trainer, module, Backprop())

    def test_a_second_callback_of_the_kind(self, make_mlp, make_trainer):
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            make_trainer(DualPropagation(ForwardGradient()), DualPropagation(where=["net"]))


class TestNonFinite:
    class Breaks(MLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 3 else loss

    @pytest.mark.parametrize("method", METHODS)
    def test_the_run_ends_before_the_weights_are_spoilt(self, method, make_mlp, make_trainer, blobs):
        make_callback, activation = METHODS[method]
        module = make_mlp(self.Breaks, activation=activation)
        trainer = make_trainer(make_callback())
        with pytest.raises(NonFiniteLossError, match="the loss is nan at step 3") as caught:
            trainer.fit(module, blobs())
        assert caught.value.step == 3
        assert all(p.isfinite().all() for p in module.parameters())

    def test_with_accumulation_step_and_batch_differ(self, make_mlp, make_trainer, blobs):
        trainer = make_trainer(DualPropagation(ForwardGradient()), accumulate_grad_batches=2, max_epochs=4)
        with pytest.raises(NonFiniteLossError, match=r"at step 3 \(batch 5\)"):  # 5 batches an epoch: 3 steps
            trainer.fit(make_mlp(self.Breaks), blobs())


class TestCheckpoints:
    def save(self, callback, make_mlp, make_trainer, blobs, path):
        trainer = make_trainer(callback, max_epochs=1)
        trainer.fit(make_mlp(), blobs())
        trainer.save_checkpoint(path)

    def resume(self, callback, make_mlp, make_trainer, blobs, path):
        make_trainer(callback).fit(make_mlp(), blobs(), ckpt_path=path, weights_only=True)

    def test_another_seed_is_refused(self, make_mlp, make_trainer, blobs, tmp_path):
        tools = make_mlp, make_trainer, blobs, tmp_path / "c.ckpt"
        self.save(DualPropagation(ForwardGradient(), seed=1), *tools)
        with pytest.raises(ResumeError, match="seed=1.*seed=2"):
            self.resume(DualPropagation(ForwardGradient(), seed=2), *tools)
        self.resume(DualPropagation(ForwardGradient(), seed=1), *tools)

    def test_another_signal_is_said(self, make_mlp, make_trainer, blobs, tmp_path):
        tools = make_mlp, make_trainer, blobs, tmp_path / "c.ckpt"
        self.save(DualPropagation(Backprop()), *tools)
        with pytest.warns(UserWarning, match=r"trained with signal=Backprop\(.*continues with signal=ForwardGradient"):
            self.resume(DualPropagation(ForwardGradient()), *tools)

    def test_a_checkpoint_of_a_stock_run_can_be_continued(self, make_mlp, make_trainer, blobs, tmp_path):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(make_mlp(), blobs())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        self.resume(DualPropagation(ForwardGradient()), make_mlp, make_trainer, blobs, tmp_path / "c.ckpt")

    def test_keys_of_the_checkpoint_are_those_of_a_plain_module(self, make_mlp, make_trainer, blobs, tmp_path):
        cases = (("Tanh", DualPropagation(ForwardGradient())), (NEWTON, DualPropagation(where=["net.act*"])))
        for activation, callback in cases:
            module = make_mlp(activation=activation)
            make_trainer(callback, SaveAfter(2, tmp_path / "c.ckpt"), max_epochs=1).fit(module, blobs())
            saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
            assert saved.keys() == make_mlp(activation=activation).state_dict().keys()


def test_a_signal_is_described_the_same_in_every_process():
    assert describe(ForwardGradient(tangents=16, rank=1)) == describe(ForwardGradient(tangents=16, rank=1))
    assert "tangents=16" in describe(ForwardGradient(tangents=16)) and "0x" not in describe(Exact())
