r"""Error norms, the first step, and the step-size controller.

Reference:
    Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section II.4; Söderlind, "Digital
    filters in adaptive time-stepping", 2003.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("rms", "max")


class Tolerance(NamedTuple):
    r"""The size of an error, sample by sample: :math:`\lVert e_i / (\text{atol}_i + \text{rtol}_i |y_i|) \rVert`.

    Attributes:
        rtol: Relative, 0-dim or one for each component.
        atol: Absolute, likewise.
        norm: Root mean square or maximum over the components.
    """

    rtol: Tensor
    atol: Tensor
    norm: str = "rms"

    def scale(self, *y: Tensor) -> Tensor:
        """What counts as 1 for values like these."""
        size = y[0].abs()
        for other in y[1:]:
            size = torch.maximum(size, other.abs())
        return self.atol + self.rtol * size

    def measure(self, error: Tensor, scale: Tensor) -> Tensor:
        """``(*batch, n) -> batch``: at most 1 where the error is small enough.

        Two estimates ``(*batch, 2, n)``, of orders 5 and 3, count together as in `dop853`.
        """
        if error.dim() > scale.dim():
            fifth, third = (self.measure(e, scale) for e in error.unbind(-2))
            both = torch.sqrt(fifth**2 + 0.01 * third**2)
            return torch.where(both > 0, fifth**2 / torch.where(both > 0, both, 1.0), both)
        relative = error / scale
        if self.norm == "max":
            return relative.abs().amax(-1)
        return torch.linalg.vector_norm(relative, dim=-1) / relative.shape[-1] ** 0.5

    def of_directions(self, sizes: Tensor, old: Tensor, new: Tensor, error: Tensor) -> Tensor:
        """The largest of K directions' errors, ``(K, *batch, n) -> batch``; ``sizes: (K,)`` as in `follow.Forward`."""
        scaled = self.for_directions(sizes, old.dim() - 1)
        return scaled.measure(error, scaled.scale(old, new)).amax(0)

    def for_directions(self, sizes: Tensor, dim: int) -> Tolerance:
        """For tangents of a value with ``dim`` axes."""
        return self._replace(atol=self.atol * sizes.reshape(-1, *(1,) * dim))


def first_step(
    rhs: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, f: Tensor, span: Tensor, order: int, tol: Tolerance
) -> Tensor:
    """A signed first step for each sample: a small Euler step tells the size of the second derivative.

    Shape:
        ``t: batch, y, f: (*batch, n), span: batch -> batch``.
    """
    scale = tol.scale(y)
    size, slope = tol.measure(y, scale), tol.measure(f, scale)
    tiny = (size < 1e-5) | (slope < 1e-5)
    h0 = torch.minimum(torch.where(tiny, 1e-6, 0.01 * size / torch.where(tiny, 1.0, slope)), span.abs())
    sign = torch.sign(span)
    g = rhs(t + sign * h0, y + (sign * h0).unsqueeze(-1) * f)
    curve = tol.measure(g - f, scale) / h0
    curve = torch.where(torch.isfinite(curve), curve, torch.inf)
    steep = torch.maximum(slope, curve)
    flat = steep <= 1e-15
    h1 = torch.where(
        flat, torch.clamp_min(h0 * 1e-3, 1e-6), (0.01 / torch.where(flat, 1.0, steep)) ** (1 / (order + 1))
    )
    # An infinite curvature leaves the Euler step, much shortened; the error test does the rest.
    return sign * torch.minimum(
        torch.minimum(torch.where(h1 > 0, torch.minimum(100 * h0, h1), 1e-3 * h0), h0 * 100), span.abs()
    )


class Controller(NamedTuple):
    r"""Step sizes from error norms: :math:`h \leftarrow h\, s\, e_n^{-a}\, e_{n-1}^{b}` within limits.

    Attributes:
        a: Exponent of this step's error.
        b: Exponent of the last accepted step's error.
        safety: s.
        least: Smallest factor.
        most: Largest factor.
    """

    a: float
    b: float = 0.0
    safety: float = 0.9
    least: float = 0.2
    most: float = 10.0

    def factor(self, error: Tensor, last: Tensor, accepted: Tensor) -> Tensor:
        """By how much to change each step; after a rejection the past does not count and nothing grows."""
        e = torch.clamp_min(error, 1e-10)
        grown = self.safety * e**-self.a * torch.clamp_min(last, 1e-4) ** self.b if self.b else self.safety * e**-self.a
        after = torch.where(accepted, grown, torch.clamp_max(self.safety * e**-self.a, 0.9))
        after = torch.nan_to_num(after, nan=self.least, posinf=self.most, neginf=self.least)
        return torch.clamp(after, self.least, self.most)
