"""Data sets: one LightningDataModule a file, all behind `ClassificationData`.

The packages that hold or make the data (scikit-learn, mnist1d, torchvision) are imported when it is loaded.
"""

from dualnn.data.base import ClassificationData, MissingDataError, Split
from dualnn.data.digits import Digits
from dualnn.data.loader import EpochShuffle, ResumableLoader, TensorSplit
from dualnn.data.mnist import MNIST
from dualnn.data.mnist1d import MNIST1D

__all__ = [
    "MNIST",
    "MNIST1D",
    "ClassificationData",
    "Digits",
    "EpochShuffle",
    "MissingDataError",
    "ResumableLoader",
    "Split",
    "TensorSplit",
]
