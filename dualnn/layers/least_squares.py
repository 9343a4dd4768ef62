"""`LeastSquares`: a layer whose output fits a module's residuals."""

from __future__ import annotations

from torch import nn

from dualnn.layers.argmin import ArgMin
from dualnn.solvers.minimize import LEAST_SQUARES
from dualnn.solvers.stats import OnFailure


class LeastSquares(ArgMin):
    r"""Output what fits best, sample by sample: :math:`z^* = \arg\min_z \tfrac12 \lVert r_w(z, x) \rVert^2`.

    Curve fits, calibration, bundle adjustment as layers; a residual that is affine in z is linear least squares, solved
    in one Gauss-Newton step. The derivative is that of the minimum, with the exact Hessian
    :math:`J^T J + \sum_i r_i \nabla^2 r_i`, also where the fit is poor.

    Args:
        module: Called as ``module(z, x)``; returns the residuals of every sample.
        method: ``"levenberg_marquardt"``, damped, for poor starts; ``"gauss_newton"``.
        tol: Largest entry of the gradient :math:`J^T r`; None: as exactly as the dtype gives.
        max_steps: Steps at most.
        on_failure: For samples without an isolated minimum: ``"raise"``, ``"nan"`` or ``"last"``.

    Shape:
        ``x: (B, …)``; ``z0: (B, …)``, and so the output, is like x by default. Residuals ``(B, …)`` of any number.

    Raises:
        ConvergenceError: Samples that were not solved, those whose input is nan among them; fewer independent residuals
            than unknowns.
        StructureError: The module mixes samples, or returns no residuals a sample.
        DualInputError: Inputs that are not floating point tensors.
        DualShapeError: z without a batch axis or without unknowns.
        UnknownNameError: A method or a choice that does not exist.

    Reference:
        Pineda et al., "Theseus: a library for differentiable nonlinear optimization", 2022, arXiv 2207.09442.

    Example:
        >>> import torch
        >>> class Decay(torch.nn.Module):  # x: samples of z0 exp(-z1 t)
        ...     def forward(self, z, x):
        ...         t = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        ...         return z[:, :1] * torch.exp(-z[:, 1:] * t) - x
        >>> x = 2 * torch.exp(-3 * torch.linspace(0, 1, 8, dtype=torch.float64))[None]
        >>> [round(v, 6) for v in LeastSquares(Decay())(x, torch.ones(1, 2, dtype=torch.float64))[0].tolist()]
        [2.0, 3.0]
    """

    def __init__(
        self,
        module: nn.Module,
        method: str = "levenberg_marquardt",
        tol: float | None = None,
        max_steps: int = 500,
        *,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(module, method, tol, max_steps, on_failure=on_failure)

    @classmethod
    def choices(cls) -> tuple[str, ...]:
        """The methods."""
        return LEAST_SQUARES
