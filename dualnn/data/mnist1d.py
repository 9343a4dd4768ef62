"""MNIST-1D: a small, hard relative of MNIST that is made on the spot."""

import functools
import random

import torch
from torch import Tensor

from dualnn.data.base import ClassificationData, Split, at_least, fraction, permute
from dualnn.data.loader import TensorSplit


class MNIST1D(ClassificationData):
    """Signals of 40 steps made from ten templates by padding, scaling, shifting, shearing and noise.

    A fifth of the samples is the test part, as published; the training part gives up `val_fraction` of its own.
    Nothing is downloaded. The package that makes the data reseeds `random` and `numpy.random`; both are put back.

    Args:
        as_sequence: give (40, 1) sequences for recurrent cells; otherwise flat (40,) vectors.
        num_samples: samples over all parts, a multiple of 10; 5,000 as published.
        data_seed: seed of the samples themselves; 42 as published.
        split_seed: seed of the cut between training and validation part.
        val_fraction: part of the training samples that is kept for validation.
        batch_size: samples in a training batch.
        eval_batch_size: samples in a batch of validation, test and prediction.
        drop_last: leave out the last training batch where it is smaller.
        shuffle_seed: seed of the training order; None takes `seed_everything`'s.
        num_workers: processes that fetch batches.

    Shape:
        x: (B, 40) or (B, 40, 1), y: (B,).

    Raises:
        DualInputError: fewer than 50 samples, a fraction outside (0, 1), a batch size below 1.

    Reference:
        Greydanus and Kobak, 2024, "Scaling Down Deep Learning with MNIST-1D", arXiv:2011.14439.

    Example:
        >>> data = MNIST1D(as_sequence=True, num_samples=100)
        >>> x, y = next(iter(data.val_dataloader()))
        >>> tuple(x.shape), data.input_shape
        ((8, 40, 1), (40, 1))
    """

    num_classes = 10

    def __init__(
        self,
        as_sequence: bool = False,
        num_samples: int = 5000,
        data_seed: int = 42,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, shuffle_seed, num_workers)
        self.input_shape = (40, 1) if as_sequence else (40,)
        self.num_samples = at_least("num_samples", num_samples, 50)
        self.data_seed, self.split_seed = data_seed, split_seed
        self.val_fraction = fraction("val_fraction", val_fraction)

    def load(self) -> Split:
        """Make the samples and split them."""
        train_x, train_y, test_x, test_y = _make(self.num_samples, self.data_seed)
        shape = (-1, *self.input_shape)
        x, y = permute(train_x.view(shape), train_y, self.split_seed)
        val = round(self.val_fraction * len(x))
        return Split(
            train=TensorSplit(x[val:], y[val:]),
            val=TensorSplit(x[:val], y[:val]),
            test=TensorSplit(test_x.view(shape), test_y),
        )


@functools.lru_cache(maxsize=2)  # making 5,000 samples takes a second; the arms of a comparison share them
def _make(num_samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Only make_dataset: get_dataset, from the same module, downloads a pickle.
        from mnist1d.data import get_dataset_args, make_dataset

        args = get_dataset_args()
        args.num_samples, args.seed = num_samples, seed
        made = make_dataset(args)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    x, y, x_test, y_test = (torch.from_numpy(made[key]) for key in ("x", "y", "x_test", "y_test"))
    return x.float(), y.long(), x_test.float(), y_test.long()
