"""MNIST, read by torchvision."""

from pathlib import Path

import torch
from torch import Tensor

from dualnn.data.base import ClassificationData, MissingDataError, Split, fraction, permute
from dualnn.data.loader import TensorSplit

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MEAN, STD = 0.1307, 0.3081  # of all training pixels in 0..1: the pair that every published MNIST recipe uses


class MNIST(ClassificationData):
    """70,000 images of handwritten digits, 28 x 28 pixels, 10 classes.

    Nothing is downloaded unless you ask: the four files must lie unpacked in `<root>/MNIST/raw`. Pixels p in 0..255
    become (p / 255 - 0.1307) / 0.3081.

    Args:
        root: folder that holds (or gets) `MNIST/raw`.
        download: fetch the files where they are missing.
        flat: give flat (784,) vectors; otherwise (1, 28, 28) images.
        split_seed: seed of the cut between training and validation part.
        val_fraction: part of the training samples that is kept for validation.
        batch_size: samples in a training batch.
        eval_batch_size: samples in a batch of validation, test and prediction.
        drop_last: leave out the last training batch where it is smaller.
        shuffle_seed: seed of the training order; None takes `seed_everything`'s.
        num_workers: processes that fetch batches.

    Shape:
        x: (B, 1, 28, 28) or (B, 784), y: (B,).

    Raises:
        MissingDataError: (on loading) a file is missing and `download` is false.
        DualInputError: a fraction outside (0, 1), a batch size below 1.

    Reference:
        LeCun, Bottou, Bengio and Haffner, 1998, "Gradient-based learning applied to document recognition".

    Example:
        >>> MNIST(flat=True).input_shape
        (784,)
    """

    num_classes = 10

    def __init__(
        self,
        root: str = ".data",
        download: bool = False,
        flat: bool = False,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, shuffle_seed, num_workers)
        self.root, self.download = root, download
        self.input_shape = (784,) if flat else (1, 28, 28)
        self.split_seed = split_seed
        self.val_fraction = fraction("val_fraction", val_fraction)

    def prepare_data(self) -> None:
        """Download the files where that was asked for (Lightning calls this in one process only)."""
        if self.download:
            self._fetch()

    def load(self) -> Split:
        """Read the files, split the training part and standardise."""
        folder = Path(self.root, "MNIST", "raw")
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing and self.download:  # a bare loop, without Lightning's prepare_data
            self._fetch()
        elif missing:
            raise MissingDataError(
                f"MNIST: {', '.join(missing)} not found in {folder.absolute()}. Put the unpacked files there, or let "
                "torchvision fetch them with download=True (--data.init_args.download true)"
            )
        x, y = permute(*self._read(train=True), self.split_seed)
        val = round(self.val_fraction * len(x))
        return Split(
            train=TensorSplit(x[val:], y[val:]),
            val=TensorSplit(x[:val], y[:val]),
            test=TensorSplit(*self._read(train=False)),
        )

    def _fetch(self) -> None:
        from torchvision.datasets import MNIST as Reader

        Reader(self.root, download=True)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import MNIST as Reader

        part = Reader(self.root, train=train)
        x = (part.data.to(torch.float32) / 255 - MEAN) / STD
        return x.view(-1, *self.input_shape), part.targets.long()
