"""The handwritten digits that ship with scikit-learn: real data, nothing to download."""

import torch

from dualnn.data.base import ClassificationData, Split, fraction, permute
from dualnn.data.loader import TensorSplit
from dualnn.engine.errors import DualInputError


class Digits(ClassificationData):
    """1,797 images of handwritten digits, 8 x 8 pixels, 10 classes.

    Pixels p in 0..16 become (p - m) / s, with m and s the mean and standard deviation of *all* pixels of the
    training part: one pair, because single pixels at the border are nearly constant and would blow up.

    Args:
        as_image: give (1, 8, 8) images for convolutions; otherwise flat (64,) vectors.
        split_seed: seed of the split into training, validation and test part.
        val_fraction: part of the samples for validation.
        test_fraction: part of the samples for the test. The defaults leave 1,437 to train on: 23 batches of 64.
        batch_size: samples in a training batch.
        eval_batch_size: samples in a batch of validation, test and prediction.
        drop_last: leave out the last training batch where it is smaller.
        shuffle_seed: seed of the training order; None takes `seed_everything`'s.
        num_workers: processes that fetch batches.

    Shape:
        x: (B, 64) or (B, 1, 8, 8), y: (B,).

    Raises:
        DualInputError: fractions outside (0, 1) or summing to 1 or more; a batch size below 1.

    Reference:
        Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
        (scikit-learn holds its test part).

    Example:
        >>> data = Digits(batch_size=32)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> tuple(x.shape), data.input_shape, data.num_classes
        ((32, 64), (64,), 10)
    """

    num_classes = 10

    def __init__(
        self,
        as_image: bool = False,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        drop_last: bool = False,
        shuffle_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, shuffle_seed, num_workers)
        self.input_shape = (1, 8, 8) if as_image else (64,)
        self.split_seed = split_seed
        self.val_fraction = fraction("val_fraction", val_fraction)
        self.test_fraction = fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise DualInputError(
                f"val_fraction {val_fraction} + test_fraction {test_fraction} leave nothing to train on"
            )

    def load(self) -> Split:
        """Read scikit-learn's copy, split it and standardise it."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x, y = permute(torch.from_numpy(pixels), torch.from_numpy(labels).long(), self.split_seed)
        test, val = (round(part * len(x)) for part in (self.test_fraction, self.val_fraction))
        train = x[test + val :]
        x = ((x - train.mean()) / train.std()).float().view(-1, *self.input_shape)
        return Split(
            train=TensorSplit(x[test + val :], y[test + val :]),
            val=TensorSplit(x[test : test + val], y[test : test + val]),
            test=TensorSplit(x[:test], y[:test]),
        )
