"""`DiagonalLinear` and `LRU`: linear recurrences with a complex diagonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dualnn.engine.errors import DualInputError
from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.node import Rows
from dualnn.layers.online.scan import running, steady, summed
from dualnn.layers.online.state import OnlineState


class DiagonalLinear(OnlineCell):
    r"""The linear recurrent unit's recurrence, with exact online gradients.

    .. math:: h_t = \lambda \odot h_{t-1} + e^{\gamma} \odot (B x_t + b), \qquad
        \lambda = \exp(-e^{\nu} + i\, e^{\theta}), \qquad y_t = (\mathrm{Re}\,h_t, \mathrm{Im}\,h_t)

    with a complex B and b. The recurrence is stable whatever the parameters (:math:`|\lambda| < 1`), and linear:
    windows run as a scan. Derivatives are closed forms, one complex number of trace for each complex weight.

    See `OnlineCell` for its two modes and for what is exact.

    Args:
        input_size: I.
        hidden_size: N, complex units.
        r_min: Least :math:`|\lambda|` at the start.
        r_max: Largest; near 1 remembers long.
        max_phase: Largest phase at the start.

    Shape:
        x: (T, B, I) -> y: (T, B, 2 N), real and imaginary part of unit 0, of unit 1, …; ``step``: (B, I) -> (B, 2 N).
        ``weight: (2 N, I)`` in the same order, ``nu, theta, gamma: (N,)``.

    Raises:
        DualInputError: Not 0 <= r_min < r_max < 1; integer inputs, an empty window.
        DualShapeError: Inputs or a state of another shape or dtype.

    Reference:
        Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023, arXiv 2303.06349. Online:
        Zucchet et al., 2023, arXiv 2305.15947.

    Example:
        >>> cell = DiagonalLinear(3, 4)
        >>> y, state = cell.window(torch.randn(64, 2, 3))
        >>> tuple(y.shape), state.values[0].dtype
        ((64, 2, 8), torch.complex64)
    """

    rows: ClassVar[int] = 2
    own_names: ClassVar[tuple[str, ...]] = ("nu", "theta", "gamma")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__(input_size, hidden_size)
        if not 0 <= r_min < r_max < 1:
            raise DualInputError(f"DiagonalLinear: 0 <= r_min < r_max < 1 is needed, got {r_min} and {r_max}")
        if not max_phase > 0:
            raise DualInputError(f"DiagonalLinear: max_phase must be positive, got {max_phase}")
        # Uniform on the ring, as in the paper's appendix; an open interval, so that no logarithm is infinite.
        u, phase = (torch.rand(hidden_size).clamp(1e-4, 1 - 1e-4) for _ in range(2))
        squared = u * (r_max**2 - r_min**2) + r_min**2
        self.nu = nn.Parameter(torch.log(-0.5 * torch.log(squared)))
        self.theta = nn.Parameter(torch.log(max_phase * phase))
        self.gamma = nn.Parameter(torch.log(1 - squared) / 2)
        with torch.no_grad():
            self.weight.mul_(math.sqrt(0.5))

    @property
    def state_dtype(self) -> torch.dtype:
        """The complex one of the weights' precision."""
        return torch.complex128 if self.weight.dtype == torch.float64 else torch.complex64

    def drives(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Pairs of rows, as they lie: no copy."""
        return (_paired(projected),)

    def advance(self, state: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """One step."""
        rate, scale = self._rate(own)
        return (rate * state[0] + scale * drives[0],)

    def recorded(self, values: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """One product and one sum a step."""
        rate, scale = self._rate(own)
        h, seen = values[0], []
        for u in (scale * self.drives(projected)[0]).unbind(0):
            h = rate * h + u
            seen.append(h)
        return [torch.stack(seen)]

    def coefficients(self, drives: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Rows, Sequence[Tensor]]:
        """The same rate in every step."""
        rate, scale = self._rate(own)
        return [[rate.expand(drives[0].shape[0], 1, -1)]], [scale * drives[0]]

    def ahead(
        self, state: OnlineState, x: Tensor, weight: Tensor, bias: Tensor, *own: Tensor
    ) -> tuple[Sequence[Tensor], list[Tensor | None], Tensor, Tensor]:
        """In closed form: the products of later steps are powers of the rate, whatever the inputs were."""
        (start,), (steps, batch, _), (nu, theta, _) = state.values, x.shape, own
        rate, scale = self._rate(own)
        twice = scale.repeat_interleave(2)
        drives = nn.functional.linear(x, weight * twice.unsqueeze(1), bias * twice)
        (h,) = self.drives(drives)
        steady(rate, h, start)
        powers = running(rate, steps)
        whole, later = powers[-1], torch.cat([powers[:-1].flip(0), torch.ones_like(powers[:1])])
        inputs = torch.cat([x, x.new_ones(steps, batch, 1)], -1).flatten(1)
        added = inputs.T @ torch.view_as_real(later * scale).flatten(1)
        by_weight = whole * state.weight + _paired(added).reshape(state.weight.shape)  # type: ignore[operator, union-attr]
        moved = later[0] * start + (summed(later[1:].unsqueeze(1), h[:-1]) if steps > 1 else 0)
        moved = moved * rate
        # scale multiplies all that was added to the state since.
        mine = [moved * -torch.exp(nu), moved * (1j * torch.exp(theta)), h[-1] - whole * start]
        return [h], [start], by_weight, whole * state.own + torch.stack(mine, 1).unsqueeze(1)  # type: ignore[operator]

    def back(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
        traces: Sequence[Tensor],
        after: Sequence[Tensor],
        kept: list[Tensor | None],
        wants_x: bool,
    ) -> list[Tensor | None]:
        """In closed form, on conjugate cotangents: no conjugate of a window is ever written down."""
        weight, bias, *own = parameters
        (h,), (start,), (nu, theta, _) = after, kept, own
        rate, scale = self._rate(own)
        delta = steady(rate, torch.conj_physical(_paired(grad.contiguous())), reverse=True)
        first = rate * delta[0]
        pairs = torch.view_as_real(delta).flatten(-2).flatten(0, 1)  # (T B, 2 N)
        found = torch.cat([x.flatten(0, 1).T @ pairs, pairs.sum(0, keepdim=True)])  # (I + 1, 2 N)
        by_drive = _paired(found) * scale
        by_weight = by_drive + (traces[0][:, :, 0, 0] * first.unsqueeze(1)).sum(0)
        both = torch.view_as_real(by_weight.conj().resolve_conj()).flatten(-2)
        moved = (start * delta[0] + (summed(h[:-1], delta[1:]) if len(h) > 1 else 0)).sum(0) * rate  # type: ignore[operator]
        weights = _paired(torch.cat([weight, bias.unsqueeze(1)], 1).T.contiguous())
        mine = [moved * -torch.exp(nu), moved * (1j * torch.exp(theta)), (by_drive * weights).sum(0)]
        past = (traces[1][:, 0] * first.unsqueeze(1)).sum(0)
        signs = torch.stack([scale, -scale], 1).flatten()
        by_x = (pairs @ (weight * signs.unsqueeze(1))).reshape(x.shape) if wants_x else None
        return [by_x, both[:-1].T, both[-1], *((a + b).real for a, b in zip(mine, past, strict=True))]

    def output(self, state: Sequence[Tensor]) -> Tensor:
        """Pairs of real and imaginary part."""
        return torch.view_as_real(state[0]).flatten(-2)

    @staticmethod
    def _rate(own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        nu, theta, gamma = own
        return torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta))), torch.exp(gamma)


def _paired(x: Tensor) -> Tensor:
    """Pairs of real numbers ``(…, 2 N)`` as complex ones ``(…, N)``: no copy."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class LRU(nn.Module):
    r"""The linear recurrent unit: `DiagonalLinear` and a readout.

    .. math:: y_t = \mathrm{Re}(C h_t) + D x_t + c

    The readout has no memory, so all of it is exact online. ``step``, ``window``, ``start`` and ``forward`` are those
    of `OnlineCell`.

    Args:
        input_size: I.
        hidden_size: N, complex units.
        output_size: O; the input's by default.
        r_min: Of the cell.
        r_max: Of the cell.
        max_phase: Of the cell.

    Shape:
        x: (T, B, I) -> y: (T, B, O); ``step``: (B, I) -> (B, O).

    Raises:
        DualInputError: As `DiagonalLinear`.
        DualShapeError: As `DiagonalLinear`.

    Reference:
        Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023, arXiv 2303.06349.

    Example:
        >>> model = LRU(3, 8, 2)
        >>> y, state = model.step(torch.randn(5, 3))
        >>> y.sum().backward()
        >>> model.cell.nu.grad.shape
        torch.Size([8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.cell = DiagonalLinear(input_size, hidden_size, r_min, r_max, max_phase)
        self.readout = nn.Linear(2 * hidden_size, output_size or input_size)
        self.skip = nn.Linear(input_size, output_size or input_size, bias=False)

    def start(self, batch_size: int, traces: bool = True) -> OnlineState:
        """The state before the first step."""
        return self.cell.start(batch_size, traces)

    def step(self, x: Tensor, state: OnlineState | None = None) -> tuple[Tensor, OnlineState]:
        """One step online."""
        h, state = self.cell.step(x, state)
        return self._read(h, x), state

    def window(self, x: Tensor, state: OnlineState | None = None) -> tuple[Tensor, OnlineState]:
        """Several steps online."""
        h, state = self.cell.window(x, state)
        return self._read(h, x), state

    def forward(self, x: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A whole sequence, as autograd records it."""
        h, now = self.cell(x, state)
        return self._read(h, x), now

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        return self.readout(h) + self.skip(x)
