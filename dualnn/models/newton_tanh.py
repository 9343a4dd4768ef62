"""The implicit activation as someone would write it by hand: the controls of the exact one."""

from typing import Literal

import torch
from torch import Tensor, nn

from dualnn.activations.implicit_tanh import ImplicitTanh, parametrise, residual
from dualnn.engine.errors import ConvergenceError, unknown_name


class NewtonTanh(nn.Module):
    r"""The y with y + a tanh(b y) = x by a plain Newton loop: no dual, no implicit function theorem.

    .. math:: y \leftarrow y - \lambda \frac{y + a \tanh(b y) - x}{1 + a b\,(1 - \tanh^2(b y))}

    with a and b learnable per channel, a b > -1, and lambda halved where a step would grow the residual.
    Equation, parameters and their names are `dualnn.activations.ImplicitTanh`'s: their state_dicts are exchangeable.

    The gradient is the point of it:

    - ``"no_grad"``: in place, under `no_grad`, as solvers are usually written. The value is right and no error is
      raised, but backprop ends here: a, b and every layer before get no gradient.
    - ``"unrolled"``: autograd records every iteration. The gradient is right, and memory grows with the iterations.

    Args:
        a: initial a.
        b: initial b, > 0.
        num_channels: 1, or the size of the input's dimension 1.
        margin: a b > -1 + margin is guaranteed.
        gradient: what backprop sees of the loop.
        tol: largest residual, relative to abs(x) + abs(a); None: 4 eps of the dtype. One more step follows, which
            makes the unrolled derivative as exact as the value.
        max_steps: number of Newton steps after which to give up.

    Shape:
        x: (N, num_channels, *) -> y: the same. A NaN entry gives NaN there and disturbs no other.

    Raises:
        DualInputError: b <= 0, a b <= -1 + margin, or margin outside (0, 1).
        UnknownNameError: `gradient` is neither of the two.
        ConvergenceError: not converged after `max_steps`.

    Example:
        >>> y = NewtonTanh(gradient="unrolled")(torch.tensor([[2.0]]))
        >>> (y + torch.tanh(y)).detach()
        tensor([[2.]])
    """

    def __init__(
        self,
        a: float = 1.0,
        b: float = 1.0,
        num_channels: int = 1,
        margin: float = 1e-3,
        gradient: Literal["no_grad", "unrolled"] = "no_grad",
        tol: float | None = None,
        max_steps: int = 100,
    ) -> None:
        super().__init__()
        if gradient not in ("no_grad", "unrolled"):
            raise unknown_name("gradient", gradient, ("no_grad", "unrolled"))
        exact = ImplicitTanh(a, b, num_channels, margin)  # its checks, its parameters
        self.raw_product, self.raw_slope = exact.raw_product, exact.raw_slope
        self.margin, self.gradient, self.tol, self.max_steps = margin, gradient, tol, max_steps

    def forward(self, x: Tensor) -> Tensor:
        """Solve the equation for every entry of x."""
        a, b = (
            parameter.view(-1, *(1,) * (x.ndim - 2))
            for parameter in parametrise(self.raw_product, self.raw_slope, self.margin)
        )
        wide = x.to(torch.promote_types(x.dtype, a.dtype))  # half precision would not converge
        with torch.set_grad_enabled(self.gradient == "unrolled" and torch.is_grad_enabled()):
            y = self._solve(wide, a, b)
        return y.to(x.dtype)

    def _solve(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        tol = 4 * torch.finfo(x.dtype).eps if self.tol is None else self.tol
        y = x / (1 + torch.relu(a * b))  # below the solution where a > 0: the climb from there is monotone
        for _ in range(self.max_steps):
            t = torch.tanh(b * y)
            f = y + a * t - x
            step = f / (1 + a * b * (1 - t) * (1 + t))
            open_ = f.detach().abs() > tol * (x.abs() + a.abs()).detach()
            converged = not bool(open_.any())
            if not converged:
                step = step * self._damping(x, a, b, y, f, step, open_)
            y = y - step if torch.is_grad_enabled() else y.sub_(step)
            if converged:
                return y
        raise ConvergenceError(
            f"NewtonTanh: {int(open_.sum())} of {open_.numel()} entries not converged after {self.max_steps} steps "
            f"(largest residual {f.abs().max().item():.3g})"
        )

    @staticmethod
    @torch.no_grad()
    def _damping(x: Tensor, a: Tensor, b: Tensor, y: Tensor, f: Tensor, step: Tensor, open_: Tensor) -> Tensor:
        """Fractions of the step, halved until no residual that is still too large grows."""
        fraction = torch.ones_like(y)
        for _ in range(40):
            grows = open_ & (residual(y - fraction * step, x, a, b).abs() > f.abs())
            if not grows.any():
                break
            fraction[grows] *= 0.5
        return fraction
