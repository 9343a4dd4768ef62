"""A small convolutional network."""

from collections import OrderedDict
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn, optim

from dualnn.engine.errors import DualInputError
from dualnn.models.activation import Activation, make_activation
from dualnn.models.classifier import Classifier, sizes


class CNN(Classifier):
    """Blocks of 3 x 3 convolution, activation and 2 x 2 max pooling: net.conv0, net.act0, net.pool0, …, net.head.

    Args:
        input_shape: channels, height and width of an image.
        channels: output channels of each block.
        classes: number of classes C.
        activation: a name ("ReLU", "kepler"), a dotted path, a class, a function or an instance; see
            `dualnn.models.make_activation`.
        activation_kwargs: keyword arguments of the activation.
        optimizer: takes the parameters, returns the optimizer.

    Shape:
        x: (B, *input_shape) -> logits: (B, C).

    Raises:
        DualInputError: a size below 1, more blocks than the image can be halved, arguments that the activation
            does not take.
        UnknownNameError: no activation of that name.

    Example:
        >>> import torch
        >>> tuple(CNN((1, 28, 28), channels=[4, 8])(torch.zeros(2, 1, 28, 28)).shape)
        (2, 10)
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        channels: list[int] = [16, 32],  # noqa: B006 - read only; the CLI's YAML wants a list
        classes: int = 10,
        activation: Activation = "ReLU",
        activation_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1),
    ) -> None:
        fan_in, height, width = sizes("input_shape", input_shape)
        sizes("channels and classes", [*channels, classes])
        if min(height, width) < 2 ** len(channels):
            raise DualInputError(
                f"{len(channels)} blocks each halve a {height} x {width} image: at most "
                f"{min(height, width).bit_length() - 1} fit"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, fan_out in enumerate(channels):
            layers[f"conv{i}"] = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1)
            layers[f"act{i}"] = make_activation(activation, fan_out, activation_kwargs)
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            fan_in, height, width = fan_out, height // 2, width // 2
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(fan_in * height * width, classes)
        super().__init__(nn.Sequential(layers), optimizer)
