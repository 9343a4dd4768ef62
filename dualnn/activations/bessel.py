"""Bessel functions of a learnable real order."""

import math
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Formula, Sample, apply, inverse_softplus
from dualnn.activations.nodes import gauss_legendre, quadrature
from dualnn.activations.registry import register
from dualnn.engine.bridge import ClosedForm, elementwise
from dualnn.engine.errors import DualInputError, unknown_name

#: Arguments within [LOW, HIGH], orders within [0, HIGH / 5]: near 0 a non-integer order is singular.
LOW, HIGH = 0.1, 500.0
#: Where "softplus" starts.
START = 0.5


@torch.no_grad()
def _integrals(kind: str, m: int, n: int, x: Tensor, nu: Tensor) -> Tensor:
    x, nu = torch.broadcast_tensors(x, nu)
    if bool(((x < LOW) | (x > HIGH)).any()) or bool(((nu < 0) | (nu > HIGH / 5)).any()):
        raise DualInputError(
            f"bessel: need {LOW} <= x <= {HIGH:g} and 0 <= order <= {HIGH / 5:g}, got x from {x.min().item():.6g} to "
            f"{x.max().item():.6g}, order from {nu.min().item():.6g} to {nu.max().item():.6g}"
        )

    def around(t: Tensor) -> Tensor:
        theta = math.pi * t
        if kind == "j":
            wave = torch.cos(x * torch.sin(theta) - nu * theta + (n - m) * math.pi / 2)
            return theta**m * torch.sin(theta) ** n * wave
        fall = -2 * torch.sin(theta / 2) ** 2  # cos(theta) - 1
        return theta**m * fall**n * torch.exp(x * fall) * torch.cos(nu * theta + m * math.pi / 2)

    end = torch.asinh(45 / x)
    sine, cosine = torch.sin(math.pi * nu), torch.cos(math.pi * nu)

    def beyond(t: Tensor) -> Tensor:
        t = end * t
        # d^m/d nu^m of sin(pi nu) exp(-nu t) is the imaginary part of (i pi - t)^m exp(i pi nu - nu t).
        real, imaginary = torch.ones_like(t), torch.zeros_like(t)
        for _ in range(m):
            real, imaginary = -t * real - math.pi * imaginary, math.pi * real - t * imaginary
        rate = torch.sinh(t) if kind == "j" else 1 + torch.cosh(t)
        return (real * sine + imaginary * cosine) * (-rate) ** n * torch.exp(-x * rate - nu * t)

    finite = torch.where(torch.isfinite(x + nu), x + nu, 0.0)
    reach = math.ceil(finite.max().item()) if finite.numel() else 0  # the waves of the first integrand, about
    nodes = 16 * math.ceil((56 + 0.9 * reach) / 16)
    first = quadrature(around, gauss_legendre(nodes), x)
    return first - end / math.pi * quadrature(beyond, gauss_legendre(80), x)


@cache
def bessel(kind: str, m: int = 0, n: int = 0) -> ClosedForm:
    r"""The derivative, m times in the order and n times in x, as a local function of (x, order), to any order.

    "j" is J, "i" is exp(-x) I, by Schläfli's integrals,

    .. math:: J_\nu(x) = \frac{1}{\pi} \int_0^\pi \cos(x \sin\theta - \nu\theta) d\theta
       - \frac{\sin \nu\pi}{\pi} \int_0^\infty e^{-x \sinh t - \nu t} dt

    whose derivatives are integrals of the same kind.

    Example:
        >>> x = torch.ones((), dtype=torch.float64)
        >>> elementwise(bessel("j"), x, 0 * x)
        tensor(0.7652, dtype=torch.float64)
    """
    return ClosedForm(
        partial(_integrals, kind, m, n),
        lambda y, x, nu: (elementwise(bessel(kind, m, n + 1), x, nu), elementwise(bessel(kind, m + 1, n), x, nu)),
    )


def bessel_j(order: Tensor, x: Tensor) -> Tensor:
    """Differentiable Bessel function J of real order, in both arguments, for 0.1 <= x <= 500, 0 <= order <= 100.

    Value and derivatives (measured to the second) have an absolute error below 1e-11 in float64.

    Raises:
        DualInputError: x or order out of range.

    Example:
        >>> order = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> bessel_j(order, torch.ones((), dtype=torch.float64)).backward()
        >>> order.grad  # pi / 2 Y_0(1)
        tensor(0.1386, dtype=torch.float64)
    """
    return apply(bessel("j"), x, order)


def bessel_i(order: Tensor, x: Tensor) -> Tensor:
    """Differentiable exp(-x) I, I the modified Bessel function of real order; ranges and errors as `bessel_j`.

    Example:
        >>> bessel_i(torch.tensor(0.5), torch.tensor(2.0))
        tensor(0.2769)
    """
    return apply(bessel("i"), x, order)


def _evaluate(kind: str, argument: str, x: Tensor, nu: Tensor) -> Tensor:
    z = START - F.logsigmoid(-x) if argument == "softplus" else x  # not F.softplus, which is cut off at 20
    return elementwise(bessel(kind), z, nu)


# The compiler would trace the quadrature into the graph of every call.
_disabled = torch.compiler.disable(_evaluate)


def _reference(kind: str, argument: str, x: Any, nu: Any) -> Any:
    import mpmath as mp

    z = START + mp.log1p(mp.exp(x)) if argument == "softplus" else x
    return mp.besselj(nu, z) if kind == "j" else mp.exp(-z) * mp.besseli(nu, z)


@register("bessel")
class Bessel(Activation):
    r"""A Bessel function whose real order nu >= 0 is learned per channel: a damped wave, or a bump with a heavy tail.

    .. math:: y = J_\nu(z) \text{ ("j") or } y = e^{-z} I_\nu(z) \text{ ("i")}, \qquad
       z = \tfrac{1}{2} + \log(1 + e^x) \text{ ("softplus") or } z = x \ge 0.1 \text{ ("direct")}

    Why it exists: torch has the orders 0 and 1 only, and nothing, anywhere, in the order: its derivative has no closed
    form (scipy has none). With it a network learns the order of a radial wave, or the concentration of a von
    Mises-Fisher distribution, whose normaliser is I, in any (also fractional) dimension.

    Ranges: value, first and second derivatives have an absolute error below 1e-11 in float64 for z in [0.1, 500] and nu
    in [0, 100]; outside a `DualInputError` says so. Where the value is tiny (z much smaller than nu) its relative
    accuracy is lost. In float32 the error is about 1e-5 for z up to 50.

    Args:
        order: Initial nu, > 0.
        kind: "j" or "i".
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        argument: "softplus" (all real x) or "direct" (0.1 <= x <= 500).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; argument or order out of range.
        UnknownNameError: another `kind` or `argument`.

    Reference:
        NIST Digital Library of Mathematical Functions, 10.9 (Schläfli's integrals) and 10.15 (derivatives in the
        order).

    Example:
        >>> act = Bessel(order=0.5, argument="direct")
        >>> round(act(torch.tensor([torch.pi / 2])).item(), 4)  # sqrt(2 / (pi x)) sin x
        0.6366
    """

    def __init__(self, order: float = 1.0, kind: str = "j", num_channels: int = 1, argument: str = "softplus") -> None:
        """Start every channel at the same order."""
        super().__init__(num_channels)
        if kind not in ("j", "i"):
            raise unknown_name("kind of bessel", kind, ["j", "i"])
        if argument not in ("softplus", "direct"):
            raise unknown_name("argument of bessel", argument, ["softplus", "direct"])
        if not 0 < order < HIGH / 5:
            raise DualInputError(f"bessel: the order must lie in (0, {HIGH / 5:g}), got {order}")
        self.kind, self.argument = kind, argument
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(order)))

    @property
    def local(self) -> Formula:
        """Value and derivatives."""
        return Formula(partial(_disabled, self.kind, self.argument))

    def natural(self) -> tuple[Tensor]:
        """The order, of shape (num_channels,)."""
        return (F.softplus(self.raw),)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"kind={self.kind!r}, argument={self.argument!r}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        return [
            Sample({}, (-6.0, -0.5, 1.0, 4.0, 20.0), partial(_reference, "j", "softplus")),
            Sample({"order": 2.6, "kind": "i"}, (-2.0, 0.7, 3.0, 15.0), partial(_reference, "i", "softplus")),
            Sample({"order": 0.4, "argument": "direct"}, (0.3, 2.0, 7.7, 40.0), partial(_reference, "j", "direct")),
        ]
