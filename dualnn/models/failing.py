"""Four activations that backprop cannot train, each failing in its own way, as people write them.

| class         | what backprop does                                                                        |
|---------------|-------------------------------------------------------------------------------------------|
| `GammaCurve`  | raises: torch has no backward formula for the incomplete gamma function                   |
| `NewtonTanh`  | cuts the graph: the loop runs under ``no_grad``, and nothing before it learns (its file)  |
| `ClippedBump` | raises: a value that backward needs was modified in place                                 |
| `RootGate`    | nan: ``where(z > 0, z sqrt z, 0)`` has a finite derivative, but backward makes 0 / 0        |

With ``gradient="by_hand"`` each carries its derivative as someone would write it in a `torch.autograd.Function`: the
control.
"""

from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from dualnn.activations.gamma_cdf import shape_derivative
from dualnn.engine.errors import unknown_name
from dualnn.models.classifier import Classifier, sizes
from dualnn.models.newton_tanh import NewtonTanh

Gradient = Literal["as_written", "by_hand"]


def _checked(gradient: str) -> str:
    if gradient not in ("as_written", "by_hand"):
        raise unknown_name("gradient", gradient, ("as_written", "by_hand"))
    return gradient


class GammaCurve(nn.Module):
    r"""y = P(a, softplus(x)), the incomplete gamma function with a learnable shape a = softplus(raw) per channel.

    Args:
        num_channels: size of the input's last dimension.
        gradient: ``"as_written"`` or ``"by_hand"``.

    Shape:
        x: (N, num_channels) -> y: the same.

    Example:
        >>> GammaCurve(2)(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self, num_channels: int, gradient: Gradient = "as_written") -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((num_channels,), 0.5))
        self.gradient = _checked(gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        a, z = F.softplus(self.raw), F.softplus(x)
        if self.gradient == "by_hand":
            return _GammaByHand.apply(a, z)  # type: ignore[no-untyped-call]
        return torch.special.gammainc(a.expand_as(z), z)


class _GammaByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(a, z)
        return torch.special.gammainc(a.expand_as(z), z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, z = ctx.saved_tensors
        in_a = shape_derivative(1, torch.log(z), a)
        in_z = torch.exp(torch.xlogy(a - 1, z) - z - torch.lgamma(a))
        return (grad * in_a).sum_to_size(a.shape), grad * in_z


class ClippedBump(nn.Module):
    r"""y = exp(-(w x)^2), set to 0 in place where it is below a threshold; w is learnable per channel.

    Args:
        num_channels: size of the input's last dimension.
        gradient: ``"as_written"`` or ``"by_hand"``.
        threshold: values below it become 0.

    Shape:
        x: (N, num_channels) -> y: the same.

    Example:
        >>> ClippedBump(2)(torch.tensor([[0.0, 9.0]])).detach()
        tensor([[1., 0.]])
    """

    def __init__(self, num_channels: int, gradient: Gradient = "as_written", threshold: float = 0.01) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((num_channels,), 0.7))
        self.gradient, self.threshold = _checked(gradient), threshold

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        if self.gradient == "by_hand":
            bump = torch.exp(-((self.w * x) ** 2))
            return torch.where(bump < self.threshold, torch.zeros_like(bump), bump)
        y = torch.exp(-((self.w * x) ** 2))
        y[y < self.threshold] = 0
        return y


class RootGate(nn.Module):
    r"""y = z sqrt(z) with z = w^2 relu(x), and 0 where z = 0; w is learnable per channel.

    Args:
        num_channels: size of the input's last dimension.
        gradient: ``"as_written"`` or ``"by_hand"``.

    Shape:
        x: (N, num_channels) -> y: the same.

    Example:
        >>> RootGate(2)(torch.tensor([[-1.0, 4.0]])).detach()
        tensor([[0., 8.]])
    """

    def __init__(self, num_channels: int, gradient: Gradient = "as_written") -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(num_channels))
        self.gradient = _checked(gradient)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        z = self.w * self.w * torch.relu(x)
        if self.gradient == "by_hand":
            safe = torch.where(z > 0, z, torch.ones_like(z))
            return torch.where(z > 0, safe * torch.sqrt(safe), torch.zeros_like(z))
        return torch.where(z > 0, z * torch.sqrt(z), torch.zeros_like(z))


#: The four activations in the order of the layers.
FAILURES = ("gamma", "newton", "bump", "root")


class FailingMLP(Classifier):
    """A multilayer perceptron with the four activations after its four hidden layers: ``net.act0`` … ``net.act3``.

    Args:
        in_features: numbers in one input.
        width: of every hidden layer.
        classes: number of classes.
        failing: which of ``"gamma"``, ``"newton"``, ``"bump"``, ``"root"`` are as written, so that backprop fails in
            them; the others carry hand-written derivatives. An empty list is the control.
        optimizer: takes the parameters, returns the optimizer.

    Shape:
        x: (B, ...) with in_features numbers a sample -> logits: (B, C).

    Raises:
        UnknownNameError: an unknown name in `failing`.

    Example:
        >>> FailingMLP(width=8).net.act0
        GammaCurve()
    """

    def __init__(
        self,
        in_features: int = 64,
        width: int = 64,
        classes: int = 10,
        failing: list[str] = ["gamma", "newton", "bump", "root"],  # noqa: B006 - read only; the CLI's YAML wants a list
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1),
    ) -> None:
        sizes("in_features, width and classes", [in_features, width, classes])
        for name in failing:
            if name not in FAILURES:
                raise unknown_name("failing activation", name, FAILURES)
        how: dict[str, Gradient] = {name: "as_written" if name in failing else "by_hand" for name in FAILURES}
        activations: list[nn.Module] = [
            GammaCurve(width, how["gamma"]),
            NewtonTanh(num_channels=width, gradient="no_grad" if "newton" in failing else "unrolled"),
            ClippedBump(width, how["bump"]),
            RootGate(width, how["root"]),
        ]
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, activation in enumerate(activations):
            layers[f"linear{i}"] = nn.Linear(in_features if i == 0 else width, width)
            layers[f"norm{i}"] = nn.LayerNorm(width)  # four curves in a row squeeze the signal otherwise
            layers[f"act{i}"] = activation
        layers["head"] = nn.Linear(width, classes)
        super().__init__(nn.Sequential(layers), optimizer)
