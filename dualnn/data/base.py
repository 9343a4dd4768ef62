"""What every classification data set shares: a split, seeded shuffling, loaders that resume."""

import os
from abc import abstractmethod
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dualnn.data.loader import ResumableLoader, TensorSplit
from dualnn.engine.errors import DualInputError, DualnnError


class MissingDataError(DualnnError, FileNotFoundError):
    """A data set's files are not where they were looked for; the message says what to put where."""


@dataclass(frozen=True)
class Split:
    """Training, validation and test part of a data set, in memory."""

    train: TensorSplit
    val: TensorSplit
    test: TensorSplit


class ClassificationData(LightningDataModule):
    """Base of the data sets: subclasses name `num_classes`, `input_shape` and how to `load` a `Split`.

    The order of training batches is a function of (shuffle seed, epoch) alone; see `dualnn.data.loader`.

    Args:
        batch_size: samples in a training batch.
        eval_batch_size: samples in a batch of validation, test and prediction.
        drop_last: leave out the last training batch where it is smaller than `batch_size`.
        shuffle_seed: seed of the order of training samples. None takes the seed of Lightning's
            `seed_everything` (0 where it was not called), so that one seed sets a whole run.
        num_workers: processes that fetch batches. The data lie in memory: 0 is fastest.

    Attributes:
        num_classes: number of classes C; labels are int64 in 0..C-1.
        input_shape: shape of one input, without the batch axis.

    Shape:
        batch: (x, y) with x: (B, *input_shape) float32, y: (B,) int64.

    Raises:
        DualInputError: a batch size below 1, or a negative number of workers.
    """

    num_classes: int
    input_shape: tuple[int, ...]

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.eval_batch_size = at_least("eval_batch_size", eval_batch_size, 1)
        self.drop_last = drop_last
        self.num_workers = at_least("num_workers", num_workers, 0)
        self._given_seed = shuffle_seed
        self._resumed_seed: int | None = None
        self._split: Split | None = None

    @abstractmethod
    def load(self) -> Split:
        """Read or make the data. Called once; must not touch any global random state."""

    @property
    def split(self) -> Split:
        """The three parts; loaded on first use."""
        if self._split is None:
            self._split = self.load()
        return self._split

    @property
    def shuffle_seed(self) -> int:
        """The seed in force: a resumed checkpoint's, else the one given, else `seed_everything`'s, else 0."""
        for seed in (self._resumed_seed, self._given_seed):
            if seed is not None:
                return seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0))  # where seed_everything leaves it

    def setup(self, stage: str | None = None) -> None:
        """Load the data (Lightning calls this in every process)."""
        del stage  # all three parts come from one reading
        _ = self.split

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training batches."""
        train = self.split.train
        if self.drop_last and self.batch_size > len(train):
            raise DualInputError(
                f"batch_size {self.batch_size} with drop_last leaves no batch of {len(train)} training samples: "
                "lower batch_size or set drop_last to false"
            )
        loader = ResumableLoader.over(train, self.batch_size, self.shuffle_seed, self.drop_last, self.num_workers)
        if (trainer := self.trainer) is not None:
            loader.epoch_length = lambda: trainer.num_training_batches
        return loader

    def val_dataloader(self) -> ResumableLoader:
        """Validation batches in stored order."""
        return self._in_order(self.split.val)

    def test_dataloader(self) -> ResumableLoader:
        """Test batches in stored order."""
        return self._in_order(self.split.test)

    def predict_dataloader(self) -> ResumableLoader:
        """The test batches again, for predictions."""
        return self._in_order(self.split.test)

    def _in_order(self, part: TensorSplit) -> ResumableLoader:
        return ResumableLoader.over(part, self.eval_batch_size, num_workers=self.num_workers)

    def state_dict(self) -> dict[str, int]:
        """The shuffle seed in force, for the checkpoint: a run resumed without its seed keeps its order."""
        return {"shuffle_seed": self.shuffle_seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the checkpoint's shuffle seed."""
        self._resumed_seed = state_dict["shuffle_seed"]


def at_least(name: str, value: int, least: int) -> int:
    """Return `value`, or raise `DualInputError` where it is below `least`."""
    if value < least:
        raise DualInputError(f"{name} must be at least {least}, got {value}")
    return value


def fraction(name: str, value: float) -> float:
    """Return `value`, or raise `DualInputError` where it is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise DualInputError(f"{name} must lie strictly between 0 and 1, got {value}")
    return value


def permute(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Permute samples by a generator of their own: what a split is cut from."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]
