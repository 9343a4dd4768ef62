"""Whole-batch loading of data that lies in memory, in an order that a resumed run repeats bit for bit."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dualnn.engine.errors import DualInputError


class TensorSplit(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and labels in memory; a batch is one indexing, with no Python per item.

    Args:
        x: the inputs.
        y: the labels.

    Shape:
        x: (N, ...), y: (N,); item i: (x[i], y[i]); a batch of B indices: (B, ...) and (B,).

    Raises:
        DualInputError: x and y differ in length.

    Example:
        >>> split = TensorSplit(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
        >>> split.__getitems__([2, 0])
        (tensor([[4., 5.],
                [0., 1.]]), tensor([0, 0]))
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if len(x) != len(y):
            raise DualInputError(f"{len(x)} inputs but {len(y)} labels: give one label an input")
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch a whole batch (the DataLoader calls this when it is there)."""
        rows = torch.as_tensor(indices)
        return self.x[rows], self.y[rows]


class EpochShuffle(Sampler[int]):
    """A permutation of 0..length-1 that is a function of (seed, epoch) alone.

    Neither torch's global generator nor the number of earlier epochs matters, so arms of one seed see one order,
    dropout draws the same numbers with and without shuffling, and a resumed run needs no random state. Lightning
    calls `set_epoch` at the start of every epoch.

    Args:
        length: how many samples there are.
        seed: any integer.

    Attributes:
        epoch: the epoch that was set.
        shift: added to it; what a resumed run needs where Lightning miscounts (see `ResumableLoader`).

    Example:
        >>> order = EpochShuffle(5, seed=0)
        >>> order.set_epoch(1)
        >>> list(order) == list(order), sorted(order)
        (True, [0, 1, 2, 3, 4])
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.shift = length, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # A hash, not seed + epoch: neighbouring seeds would share all epochs but one.
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch + self.shift}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        yield from torch.randperm(self.length, generator=generator).tolist()


class ResumableLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A DataLoader that goes on within an epoch: Lightning stores its state in checkpoints.

    Without it, Lightning starts the interrupted epoch's batches again from the first (and warns). Make one with
    `ResumableLoader.over`. The signature stays the DataLoader's own, so that Lightning can rebuild it around a
    distributed sampler.

    Attributes:
        order: the shuffled order, None where samples come as stored.
        epoch_length: tells how many batches the running epoch has where that is not all of them
            (`limit_train_batches`).

    Example:
        >>> split = TensorSplit(torch.arange(5.0), torch.zeros(5))
        >>> loader = ResumableLoader.over(split, batch_size=2)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> other = ResumableLoader.over(split, batch_size=2)
        >>> other.load_state_dict(loader.state_dict())
        >>> [x.tolist() for x, _ in other]
        [[2.0, 3.0], [4.0]]
    """

    order: EpochShuffle | None = None
    epoch_length: Callable[[], int | float] | None = None
    _epoch: int | None = None  # of the running or last pass over the data
    _batches = 0  # how many batches of it were handed out
    _resume: dict[str, int] | None = None  # a loaded state that the next pass begins with

    @classmethod
    def over(
        cls,
        split: TensorSplit,
        batch_size: int,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> "ResumableLoader":
        """Whole batches of a split, in stored order, or shuffled by `EpochShuffle` where a seed is given."""
        order = None if shuffle_seed is None else EpochShuffle(len(split), shuffle_seed)
        loader = cls(
            split,
            batch_size=batch_size,
            sampler=order,  # not batch_sampler: Lightning would put an unshuffled distributed sampler in its place
            drop_last=drop_last,
            collate_fn=_whole,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(0),  # else every epoch draws from torch's global generator
        )
        loader.order = order
        return loader

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next (for a bare PyTorch loop; Lightning reaches the sampler itself)."""
        if self.order is not None:
            self.order.set_epoch(epoch)

    # The DataLoader's own iterator is made when the first batch is asked for: Lightning calls iter() before
    # set_epoch() in a run's first epoch, and workers would begin at once to fetch in the order of another epoch.
    def __iter__(self) -> Any:
        return self._pass()

    def _pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        skip = 0
        if self._resume is not None:
            skip = self._resume["batches"]
            # Resumed at an epoch's end under max_steps, Lightning (2.6) goes through one epoch without batches and
            # counts it, so that its epochs are one ahead from then on. The saved number is the right one.
            if self.order is not None:
                self.order.shift = self._resume["epoch"] - self.order.epoch
            self._resume = None
        self._epoch, self._batches = self._next_epoch(), 0
        for batch in super().__iter__():
            self._batches += 1
            if self._batches > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The running epoch and how many of its batches were handed out; at its end, the beginning of the next."""
        if self._resume is not None:
            return dict(self._resume)
        if self._epoch is None:
            return {"epoch": self._next_epoch(), "batches": 0}
        whole = len(self) if self.epoch_length is None else self.epoch_length()
        if self._batches < whole:
            return {"epoch": self._epoch, "batches": self._batches}
        return {"epoch": self._epoch + 1, "batches": 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass begin where the saved one was."""
        self._resume = dict(state_dict)

    def _next_epoch(self) -> int:
        return 0 if self.order is None else self.order.epoch + self.order.shift


def _whole(batch: Any) -> Any:
    """Collate nothing: `TensorSplit.__getitems__` has fetched the batch (a function by name, for workers)."""
    return batch
