"""y + a tanh(b y) = x, solved by Newton's method and differentiated at the solution."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, apply, inverse_softplus
from dualnn.activations.monotone import increasing_root
from dualnn.activations.registry import register
from dualnn.engine.bridge import Equation
from dualnn.engine.errors import DualInputError


def residual(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """F(y; x, a, b) = y + a tanh(b y) - x, elementwise and differentiable in every argument."""
    return y + a * torch.tanh(b * y) - x


@torch.no_grad()
def solve(x: Tensor, a: Tensor, b: Tensor, tol: float | None = None, max_steps: int = 100) -> Tensor:
    """The y with residual(y, x, a, b) = 0, by Newton: value only, in place, data-dependent stop.

    Args:
        x: Right-hand side.
        a: Height of the tanh; a b > -1.
        b: Slope of the tanh.
        tol: Largest residual relative to abs(x) + abs(y) + abs(a tanh(b y)); None: 4 eps of the dtype;
            0: run exactly `max_steps` steps.
        max_steps: Number of steps after which to give up.

    Shape:
        x, a, b: broadcastable to (*) -> y: (*). A NaN entry gives NaN there and disturbs no other.

    Raises:
        DualInputError: a b <= -1 somewhere (the solution is not unique).
        ConvergenceError: not converged after `max_steps` (tol > 0 only).
    """
    if bool((a * b <= -1).any()):
        worst = (a * b).min().item()
        raise DualInputError(f"implicit_tanh: a * b must exceed -1 for a unique solution, got {worst:.6g}")
    x, a, b = torch.broadcast_tensors(x, a, b)
    # tanh is odd: with a' = a sign(b), b' = abs(b) the equation is the same. For x >= 0 the residual is concave
    # in y >= 0 if a' >= 0 and convex otherwise; from the bounds below Newton then climbs (falls) monotonically.
    a_signed, b_size = a * torch.sign(b), b.abs()
    chord = x.abs() / (1 + a_signed * b_size)  # tanh(b y) <= b y
    flat = x.abs() - a_signed  # tanh(b y) <= 1
    start = torch.copysign(torch.where(a_signed >= 0, torch.maximum(chord, flat), torch.minimum(chord, flat)), x)
    reach = a.abs() + 4 * torch.finfo(x.dtype).eps * (x.abs() + a.abs())

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.tanh(b * y)
        at = a * t
        # sech^2 by cosh would overflow; (1 - t)(1 + t) loses digits only where it is negligible beside 1.
        return y + at - x, 1 + a * b * (1 - t) * (1 + t), y.abs() + at.abs() + x.abs()

    one, ab = torch.ones((), dtype=x.dtype, device=x.device), a * b
    t, slope = torch.empty_like(start), torch.empty_like(start)

    def newton(y: Tensor) -> None:
        torch.mul(b, y, out=t).tanh_()
        # 1 - t^2 >= 0 in floating point too, so the slope stays above min(1, 1 + a b) > 0.
        torch.addcmul(one, t, t, value=-1, out=slope)
        torch.addcmul(one, slope, ab, out=slope)
        y.addcdiv_(t.mul_(a).add_(y).sub_(x), slope, value=-1)

    return increasing_root(evaluate, x - reach, x + reach, start, tol, max_steps, "implicit_tanh", newton)


def parametrise(raw_product: Tensor, raw_slope: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Map two unconstrained tensors to (a, b) with b > 0 and a b > -1 + margin.

    b = softplus(raw_slope),  a b = softplus(raw_product) - 1 + margin.
    """
    b = F.softplus(raw_slope)
    return (F.softplus(raw_product) - (1 - margin)) / b, b


def implicit_tanh(x: Tensor, a: Tensor, b: Tensor, tol: float | None = None, max_steps: int = 100) -> Tensor:
    """Differentiable y with y + a tanh(b y) = x, for tensors a, b that broadcast with x (see `solve`).

    Example:
        >>> y = implicit_tanh(torch.tensor([2.0]), torch.tensor(1.0), torch.tensor(1.0))
        >>> y + torch.tanh(y)
        tensor([2.])
    """
    return apply(Equation(partial(solve, tol=tol, max_steps=max_steps), residual), x, a, b)


def _reference(x: Any, a: Any, b: Any) -> Any:
    import mpmath as mp

    low, high = x - abs(a) - 1, x + abs(a) + 1
    return mp.findroot(lambda y: y + a * mp.tanh(b * y) - x, (low, high), solver="anderson", verify=False)


@register("implicit_tanh")
class ImplicitTanh(Activation):
    r"""The solution y of an equation, with learnable a and b per channel.

    .. math:: y + a \tanh(b y) = x, \qquad a b > -1

    For a > 0 it flattens around 0 and passes large inputs on as x -+ a (a smooth soft threshold); for a < 0 it is
    steepest at 0. dy/dx = 1 / (1 + a b (1 - tanh^2(b y))), dy/da = -tanh(b y) dy/dx,
    dy/db = -a y (1 - tanh^2(b y)) dy/dx.

    Why it exists: there is no closed form. The Newton iterations run under `no_grad`, in place, with a stop that
    depends on the data, so plain backprop loses the gradient silently, and unrolling them costs memory in
    proportion to the steps. Here one dual evaluation of the residual at the solution gives every derivative
    (implicit function theorem): exact, and independent of the number of steps.

    Args:
        a: Initial a.
        b: Initial b, > 0 (the sign of a carries the sign of a b).
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        margin: a b > -1 + margin is guaranteed, so the slope dy/dx never exceeds 1 / margin.
        tol: See `solve`. 0 runs exactly `max_steps` steps.
        max_steps: Number of Newton steps after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. A NaN input gives NaN at that entry only. bfloat16 and
        float16 are computed in float32.

    Raises:
        DualInputError: integer input; b <= 0, a b <= -1 + margin, or margin outside (0, 1) at construction.
        ConvergenceError: see `max_steps`.

    Reference:
        The implicit function theorem on a solved equation, as in Bai, Kolter, Koltun, "Deep Equilibrium Models",
        2019, arXiv 1909.01377.

    Example:
        >>> act = ImplicitTanh(a=2.0)
        >>> x = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> act(x).sum().backward()
        >>> x.grad[0]
        tensor(0.3333)
    """

    def __init__(
        self,
        a: float = 1.0,
        b: float = 1.0,
        num_channels: int = 1,
        margin: float = 1e-3,
        tol: float | None = None,
        max_steps: int = 100,
    ) -> None:
        """Start every channel at the same a, b."""
        super().__init__(num_channels)
        if not 0 < margin < 1:
            raise DualInputError(f"implicit_tanh: margin must lie in (0, 1), got {margin}")
        if not b > 0 or not a * b > -1 + margin:
            raise DualInputError(f"implicit_tanh: need b > 0 and a * b > -1 + margin = {margin - 1:g}, got {a=}, {b=}")
        self.margin, self.tol, self.max_steps = margin, tol, max_steps
        self.raw_product = nn.Parameter(self.per_channel(inverse_softplus(a * b + 1 - margin)))
        self.raw_slope = nn.Parameter(self.per_channel(inverse_softplus(b)))

    @property
    def local(self) -> Equation:
        """The equation and its solver."""
        return Equation(partial(solve, tol=self.tol, max_steps=self.max_steps), residual)

    def natural(self) -> tuple[Tensor, Tensor]:
        """The current (a, b), each of shape (num_channels,)."""
        return parametrise(self.raw_product, self.raw_slope, self.margin)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"margin={self.margin}, tol={self.tol}, max_steps={self.max_steps}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        points = (-30.0, -2.5, -0.8, -0.03, 0.0, 0.2, 1.0, 1.7, 4.0, 250.0)
        return [
            Sample({}, points, _reference),
            Sample({"a": -0.7, "b": 1.3}, points, _reference),
            Sample({"a": 3.0, "b": 4.0}, points, _reference),
        ]
