"""`Root`: a layer whose output solves a module's equations."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dualnn.engine.errors import StructureError, unknown_name
from dualnn.layers.solving import Equations, empty
from dualnn.solvers import root
from dualnn.solvers.root import METHODS, Differentiate
from dualnn.solvers.stats import OnFailure, check_on_failure


class Root(nn.Module):
    r"""Output the root of a module: :math:`f_w(z, x) = 0`.

    The derivative is that of the solution, :math:`dz = -f_z^{-1} (f_x\,dx + f_w\,dw)`: exact to every order, whatever
    the solver did, in the memory of one evaluation of f.

    Args:
        module: Called as ``module(z, x)``; returns a residual of z's shape, sample by sample.
        method: ``"newton"`` with a line search, or ``"broyden"``.
        tol: Largest entry of the residual; None: as exactly as the dtype gives.
        max_steps: Steps at most.
        jacobian: ``"dense"``, or ``"krylov"``, which never forms it.
        differentiate: ``"implicit"``, or ``"one_step"`` with the factors of Newton's last step (first derivatives).
        on_failure: For samples without a solution: ``"raise"``, ``"nan"`` or ``"last"`` (the last iterate).

    Shape:
        ``x: (B, …)``; ``z0``, and so the output, is like x by default. An empty batch gives an empty output.

    Raises:
        ConvergenceError: Samples that were not solved, those whose input is nan among them.
        StructureError: The module mixes samples, or returns another shape than z's.
        DualInputError: Inputs that are not floating point tensors.
        DualShapeError: z without a batch axis or without unknowns.
        UnknownNameError: A method or a choice that does not exist.

    Reference:
        Blondel et al., "Efficient and modular implicit differentiation", 2022, arXiv 2105.15183.

    Example:
        >>> class Cubic(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a = torch.nn.Parameter(torch.tensor(1.0))
        ...     def forward(self, z, x):
        ...         return z**3 + self.a * z - x
        >>> layer = Root(Cubic())
        >>> z = layer(torch.tensor([[2.0], [10.0]]))
        >>> [round(v, 4) for v in z.flatten().tolist()]
        [1.0, 2.0]
        >>> z.sum().backward()
        >>> round(float(layer.module.a.grad), 4)  # -z / (3 z^2 + a)
        -0.4038
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(
        self,
        module: nn.Module,
        method: str = "newton",
        tol: float | None = None,
        max_steps: int = 100,
        *,
        jacobian: Literal["dense", "krylov"] = "dense",
        differentiate: Differentiate = "implicit",
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        if jacobian not in ("dense", "krylov"):
            raise unknown_name("jacobian", jacobian, ("dense", "krylov"))
        check_on_failure(on_failure)
        self.module = module
        self.method, self.tol, self.max_steps = method, tol, max_steps
        self.jacobian, self.differentiate, self.on_failure = jacobian, differentiate, on_failure

    def extra_repr(self) -> str:
        """The solver's settings."""
        first = f"method={self.method!r}, tol={self.tol}, max_steps={self.max_steps}, jacobian={self.jacobian!r}"
        return f"{first}, differentiate={self.differentiate!r}, on_failure={self.on_failure!r}"

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Solve from ``z0`` (zeros by default)."""
        start = torch.zeros_like(x) if z0 is None and isinstance(x, Tensor) else z0
        equations = Equations("Root", self.module, start, (x,))
        if (nothing := empty(start, self.module, (x,))) is not None:  # type: ignore[arg-type]
            return nothing

        def flat(y: Tensor, z: Tensor) -> Tensor:
            if not isinstance(y, Tensor) or y.shape[1:] != equations.shape[1:] or len(y) != len(z):
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise StructureError(f"Root: the residual must have z's shape {tuple(equations.shape)}, got {got}")
            return y.reshape(z.shape)

        found = root(
            equations.function(flat),
            equations.start,
            equations.args,
            method=self.method,
            tol=self.tol,
            max_steps=self.max_steps,
            jacobian=self.jacobian,
            differentiate=self.differentiate,
            on_failure=self.on_failure,
        )
        return found.reshape(equations.shape)
