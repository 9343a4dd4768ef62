"""Alpha-entmax with a learnable alpha: between softmax and sparsemax."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample
from dualnn.activations.threshold import Threshold
from dualnn.engine.errors import ConvergenceError, DualInputError

#: alpha stays in (LOW, HIGH): at 1 (softmax) the exponent is infinite, at 2 (sparsemax) the derivative jumps.
LOW, HIGH = 1.01, 2.0
MAX_STEPS = 100


def _excess(tau: Tensor, z: Tensor) -> Tensor:
    return (z - tau).clamp(min=0)


def solve(z: Tensor, e: Tensor) -> Tensor:
    """The tau with sum_i max(z_i - tau, 0)^e = 1, for rows whose largest entry is 0: by Newton, from the left.

    The sum is convex and falling in tau and at least 1 at tau = -1, so that the steps climb monotonically to the root.

    Shape:
        z: (*, n), e: () -> tau: (*, 1). Rows without a finite maximum keep tau = -1.

    Raises:
        ConvergenceError: after 100 steps.
    """
    tau = -torch.ones_like(z[..., :1])
    goal = 4 * torch.finfo(z.dtype).eps
    for _ in range(MAX_STEPS):
        s = _excess(tau, z)
        power = s**e
        slope = e * (power / s.clamp(min=torch.finfo(s.dtype).tiny)).sum(-1, keepdim=True)
        step = (power.sum(-1, keepdim=True) - 1) / slope
        moving = step > goal * tau.abs()  # False for NaN; rounding makes the last step negative
        if not bool(moving.any()):
            return tau
        tau = torch.where(moving, tau + step, tau)
    raise ConvergenceError(
        f"entmax: {int(moving.sum())} of {moving.numel()} rows did not converge in {MAX_STEPS} steps "
        f"(exponent {e.max().item():.4g}, {z.dtype}): compute in float64"
    )


def weights(tau: Tensor, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """d tau / dz = s^(e-1) / sum s^(e-1) and d tau / de = sum s^e log s / (e sum s^(e-1)), s = max(z - tau, 0)."""
    s = _excess(tau, z)
    inside = s > 0
    safe = torch.where(inside, s, 1.0)
    slope = torch.where(inside, safe ** (e - 1), 0.0)
    total = slope.sum(-1, keepdim=True)
    return slope / total, (slope * safe * torch.log(safe)).sum(-1, keepdim=True) / (e * total)


THRESHOLD = Threshold("entmax", solve, weights)


def entmax(x: Tensor, alpha: Tensor) -> Tensor:
    """Differentiable alpha-entmax along the last dimension, 1 < alpha <= 2.

    Example:
        >>> entmax(torch.tensor([1.0, 0.5, -2.0]), torch.tensor(1.5))
        tensor([0.6740, 0.3260, 0.0000])
    """
    # Only differences matter, and the tangent of a common shift cancels; the largest entry at 0 keeps their digits.
    top = x.amax(-1, keepdim=True).detach()
    masked = torch.isneginf(x)
    z = (alpha - 1) * torch.where(masked, 0.0, x - top)
    z = torch.where(masked, -2.0, z)  # tau >= -1, so that a mask stays outside
    e = 1 / (alpha - 1)
    tau = THRESHOLD(z, e)
    inside = z > tau
    y = torch.where(inside, torch.where(inside, z - tau, 1.0) ** e, 0.0)
    return torch.where(torch.isfinite(top), y, torch.nan)


def _reference(row: list, alpha: Any) -> list:
    import mpmath as mp

    e = 1 / (alpha - 1)
    z = [(alpha - 1) * v for v in row]

    def excess(tau: Any) -> Any:
        return mp.fsum((v - tau) ** e for v in z if v > tau) - 1

    tau = mp.findroot(excess, (max(z) - 1, max(z) - mp.mpf(len(z)) ** (1 - alpha)), solver="anderson", verify=False)
    return [(v - tau) ** e if v > tau else mp.mpf(0) for v in z]


@register("entmax")
class Entmax(Rows):
    r"""Alpha-entmax with a learnable alpha: softmax (alpha -> 1) to sparsemax (alpha = 2), as sparse as it pays.

    .. math:: y_i = \max((\alpha - 1) x_i - \tau, 0)^{1 / (\alpha - 1)}, \qquad \sum_i y_i = 1

    tau solves the second equation (Newton, monotone); its derivatives in x and alpha come from the implicit function
    theorem, exactly and to every order. alpha = 1.01 + 0.99 sigmoid(raw) lies in (1.01, 2).

    Why it exists: torch has softmax only. The published implementations have a first derivative in reverse mode; here
    alpha is learned as well, and every mode and order is right, at a cost that does not depend on the iterations.

    Args:
        alpha: Initial alpha, in (1.01, 2).
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same, >= 0, sums 1 along `dim`. Entries of -inf (masks) become 0, as
        long as one is finite. A row with a NaN or inf becomes NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; alpha outside (1.01, 2).
        DualShapeError: no such dimension.
        ConvergenceError: tau not found in 100 steps (not met in practice).

    Reference:
        Peters, Niculae, Martins, "Sparse sequence-to-sequence models", 2019, arXiv 1905.05702. Correia, Niculae,
        Martins, "Adaptively sparse transformers", 2019, arXiv 1909.00015.

    Example:
        >>> y = Entmax()(torch.tensor([1.0, 0.5, -2.0]))
        >>> y.detach(), bool(abs(y.sum() - 1) < 1e-6)
        (tensor([0.6740, 0.3260, 0.0000]), True)
    """

    def __init__(self, alpha: float = 1.5, dim: int = -1) -> None:
        """Start at an alpha."""
        super().__init__(dim)
        if not LOW < alpha < HIGH:
            raise DualInputError(f"entmax: alpha must lie in ({LOW}, {HIGH}), got {alpha}")
        share = (alpha - LOW) / (HIGH - LOW)
        self.raw = nn.Parameter(torch.tensor([math.log(share) - math.log1p(-share)]))

    def natural(self) -> tuple[Tensor]:
        """The current alpha, of shape (1,)."""
        return (LOW + (HIGH - LOW) * torch.sigmoid(self.raw),)

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Entmax."""
        return entmax(x, *parameters)

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, 0.0, 1.0, 2.5), (0.0, 0.1, 0.2, -0.1))
        return [RowSample({}, points, _reference), RowSample({"alpha": 1.2}, points, _reference)]
