"""`ArgMin`: a layer whose output minimises a module's energy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualnn.engine.errors import StructureError, unknown_name
from dualnn.layers.solving import Equations, empty
from dualnn.solvers import minimize
from dualnn.solvers.minimize import LEAST_SQUARES
from dualnn.solvers.root import Differentiate
from dualnn.solvers.stats import OnFailure, check_on_failure

METHODS = ("newton", "bfgs", "lbfgs")


class ArgMin(nn.Module):
    r"""Output the minimum of a module's energy, sample by sample: :math:`z^* = \arg\min_z E_w(z, x)`.

    An inner optimisation as a layer: energy-based prediction, hyperparameters and meta-learning (bilevel problems),
    optimisation layers without constraints. The derivative is that of the minimum,
    :math:`dz = -E_{zz}^{-1} (E_{zx}\,dx + E_{zw}\,dw)`, with the exact Hessian: the search is not differentiated.

    Args:
        module: Called as ``module(z, x)``; returns one number a sample, ``(B,)``, twice differentiable in z.
        method: ``"newton"`` (some hundreds of unknowns), ``"bfgs"``, ``"lbfgs"`` (many unknowns, no matrix is formed).
        tol: Largest entry of the gradient; None: as exactly as the dtype gives.
        max_steps: Steps at most.
        differentiate: ``"implicit"``, or ``"one_step"`` with the Hessian of Newton's last step (first derivatives).
        on_failure: For samples without a minimum (a saddle, a flat direction, an unbounded energy): ``"raise"``,
            ``"nan"`` or ``"last"``.

    Shape:
        ``x: (B, …)``; ``z0``, and so the output, is like x by default. An empty batch gives an empty output.

    Raises:
        ConvergenceError: Samples that were not solved, those whose input is nan among them.
        StructureError: The module mixes samples, or does not return one number a sample.
        DualInputError: Inputs that are not floating point tensors.
        DualShapeError: z without a batch axis or without unknowns.
        UnknownNameError: A method or a choice that does not exist.

    Reference:
        Gould et al., "On differentiating parameterized argmin and argmax problems with application to bi-level
        optimization", 2016, arXiv 1607.05447. Amos, Kolter, "OptNet", 2017, arXiv 1703.00443.

    Example:
        >>> class Energy(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stiffness = torch.nn.Parameter(torch.tensor(1.0))
        ...     def forward(self, z, x):
        ...         return ((z - x) ** 2 + self.stiffness * z**2).sum(-1)
        >>> layer = ArgMin(Energy())
        >>> z = layer(torch.tensor([[2.0, 4.0]]))  # x / (1 + stiffness)
        >>> z.sum().backward()
        >>> z.tolist(), round(float(layer.module.stiffness.grad), 4)
        ([[1.0, 2.0]], -1.5)
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(
        self,
        module: nn.Module,
        method: str = "newton",
        tol: float | None = None,
        max_steps: int = 500,
        *,
        differentiate: Differentiate = "implicit",
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if method not in self.choices():
            raise unknown_name("method", method, self.choices())
        check_on_failure(on_failure)
        self.module = module
        self.method, self.tol, self.max_steps = method, tol, max_steps
        self.differentiate, self.on_failure = differentiate, on_failure

    @classmethod
    def choices(cls) -> tuple[str, ...]:
        """The methods."""
        return METHODS

    def extra_repr(self) -> str:
        """The solver's settings."""
        first = f"method={self.method!r}, tol={self.tol}, max_steps={self.max_steps}"
        return f"{first}, differentiate={self.differentiate!r}, on_failure={self.on_failure!r}"

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Minimise from ``z0`` (zeros by default)."""
        name = type(self).__name__
        start = torch.zeros_like(x) if z0 is None and isinstance(x, Tensor) else z0
        equations = Equations(name, self.module, start, (x,))
        if (nothing := empty(start, self.module, (x,))) is not None:  # type: ignore[arg-type]
            return nothing
        vectors = self.method in LEAST_SQUARES

        def flat(y: Tensor, z: Tensor) -> Tensor:
            if not isinstance(y, Tensor) or y.shape[:1] != z.shape[:1] or (y.dim() != 1 and not vectors):
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                wanted = "residuals (B, …)" if vectors else "one number a sample, (B,)"
                raise StructureError(f"{name}: the module must return {wanted}, with B = {len(z)}, got {got}")
            return y.flatten(1) if vectors and y.dim() > 1 else y.unsqueeze(-1) if vectors else y

        found = minimize(
            equations.function(flat),
            equations.start,
            equations.args,
            method=self.method,
            tol=self.tol,
            max_steps=self.max_steps,
            differentiate=self.differentiate,
            on_failure=self.on_failure,
        )
        return found.reshape(equations.shape)
