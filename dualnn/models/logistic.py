"""Multinomial logistic regression."""

from collections import OrderedDict

from lightning.pytorch.cli import OptimizerCallable
from torch import nn, optim

from dualnn.models.classifier import Classifier, sizes


class LogisticRegression(Classifier):
    """Logits W x + b of flattened inputs: the smallest model here, with a convex loss.

    Args:
        in_features: numbers in one input, over all its axes.
        classes: number of classes C.
        optimizer: takes the parameters, returns the optimizer.

    Shape:
        x: (B, ...) with in_features numbers a sample -> logits: (B, C).

    Raises:
        DualInputError: a size below 1.

    Example:
        >>> list(dict(LogisticRegression().named_parameters()))
        ['net.head.weight', 'net.head.bias']
    """

    def __init__(
        self,
        in_features: int = 64,
        classes: int = 10,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1),
    ) -> None:
        sizes("in_features and classes", [in_features, classes])
        super().__init__(
            nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=nn.Linear(in_features, classes))), optimizer
        )
