"""Hurwitz's zeta function with a learnable exponent."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, apply, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.bridge import Opaque
from dualnn.engine.errors import DualInputError, unknown_name

#: Terms summed one by one, before the Euler-Maclaurin tail.
TERMS = 10
#: B_2j / (2j)!, j = 1 ... 12.
BERNOULLI = [
    b / math.factorial(2 * j)
    for j, b in enumerate(
        [
            1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798,
            -174611 / 330, 854513 / 138, -236364091 / 2730,
        ],
        start=1,
    )
]  # fmt: skip
#: The exponent stays above this: zeta has a pole at 1.
MINIMUM = 1.01


def _sum(q: Tensor, s: Tensor) -> Tensor:
    if bool((s <= 1).any()) or bool((q <= 0).any()):
        raise DualInputError(f"zeta: need s > 1 and q > 0, got s >= {s.min().item():.6g}, q >= {q.min().item():.6g}")
    total: Any = 0.0
    for k in range(TERMS):
        total = total + (q + k) ** -s
    end = q + TERMS
    power = end**-s
    total = total + power * end / (s - 1) + power / 2
    rising, factor = s, power / end  # s (s + 1) ... (s + 2j - 2) and end^(-s - 2j + 1)
    for j, b in enumerate(BERNOULLI, start=1):
        total = total + b * rising * factor
        rising, factor = rising * (s + 2 * j - 1) * (s + 2 * j), factor / (end * end)
    return total


def _softplus_sum(x: Tensor, s: Tensor) -> Tensor:
    return _sum(1 - F.logsigmoid(-x), s)  # not F.softplus, which is cut off at 20


# Run on duals: a dozen numbers an entry are carried while it runs, none is taped.
DIRECT, SOFTPLUS = Opaque(_sum), Opaque(_softplus_sum)


def hurwitz_zeta(s: Tensor, q: Tensor) -> Tensor:
    """Differentiable zeta(s, q) = sum_{k >= 0} (q + k)^(-s), s > 1, q > 0; Riemann's zeta(s) at q = 1.

    Value and derivatives of every order in s and q (measured to the second) have a relative error below 5e-12 in
    float64 for 1.01 <= s <= 50, 0.05 <= q <= 1e4.

    Raises:
        DualInputError: s <= 1 or q <= 0 somewhere.

    Example:
        >>> import torch
        >>> s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> hurwitz_zeta(s, torch.ones((), dtype=torch.float64)).backward()
        >>> s.grad  # -sum log(n) / n^2
        tensor(-0.9375, dtype=torch.float64)
    """
    return apply(DIRECT, q, s)


def _reference(x: Any, s: Any) -> Any:
    import mpmath as mp

    return mp.zeta(s, x)


def _softplus_reference(x: Any, s: Any) -> Any:
    import mpmath as mp

    return mp.zeta(s, 1 + mp.log1p(mp.exp(x)))


@register("zeta")
class Zeta(Activation):
    r"""Hurwitz's zeta function: a falling sigmoid whose tail is a power law of learnable exponent s per channel.

    .. math:: y = \zeta(s, q) = \sum_{k=0}^{\infty} \frac{1}{(q + k)^s}, \qquad
       q = 1 + \log(1 + e^x) \text{ ("softplus") or } q = x > 0 \text{ ("direct")}

    From Riemann's zeta(s) on the far left to q^(1 - s) / (s - 1) on the right. Euler-Maclaurin summation; the
    derivatives, in s as well, are those of the sum itself, carried by duals.

    Why it exists: `torch.special.zeta(s, q)` has no derivative in s, in any mode. With it a network learns the exponent
    of a power law (Zipf, Pareto counts), whose normaliser it is.

    Ranges: a relative error below 5e-12 in float64 for value, first and second derivatives, 1.01 <= s <= 50,
    0.05 <= q <= 1e4. In float32 1e-6 of the value's scale.

    Args:
        s: Initial exponent, > 1.01.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        argument: "softplus" (all real x) or "direct" (x > 0).

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same, > 0. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; s not above 1.01; an entry <= 0 with argument="direct".
        UnknownNameError: another `argument`.

    Reference:
        NIST Digital Library of Mathematical Functions, 25.11. Johansson, "Rigorous high-precision computation of the
        Hurwitz zeta function and its derivatives", 2014, arXiv 1309.2877.

    Example:
        >>> import torch
        >>> round(Zeta(s=2.0, argument="direct")(torch.ones(1)).item(), 4)  # pi^2 / 6
        1.6449
    """

    def __init__(self, s: float = 2.0, num_channels: int = 1, argument: str = "softplus") -> None:
        """Start every channel at the same exponent."""
        super().__init__(num_channels)
        if argument not in ("softplus", "direct"):
            raise unknown_name("argument of zeta", argument, ["softplus", "direct"])
        if not s > MINIMUM:
            raise DualInputError(f"zeta: the exponent s must exceed {MINIMUM}, got {s}")
        self.argument = argument
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(s - MINIMUM)))

    @property
    def local(self) -> Opaque:
        """The summation."""
        return SOFTPLUS if self.argument == "softplus" else DIRECT

    def natural(self) -> tuple[Tensor]:
        """The exponent, of shape (num_channels,)."""
        return (MINIMUM + F.softplus(self.raw),)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"argument={self.argument!r}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        return [
            Sample({}, (-9.0, -1.0, 0.3, 2.0, 30.0), _softplus_reference),
            Sample({"s": 1.3, "argument": "direct"}, (0.2, 1.0, 7.5, 40.0), _reference),
        ]
