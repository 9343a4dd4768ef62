"""Lambert's W: the w with w exp(w) = x, and Wright's omega, the w with w + log w = x."""

import math
from typing import Any

import torch
from torch import Tensor

from dualnn.activations.base import Activation, Sample, apply
from dualnn.activations.registry import register
from dualnn.engine.bridge import ClosedForm
from dualnn.engine.errors import DualInputError, unknown_name

#: 1/e is the sum of these two floats.
_INV_E, _INV_E_REST = 0.36787944117144233, -1.2428753672788363e-17


def _branch_point(like: Tensor) -> float:
    """The number of that dtype nearest to -1/e."""
    return torch.tensor(-_INV_E, dtype=like.dtype).item()


def _w_near_branch(x: Tensor) -> Tensor:
    """W0 on [-1/e, -1/4]: Halley on the distance d = w + 1, d exp(d) - expm1(d) = e (x + 1/e)."""
    # x + 1/e keeps its digits: the first sum is exact, the rest of 1/e follows.
    edge = _branch_point(x)
    q = math.e * ((x - edge) + ((edge + _INV_E) + _INV_E_REST)).clamp(min=0)
    p = torch.sqrt(2 * q)
    d = p * (1 - p * (1 / 3 - p * (11 / 72 - p * 43 / 540)))  # Puiseux series: 4 digits at x = -1/4
    for _ in range(3):
        grown = torch.exp(d)
        f = d * grown - torch.expm1(d) - q
        slope = d * grown
        step = f / (slope - f * (1 + d) / (2 * d))
        d = torch.where(d > 0, d - step, d)
    return d - 1


def _w_middle(x: Tensor) -> Tensor:
    """W0 on [-1/4, e]: Halley on w exp(w) - x, from Iacono and Boyd's start."""
    log = torch.log1p(x)
    w = log * (1 - torch.log1p(log) / (2 + log))
    for _ in range(3):
        f = w * torch.exp(w) - x
        slope = torch.exp(w) * (1 + w)
        w = w - f / (slope - f * (w + 2) / (2 * (1 + w)))
    return w


def _omega_large(x: Tensor) -> Tensor:
    """Omega on [1, inf): two quartic steps of Fritsch, Shafer and Crowley."""
    w = torch.where(x < 3, 1 + (x - 1) / 2 + (x - 1) ** 2 / 16 - (x - 1) ** 3 / 192, x - torch.log(x))
    for _ in range(2):
        r = x - w - torch.log(w)
        s = 1 + w
        relative, t = r / s, 2 * (s + 2 * r / 3)  # not 2 s (s + 2 r / 3), which overflows
        w = w * (1 + relative * (t - relative) / (t - 2 * relative))
    return torch.where(torch.isinf(x), x, w)


def _w0(x: Tensor) -> Tensor:
    w = torch.where(x < -0.25, _w_near_branch(x.clamp(max=-0.25)), _w_middle(x.clamp(-0.25, math.e)))
    return torch.where(x > math.e, _omega_large(torch.log(x.clamp(min=math.e))), w)


@torch.no_grad()
def _direct_value(x: Tensor) -> Tensor:
    # The float nearest to -1/e may lie on either side of it: it counts as the branch point.
    outside = x < _branch_point(x)
    if bool(outside.any()):
        raise DualInputError(
            f"lambert_w: the principal branch is real only for x >= -1/e = {-_INV_E:.9f}, got "
            f"{x[outside].flatten()[0].item():.9g} ({int(outside.sum())} of {x.numel()} entries). "
            "argument='exp' takes every real x."
        )
    return _w0(x)


@torch.no_grad()
def _omega_value(x: Tensor) -> Tensor:
    # Below 1, W0(exp(x)): w + log w would cancel. exp(1) <= e may round up, hence the clamp.
    return torch.where(x < 1, _w_middle(torch.exp(x.clamp(max=1)).clamp(max=math.e)), _omega_large(x.clamp(min=1)))


def _direct_partials(y: Tensor, x: Tensor) -> tuple[Tensor]:
    # W / (x (1 + W)) with x = W exp(W) put in: no 0 / 0 at x = 0.
    return (torch.exp(-y) / (1 + y),)


def _omega_partials(y: Tensor, x: Tensor) -> tuple[Tensor]:
    return (y / (1 + y),)


DIRECT = ClosedForm(_direct_value, _direct_partials)
OMEGA = ClosedForm(_omega_value, _omega_partials)


def lambertw(x: Tensor) -> Tensor:
    """Differentiable principal branch W0(x), x >= -1/e (DualInputError otherwise).

    Example:
        >>> lambertw(torch.tensor([0.0, math.e]))
        tensor([0., 1.])
    """
    return apply(DIRECT, x)


def wright_omega(x: Tensor) -> Tensor:
    """Differentiable omega(x) = W0(exp(x)), any real x.

    Example:
        >>> wright_omega(torch.tensor([1.0]))
        tensor([1.])
    """
    return apply(OMEGA, x)


def _direct_reference(x: Any) -> Any:
    import mpmath as mp

    return mp.lambertw(x).real


def _omega_reference(x: Any) -> Any:
    import mpmath as mp

    return mp.lambertw(mp.exp(x)).real


@register("lambert_w")
class LambertW(Activation):
    r"""Lambert's function W0, applied to exp(x) (the default) or to x itself.

    .. math:: \text{"exp": } y + \log y = x, \; y = W_0(e^x) \qquad \text{"direct": } y e^y = x, \; y \ge -1

    With `argument="exp"` it is Wright's omega: positive, convex, ~ exp(x) on the far left and ~ x - log(x) on the
    right, a softplus that grows a little slower; dy/dx = y / (1 + y). It is computed without forming exp(x) where
    that would overflow. With `argument="direct"`, dy/dx = exp(-y) / (1 + y): 1 at x = 0, infinite at the branch
    point x = -1/e, near which it behaves as e / sqrt(2 (e x + 1)).

    Why it exists: torch has no Lambert W; its iterations, unrolled, are taped and divide 0 by 0 at x = 0.

    Args:
        argument: "exp" (all real x) or "direct" (x >= -1/e).

    Shape:
        x: (*) -> y: the same. NaN gives NaN. Absolute error of some eps (relative as well, for x > -1/4 or "exp").
        bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; an entry below -1/e with argument="direct".
        UnknownNameError: another `argument`.

    Reference:
        Corless et al., "On the Lambert W function", 1996. Iacono, Boyd, "New approximations to the principal
        real-valued branch of the Lambert W-function", 2017. Lawrence, Corless, Jeffrey, "Algorithm 917: complex
        double-precision evaluation of the Wright omega function", 2012.

    Example:
        >>> x = torch.tensor([1.0, -200.0], requires_grad=True)
        >>> LambertW()(x).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.0000])
    """

    def __init__(self, argument: str = "exp") -> None:
        """Choose the argument of W0."""
        super().__init__()
        if argument not in ("exp", "direct"):
            raise unknown_name("argument of lambert_w", argument, ["exp", "direct"])
        self.argument = argument

    @property
    def local(self) -> ClosedForm:
        """Value and closed-form derivative."""
        return OMEGA if self.argument == "exp" else DIRECT

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"argument={self.argument!r}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        return [
            Sample({}, (-60.0, -8.0, -2.0, -0.5, 0.0, 0.9, 1.1, 2.5, 3.5, 40.0, 1e4), _omega_reference),
            Sample(
                {"argument": "direct"},
                (-0.36, -0.3, -0.2, -1e-3, 0.0, 0.1, 1.0, 2.6, 2.9, 50.0, 1e9),
                _direct_reference,
            ),
        ]
