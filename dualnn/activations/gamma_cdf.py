"""The cumulative distribution function of the gamma distribution, with a learnable shape."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, apply, inverse_softplus
from dualnn.activations.registry import register
from dualnn.engine.bridge import ClosedForm, elementwise
from dualnn.engine.errors import DualInputError, unknown_name
from dualnn.engine.incomplete_gamma import density, log_gamma, lower_gamma, shape_derivative


def _log_softplus(x: Tensor) -> Tensor:
    # Three ranges: exp(x) underflows, log1p(exp(x)) is exact, exp(x) overflows.
    middle = torch.log(torch.log1p(torch.exp(x.clamp(-30, 0))))
    right = torch.log(x.clamp(min=0) + torch.log1p(torch.exp(-x.clamp(min=0))))
    return torch.where(x < -30, x - torch.exp(x) / 2, torch.where(x < 0, middle, right))


LOG_SOFTPLUS = ClosedForm(_log_softplus, lambda y, x: (torch.exp(F.logsigmoid(x) - y),))
"""log(log(1 + exp(x))), without underflow on the left; its derivative is sigmoid(x) / softplus(x)."""


def _softplus_value(x: Tensor, a: Tensor) -> Tensor:
    return shape_derivative(0, _log_softplus(x), a)


def _softplus_partials(y: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    u = elementwise(LOG_SOFTPLUS, x)
    return density(0, u, a) * torch.exp(F.logsigmoid(x) - u), elementwise(lower_gamma(1), u, a)


def _direct_value(x: Tensor, a: Tensor) -> Tensor:
    if bool((x < 0).any()):
        raise DualInputError(
            f"gamma_cdf: argument='direct' needs x >= 0, got {x.min().item():.6g} ({int((x < 0).sum())} of {x.numel()} "
            "entries). argument='softplus' takes every real x."
        )
    if bool((a <= 0).any()):
        raise DualInputError(f"gamma_cdf: the shape must be positive, got {a.min().item():.6g}")
    return shape_derivative(0, torch.log(x), a)


def _direct_partials(y: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    # x^(a-1) exp(-x) / Gamma(a). Below 1 by a power, which has the right derivatives at x = 0; above 1 by logarithms,
    # which do not overflow.
    log_norm = elementwise(log_gamma(0), a)
    low, high = x.clamp(max=1), x.clamp(min=1)
    below = torch.pow(low, a - 1) * torch.exp(-low - log_norm)
    above = torch.exp((a - 1) * torch.log(high) - high - log_norm)
    u = torch.log(torch.where(x > 0, x, 1.0))
    in_shape = elementwise(lower_gamma(1), u, a)
    return torch.where(x < 1, below, above), torch.where(x > 0, in_shape, 0.0)


SOFTPLUS = ClosedForm(_softplus_value, _softplus_partials)
DIRECT = ClosedForm(_direct_value, _direct_partials)


def gamma_p(a: Tensor, x: Tensor) -> Tensor:
    """Differentiable regularised lower incomplete gamma function P(a, x), a > 0, x >= 0: gammainc with derivatives.

    At x = 0 dP/dx is its one-sided limit (inf for a < 1, 1 for a = 1, 0 for a > 1) and dP/da is 0.

    Example:
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> gamma_p(a, torch.tensor(3.0, dtype=torch.float64)).backward()
        >>> a.grad
        tensor(-0.1974, dtype=torch.float64)
    """
    return apply(DIRECT, x, a)


def parametrise(raw: Tensor, minimum: float) -> Tensor:
    """alpha = minimum + softplus(raw) > minimum."""
    return minimum + F.softplus(raw)


def _p_reference(a: Any, x: Any) -> Any:
    import mpmath as mp

    # By the tail where it is the small one: mpmath's lower function loses digits to 1 there.
    return mp.gammainc(a, 0, x, regularized=True) if x < a + 1 else 1 - mp.gammainc(a, x, mp.inf, regularized=True)


def _direct_reference(x: Any, a: Any) -> Any:
    return _p_reference(a, x)


def _softplus_reference(x: Any, a: Any) -> Any:
    import mpmath as mp

    return _p_reference(a, mp.log1p(mp.exp(x)))


@register("gamma_cdf")
class GammaCDF(Activation):
    r"""The gamma distribution's CDF, with a learnable shape alpha per channel: a sigmoid that learns its skewness.

    .. math:: y = P(\alpha, z) = \frac{1}{\Gamma(\alpha)} \int_0^z t^{\alpha - 1} e^{-t} dt, \qquad
       z = \log(1 + e^x) \text{ ("softplus") or } z = x \ge 0 \text{ ("direct")}

    At alpha = 1 and with "softplus" it is exactly the logistic sigmoid. dy/dz = z^(alpha-1) exp(-z) / Gamma(alpha);
    dy/dalpha and all higher derivatives come from a series and a continued fraction carried as jets in alpha, with a
    data-dependent stop.

    Why it exists: `torch.special.gammainc(a, x)` has no backward for a and no forward derivative at all (and its
    float64 value is off by up to 2e-9 for a > 20). With it a network can learn the shape of a gamma distribution.

    Ranges: value and first derivatives have a relative error below 1e-12 in float64 for alpha in [0.05, 200] and
    z in [0, 500]; second derivatives below 1e-12 of their scale. Outside it stays finite, with an error of about
    eps * alpha log(alpha), up to alpha = 1e6. In float32 the errors are 1e-6 at alpha = 1 and 1e-4 at 200.

    Args:
        alpha: Initial shape, > minimum.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        argument: "softplus" (all real x) or "direct" (x >= 0).
        minimum: alpha > minimum is guaranteed.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same, in [0, 1]. A NaN input gives NaN at that entry only. With
        "direct", dy/dx at x = 0 is its one-sided limit: inf for alpha < 1, 1 for alpha = 1, 0 for alpha > 1.
        bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; a negative entry with argument="direct"; alpha <= minimum or minimum <= 0.
        UnknownNameError: another `argument`.

    Reference:
        Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, 6.5.29 and 6.5.31. Moore, "Algorithm AS 187:
        derivatives of the incomplete gamma integral", 1982.

    Example:
        >>> act = GammaCDF(alpha=2.0)
        >>> act(torch.zeros(1)).backward()
        >>> act.raw.grad.item() < 0  # a larger shape moves the step to the right
        True
    """

    def __init__(
        self, alpha: float = 1.0, num_channels: int = 1, argument: str = "softplus", minimum: float = 0.05
    ) -> None:
        """Start every channel at the same shape."""
        super().__init__(num_channels)
        if argument not in ("softplus", "direct"):
            raise unknown_name("argument of gamma_cdf", argument, ["softplus", "direct"])
        if not 0 < minimum < alpha:
            raise DualInputError(f"gamma_cdf: need 0 < minimum < alpha, got {minimum=}, {alpha=}")
        self.argument, self.minimum = argument, minimum
        self.raw = nn.Parameter(self.per_channel(inverse_softplus(alpha - minimum)))

    @property
    def local(self) -> ClosedForm:
        """Value and derivatives."""
        return SOFTPLUS if self.argument == "softplus" else DIRECT

    def natural(self) -> tuple[Tensor]:
        """The current shape, of shape (num_channels,)."""
        return (parametrise(self.raw, self.minimum),)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"argument={self.argument!r}, minimum={self.minimum}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-20.0, -5.0, -1.3, 0.0, 0.4, 2.0, 3.5, 9.0, 30.0)
        positive = (1e-3, 0.2, 0.9, 1.2, 3.3, 8.0, 60.0)
        return [
            Sample({}, points, _softplus_reference),
            Sample({"alpha": 0.3}, points, _softplus_reference),
            Sample({"alpha": 7.0}, points, _softplus_reference),
            Sample({"alpha": 2.5, "argument": "direct"}, positive, _direct_reference),
        ]
