"""A run that is interrupted and resumed sees the batches of the uninterrupted one."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dualnn.data import ClassificationData, Split, TensorSplit


class Numbers(ClassificationData):
    """Sample i is the number i."""

    num_classes, input_shape = 2, (1,)

    def load(self):
        part = TensorSplit(torch.arange(22.0).view(-1, 1), torch.zeros(22).long())
        return Split(part, part, part)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, tuple(batch[0].flatten().tolist())))
        return self.weight * batch[0].sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAlways(Callback):
    """Save a checkpoint each time one hook is called."""

    def __init__(self, folder, hook):
        self.saved = []

        def save(trainer, *_, **__):
            self.saved.append((trainer.global_step, folder / f"{len(self.saved)}.ckpt"))
            trainer.save_checkpoint(self.saved[-1][1])

        setattr(self, hook, save)


def fit(callbacks=(), checkpoint=None, num_workers=0, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    model = Recorder()
    trainer.fit(model, Numbers(batch_size=4, shuffle_seed=3, num_workers=num_workers), ckpt_path=checkpoint)
    return model.seen


STOPS = {"max_epochs": {"max_epochs": 3}, "max_steps": {"max_steps": 11, "max_epochs": -1}}


@pytest.mark.parametrize("limit", [6, 4], ids=["whole epochs", "limit_train_batches"])
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_resumed_run_sees_the_same_batches(tmp_path, hook, stop, limit):
    options = {"limit_train_batches": limit, "val_check_interval": 2, **stop}
    saver = SaveAlways(tmp_path, hook)
    whole = fit([saver], **options)
    assert len(saver.saved) >= 2
    got = {i: fit(checkpoint=path, **options) for i, (_, path) in enumerate(saver.saved)}
    assert got == {i: whole[step:] for i, (step, _) in enumerate(saver.saved)}


def test_worker_processes_fetch_the_same_batches_also_after_a_resume(tmp_path):
    saver = SaveAlways(tmp_path, "on_train_batch_end")
    whole = fit([saver], max_epochs=2)
    assert fit(max_epochs=2, num_workers=1) == whole
    step, path = saver.saved[8]  # in the second epoch
    assert fit(checkpoint=path, max_epochs=2, num_workers=1) == whole[step:]


def test_accumulation_does_not_move_the_place(tmp_path):
    saver = SaveAlways(tmp_path, "on_train_batch_end")
    options = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole = fit([saver], **options)
    for batches, (_, path) in enumerate(saver.saved, start=1):
        assert [numbers for _, numbers in fit(checkpoint=path, **options)] == [n for _, n in whole[batches:]]


def test_checkpoint_keeps_the_seed_of_its_order(tmp_path):
    saver = SaveAlways(tmp_path, "on_train_batch_end")
    fit([saver], max_epochs=1)
    other = Numbers(batch_size=4, shuffle_seed=99)
    state = torch.load(saver.saved[0][1], weights_only=True)["Numbers"]
    other.load_state_dict(state)
    assert other.shuffle_seed == 3


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfit_batches_repeats_whole_batches():
    seen = [numbers for _, numbers in fit(max_epochs=2, overfit_batches=2)]
    assert seen == [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)] * 2


@pytest.mark.slow  # two processes
def test_two_processes_share_an_epoch(tmp_path):
    class Keep(Callback):
        def on_train_end(self, trainer, module):
            torch.save(module.seen, tmp_path / f"{trainer.global_rank}.pt")

    fit([Keep()], max_epochs=2, devices=2, strategy="ddp_fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch in range(2):  # 22 samples: 11 a process, in 3 batches
        numbers = [n for rank in ranks for _, batch in rank[3 * epoch : 3 * epoch + 3] for n in batch]
        assert sorted(numbers) == list(range(22)) and numbers != sorted(numbers)
    assert ranks[0][:3] != ranks[0][3:]
