"""What a solver reports: `Stats`, and what happens to samples that it could not solve."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, unknown_name
from dualnn.solvers.line_search import over

OnFailure = Literal["raise", "nan", "last"]
ON_FAILURE = ("raise", "nan", "last")


class Status(enum.IntEnum):
    """How the search for one sample's solution stands, or ended."""

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    SINGULAR = 3
    STALLED = 4
    NONFINITE = 5
    NOT_MINIMUM = 6
    NO_BRACKET = 7
    JUMP = 8


REASONS = {
    Status.MAX_STEPS: ("did not converge in max_steps", "raise max_steps or tol, or start nearer"),
    Status.SINGULAR: (
        "met a singular Jacobian",
        "start elsewhere, or check that the equations determine every unknown (as many equations, none repeated; with "
        "jacobian='krylov' it may only be too ill-conditioned for GMRES: try 'dense' or 'banded')",
    ),
    Status.STALLED: (
        "stopped making progress",
        "the tolerance may be below what rounding in this dtype allows (raise tol, or use float64), or no solution may "
        "lie downhill (start elsewhere)",
    ),
    Status.NONFINITE: (
        "met a value of the function that is nan or infinite",
        "start inside its domain, and check the arguments",
    ),
    Status.NOT_MINIMUM: (
        "ended where the Hessian is not positive definite (a saddle point, or flat in some direction)",
        "start elsewhere, or add a regulariser that determines every unknown",
    ),
    Status.NO_BRACKET: (
        "found no change of sign between the ends of the bracket",
        "widen it, or look for several roots in it (an even number shows no change of sign)",
    ),
    Status.JUMP: (
        "found a change of sign by a jump or a pole, not through zero",
        "bracket a root, on one side of the jump",
    ),
}


class Stats(NamedTuple):
    """The course of one call, sample by sample.

    Attributes:
        iterations: Steps until the sample was done, ``batch``-shaped.
        residual: Largest entry of the sample's final residual (for a minimum: of the gradient).
        status: `Status` codes.
        evaluations: Evaluations of the function on the whole batch.
        jacobians: Jacobians formed and factorised, on the whole batch.
    """

    iterations: Tensor
    residual: Tensor
    status: Tensor
    evaluations: int
    jacobians: int

    @property
    def converged(self) -> Tensor:
        """Which samples are solved."""
        return self.status == Status.CONVERGED


def check_on_failure(on_failure: str) -> None:
    """Raise for a misspelt choice."""
    if on_failure not in ON_FAILURE:
        raise unknown_name("on_failure", on_failure, ON_FAILURE)


def settle(x: Tensor, stats: Stats, on_failure: OnFailure, what: str, tol: float, advice: str = "") -> Tensor:
    """Raise for unsolved samples, or mark them, or leave them, as the caller chose."""
    if bool(stats.converged.all()):
        return x
    if on_failure == "raise":
        raise ConvergenceError(failure(stats, what, tol, advice))
    if on_failure == "nan":
        return torch.where(over(stats.converged, x), x, torch.nan)
    return x


def failure(stats: Stats, what: str, tol: float, advice: str = "") -> str:
    """Which samples failed, why, with what residual, and what to do."""
    status, residual = stats.status.reshape(-1), stats.residual.reshape(-1)
    total = status.numel()
    lines: list[str] = []
    for code, (why, cure) in REASONS.items():
        where = torch.nonzero(status == code).flatten().tolist()
        if where:
            worst = float(residual[where].max())
            lines.append(f"{those(where, total)} {why}; largest residual {worst:.3g}, tolerance {tol:.3g}: {cure}.")
    return f"{what}: " + " ".join(lines) + f"{advice} on_failure='nan' or 'last' returns the other samples' results."


def those(where: list[int], total: int) -> str:
    """The samples that a message is about."""
    return "the system" if total == 1 else f"{len(where)} of {total} samples (first: {where[:8]})"
