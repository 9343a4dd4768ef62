"""What every activation shares: input checks, per-channel parameters, precision; and what it brings for its tests."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualnn.engine import bridge
from dualnn.engine.errors import DualInputError, DualShapeError


@dataclass(frozen=True)
class Sample:
    """One setting of an activation and the oracle for it: with these the standard tests come free.

    Attributes:
        options: Constructor arguments.
        points: Inputs at which value and derivatives are tested.
        reference: (x, *natural parameters) -> value, scalar, on mpmath numbers, an implementation independent of the
            activation's own; its derivatives are taken by mpmath.
        primitive: For an activation whose tangent is a surrogate: the function whose derivative it is (on mpmath
            numbers too). None: `reference` itself.
        step: Step of the finite differences: small beside the distance over which the function bends.
    """

    options: dict[str, Any]
    points: tuple[float, ...]
    reference: Callable[..., Any]
    primitive: Callable[..., Any] | None = None
    step: float = 1e-3


@dataclass(frozen=True)
class Formula:
    """Plain differentiable torch code of broadcasting arguments: autograd, duals and the compiler take it as it is.

    Attributes:
        fn: ``fn(x, *parameters) -> y``, elementwise.
    """

    fn: Callable[..., Tensor]


def inverse_softplus(value: float) -> float:
    """The r with log(1 + exp(r)) = value, value > 0."""
    return value + math.log(-math.expm1(-value))


# Solvers with data-dependent stops trace into dozens of small graphs: one clean graph break instead (60x quicker).
_bridged = torch.compiler.disable(bridge.elementwise)


def apply(local: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    """Evaluate `local`, by the autograd bridge unless it is a Formula: in float32 at least, the result in x's dtype.

    Args:
        local: ClosedForm, Equation, Opaque or Formula.
        x: Input.
        parameters: Broadcastable with x.

    Shape:
        x: (*) -> y: (*).

    Raises:
        DualInputError: x is not a floating-point tensor.
    """
    args = widened(x, *parameters)
    y = local.fn(*args) if isinstance(local, Formula) else _bridged(local, *args)
    return y if x.dtype == y.dtype else y.to(x.dtype)


def widened(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """All tensors in the widest of their dtypes and float32.

    Raises:
        DualInputError: x is not a floating-point tensor.
    """
    if not torch.is_floating_point(x):
        raise DualInputError(f"an activation needs a floating-point tensor, got {x.dtype}: convert it (x.float())")
    # A half-precision solver could not reach its tolerance, and a half-precision 1 + y cancels.
    compute = torch.float32
    for tensor in (x, *parameters):
        compute = torch.promote_types(compute, tensor.dtype)
    return [t if t.dtype == compute else t.to(compute) for t in (x, *parameters)]


class Activation(nn.Module):
    """Base of the activations: y = local(x, *natural()), elementwise.

    A subclass is data. It sets `local` (a Formula, or a ClosedForm, an Equation or an Opaque of the bridge) and
    `natural`, which maps its unconstrained parameters to those that `local` takes; it gives `samples` to the
    standard tests; and it registers itself with `dualnn.activations.registry.register`. The bridge does the rest:
    backward, double backward, torch.func and dual inputs.

    Args:
        num_channels: 1 (one set of parameters for all entries) or the number of channels of the input, as
            `num_parameters` of `torch.nn.PReLU`: dimension 1, and dimension 0 of a 1-D input.

    Shape:
        x: (*), or (N, num_channels, *), or (num_channels,) -> y: the same.

    Raises:
        DualInputError: integer, boolean or complex input.
        DualShapeError: the input does not have num_channels channels.

    Example:
        >>> from dualnn.activations.kepler import Kepler
        >>> Kepler(num_channels=3)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    #: The name under which it is registered (set by `register`).
    name: ClassVar[str] = ""

    #: Whether every output depends on one input only.
    elementwise: ClassVar[bool] = True

    def __init__(self, num_channels: int = 1) -> None:
        """Check and keep the number of channels."""
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise DualInputError(f"{type(self).__name__}: num_channels must be an integer >= 1, got {num_channels!r}")
        self.num_channels = num_channels

    @property
    def local(self) -> Any:
        """How to get the value and the partial derivatives: a Formula, a ClosedForm, an Equation or an Opaque."""
        raise NotImplementedError

    def natural(self) -> tuple[Tensor, ...]:
        """The parameters that `local` takes after x, each of shape (num_channels,)."""
        return ()

    def describe(self) -> str:
        """Arguments for the repr, beside num_channels."""
        return ""

    @classmethod
    def samples(cls) -> list[Sample]:
        """Settings, inputs and oracles for the standard tests."""
        raise NotImplementedError

    def per_channel(self, value: float) -> Tensor:
        """A new tensor of shape (num_channels,) filled with `value`."""
        return torch.full((self.num_channels,), float(value))

    def per_channel_row(self, values: Sequence[float]) -> Tensor:
        """A new tensor of shape (num_channels, len(values)): the same values for every channel."""
        return torch.tensor([[float(v) for v in values]] * self.num_channels)

    def _spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Shape a (num_channels,) parameter so that it broadcasts along x's channels."""
        if self.num_channels == 1:
            return parameter.reshape(())
        dim = 0 if x.ndim == 1 else 1
        if x.ndim == 0 or x.shape[dim] != self.num_channels:
            raise DualShapeError(
                f"{type(self).__name__}(num_channels={self.num_channels}) needs an input of shape "
                f"(N, {self.num_channels}, *) or ({self.num_channels},), got {tuple(x.shape)}"
            )
        return parameter.reshape((-1,) + (1,) * (x.ndim - dim - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every entry of x."""
        return apply(self.local, x, *(self._spread(p, x) for p in self.natural()))

    def extra_repr(self) -> str:
        """Arguments, for print(module)."""
        channels = f"num_channels={self.num_channels}" if self.natural() else ""
        return ", ".join(part for part in (channels, self.describe()) if part)
