"""Soft top-k: a row of weights in (0, 1) that sum to k."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.activations.monotone import increasing_root
from dualnn.activations.registry import register
from dualnn.activations.rows import Rows, RowSample
from dualnn.activations.threshold import Threshold
from dualnn.engine.errors import DualInputError, DualShapeError


def _solve(k: int, x: Tensor) -> Tensor:
    """The tau with sum_i sigmoid(x_i - tau) = k."""
    n = x.shape[-1]
    shift = math.log(n - k) - math.log(k)  # where tau stands if all entries are equal
    # A row of one value has a bracket of no width: a few roundings more.
    slack = 16 * torch.finfo(x.dtype).eps * (1 + x.abs().amax(-1, keepdim=True))
    lower, upper = x.amin(-1, keepdim=True) + shift - slack, x.amax(-1, keepdim=True) + shift + slack
    lower, upper = (torch.where(torch.isfinite(x).all(-1, keepdim=True), t, torch.nan) for t in (lower, upper))

    def evaluate(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        soft = torch.sigmoid(x - tau)
        # The rounding of x - tau moves the sum by slope * eps * size of its terms.
        slope = (soft * (1 - soft)).sum(-1, keepdim=True)
        size = k + soft.sum(-1, keepdim=True) + (soft * (1 - soft) * (x.abs() + tau.abs())).sum(-1, keepdim=True)
        return k - soft.sum(-1, keepdim=True), slope, size

    return increasing_root(evaluate, lower, upper, (lower + upper) / 2, name="soft_topk", max_steps=200)


def weights(tau: Tensor, x: Tensor) -> tuple[Tensor]:
    """d tau / dx_i = d_i / sum d, d = sigmoid'(x - tau); by its logarithm, since all d may underflow."""
    u = x - tau
    return (torch.softmax(F.logsigmoid(u) + F.logsigmoid(-u), -1),)


def centred(x: Tensor, k: int, temperature: float) -> Tensor:
    """u = x / temperature - tau, whose sigmoids sum to k, differentiably.

    Raises:
        DualShapeError: not 0 < k < the row's length.
    """
    if not 0 < k < x.shape[-1]:
        raise DualShapeError(f"top-k needs 0 < k < length of a row, got k={k} and {x.shape[-1]} entries")
    u = x / temperature
    return u - Threshold("soft_topk", partial(_solve, k), weights)(u)


def soft_topk(x: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Differentiable soft top-k weights along the last dimension (see `centred`).

    Example:
        >>> soft_topk(torch.tensor([2.0, 1.0, -3.0]), 1, temperature=0.2).round(decimals=4)
        tensor([0.9241, 0.0759, 0.0000])
    """
    return torch.sigmoid(centred(x, k, temperature))


def check_k(name: str, k: int, temperature: float) -> None:
    """Raise DualInputError for a k or temperature that makes no sense."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise DualInputError(f"{name}: k must be an integer >= 1, got {k!r}")
    if not 0 < temperature < math.inf:
        raise DualInputError(f"{name}: temperature must be positive, got {temperature}")


def soft_topk_reference(k: int, temperature: float, row: list) -> list:
    """The same on mpmath numbers, by the Anderson-Bjorck method."""
    import mpmath as mp

    u = [v / mp.mpf(temperature) for v in row]

    def excess(tau: Any) -> Any:
        return mp.fsum(1 / (1 + mp.exp(tau - v)) for v in u) - k

    tau = mp.findroot(excess, (min(u) - 10, max(u) + 10), solver="anderson", verify=False)
    return [1 / (1 + mp.exp(tau - v)) for v in u]


@register("soft_topk")
class SoftTopK(Rows):
    r"""Weights in (0, 1) that sum to exactly k: the smooth choice of the k largest entries.

    .. math:: y_i = \sigma\left(\frac{x_i - \tau}{T}\right), \qquad \sum_i y_i = k

    It is the choice of k entries with the most entropy: T -> 0 tends to the indicator of the k largest, T -> inf to k /
    n for all. tau is found by a bracketed Newton method; dy = d (dx - <w, dx>) / T with d = y (1 - y), w = d / sum d,
    without a division by zero when all d underflow.

    Why it exists: routing, pruning and retrieval choose k of n; `torch.topk` has no derivative in *which* are chosen.

    Args:
        k: 0 < k < length of a row.
        temperature: T > 0.
        dim: The dimension along which a row lies.

    Shape:
        x: (*), at least one-dimensional -> y: the same, in [0, 1], sums k along `dim`. A row with an entry that is not
        finite becomes NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; k or temperature out of range.
        DualShapeError: no such dimension; k not below the row's length.

    Reference:
        Sander, Puigcerver, Djolonga, Peyré, Blondel, "Fast, differentiable and sparse top-k: a convex analysis
        perspective", 2023, arXiv 2302.01425.

    Example:
        >>> y = SoftTopK(k=2)(torch.tensor([3.0, 1.0, 0.0, -5.0]))
        >>> bool(abs(y.sum() - 2) < 1e-5)
        True
    """

    def __init__(self, k: int = 1, temperature: float = 1.0, dim: int = -1) -> None:
        """Fix k and the temperature."""
        super().__init__(dim)
        check_k("soft_topk", k, temperature)
        self.k, self.temperature = k, temperature

    def rows(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """The weights."""
        return soft_topk(x, self.k, self.temperature)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"k={self.k}, temperature={self.temperature}"

    @classmethod
    def row_samples(cls) -> list[RowSample]:
        """Inputs and oracles for the standard tests."""
        points = ((0.5, 0.1, -2.0, 0.3), (3.0, -0.2, 1.0, -2.5))
        return [
            RowSample({}, points, partial(soft_topk_reference, 1, 1.0)),
            RowSample({"k": 3, "temperature": 0.5}, points, partial(soft_topk_reference, 3, 0.5)),
        ]
