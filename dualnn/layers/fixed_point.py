"""`FixedPoint`: a layer whose output solves an equation (a deep equilibrium model)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.parameters import swapped
from dualnn.solvers import fixed_point


class FixedPoint(nn.Module):
    r"""Output the fixed point of a module: :math:`z^* = f_w(z^*, x)`.

    A network of infinite depth with one layer's weights. The derivative is the implicit one at the solution,
    :math:`dz = (I - \partial f/\partial z)^{-1} (f_x\,dx + f_w\,dw)`: exact, and its memory does not depend on how many
    iterations the solver took.

    Args:
        module: Called as ``module(z, x)``; ``(B, …) -> (B, …)`` of z's shape, sample by sample, contracting in z.
        tol: Largest entry of the residual (see `dualnn.solvers.fixed_point`).
        max_steps: Evaluations at most.
        memory: Iterates that Anderson acceleration combines.

    Shape:
        ``x: (B, …)``; ``z0``, and so the output, is like x by default.

    Raises:
        ConvergenceError: Samples that did not converge.
        StructureError: The module mixes samples, or changes z's shape.

    Reference:
        Bai, Kolter, Koltun, "Deep equilibrium models", 2019, arXiv 1909.01377.

    Example:
        >>> import torch
        >>> from dualnn.layers import FixedPoint
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = torch.nn.Linear(3, 3)
        ...     def forward(self, z, x):
        ...         return 0.5 * torch.tanh(self.inner(z) + x)
        >>> layer = FixedPoint(Cell())
        >>> layer(torch.randn(4, 3)).sum().backward()
        >>> layer.module.inner.weight.grad.shape
        torch.Size([3, 3])
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(self, module: nn.Module, tol: float | None = None, max_steps: int = 200, memory: int = 5) -> None:
        super().__init__()
        self.module = module
        self.tol, self.max_steps, self.memory = tol, max_steps, memory

    def extra_repr(self) -> str:
        """The solver's settings."""
        return f"tol={self.tol}, max_steps={self.max_steps}, memory={self.memory}"

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Solve from ``z0`` (zeros by default)."""
        parameters = list(self.module.parameters())

        def run(z: Tensor, x: Tensor, *weights: Tensor) -> Any:
            with swapped(self.module, dict(zip(parameters, weights, strict=True))):
                return self.module(z, x)

        start = torch.zeros_like(x) if z0 is None else z0
        return fixed_point(run, start, (x, *parameters), tol=self.tol, max_steps=self.max_steps, memory=self.memory)
