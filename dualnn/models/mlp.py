"""A multilayer perceptron."""

from collections import OrderedDict
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn, optim

from dualnn.models.activation import Activation, make_activation
from dualnn.models.classifier import Classifier, sizes


class MLP(Classifier):
    """Linear layers with activations between: net.linear0, net.act0, net.linear1, net.act1, …, net.head.

    Args:
        in_features: numbers in one input, over all its axes.
        hidden: width of each hidden layer; an empty list leaves logistic regression.
        classes: number of classes C.
        activation: a name ("ReLU", "implicit_tanh"), a dotted path, a class, a function or an instance; see
            `dualnn.models.make_activation`.
        activation_kwargs: keyword arguments of the activation.
        optimizer: takes the parameters, returns the optimizer.

    Shape:
        x: (B, ...) with in_features numbers a sample -> logits: (B, C).

    Raises:
        DualInputError: a size below 1, arguments that the activation does not take.
        UnknownNameError: no activation of that name.

    Example:
        >>> [name for name, _ in MLP(hidden=[32], activation="Tanh").net.named_children()]
        ['flatten', 'linear0', 'act0', 'head']
    """

    def __init__(
        self,
        in_features: int = 64,
        hidden: list[int] = [128, 128],  # noqa: B006 - read only; the CLI's YAML wants a list
        classes: int = 10,
        activation: Activation = "ReLU",
        activation_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1),
    ) -> None:
        widths = sizes("in_features, hidden and classes", [in_features, *hidden, classes])
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-2], widths[1:-1], strict=True)):
            layers[f"linear{i}"] = nn.Linear(fan_in, fan_out)
            layers[f"act{i}"] = make_activation(activation, fan_out, activation_kwargs)
        layers["head"] = nn.Linear(widths[-2], classes)
        super().__init__(nn.Sequential(layers), optimizer)
