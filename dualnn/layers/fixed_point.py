"""`FixedPoint`: a layer whose output solves an equation (a deep equilibrium model)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.parameters import Places
from dualnn.solvers import fixed_point
from dualnn.solvers.root import Differentiate
from dualnn.solvers.stats import OnFailure


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
        jacobian: How the derivative's system is solved: ``"dense"``, ``"krylov"``; by default the first up to 2,048
            unknowns a sample, the second above.
        differentiate: ``"implicit"``, or ``"one_step"``: without solving a system, with a relative error of about the
            contraction factor.
        on_failure: For samples that do not converge: ``"raise"``, ``"nan"`` or ``"last"``.

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

    def __init__(
        self,
        module: nn.Module,
        tol: float | None = None,
        max_steps: int = 200,
        memory: int = 5,
        *,
        jacobian: str | None = None,
        differentiate: Differentiate = "implicit",
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        self.module = module
        self.tol, self.max_steps, self.memory = tol, max_steps, memory
        self.jacobian, self.differentiate, self.on_failure = jacobian, differentiate, on_failure

    def extra_repr(self) -> str:
        """The solver's settings."""
        first = f"tol={self.tol}, max_steps={self.max_steps}, memory={self.memory}"
        return f"{first}, jacobian={self.jacobian}, differentiate={self.differentiate}, on_failure={self.on_failure}"

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Solve from ``z0`` (zeros by default)."""
        places = Places(self.module)

        def run(z: Tensor, x: Tensor, *weights: Tensor) -> Any:
            with places.swapped(weights):
                return self.module(z, x)

        start = torch.zeros_like(x) if z0 is None else z0
        return fixed_point(
            run,
            start,
            (x, *places.parameters),
            tol=self.tol,
            max_steps=self.max_steps,
            memory=self.memory,
            jacobian=self.jacobian,
            differentiate=self.differentiate,
            on_failure=self.on_failure,
        )
