"""What an integration reports: `OdeStats`, and why samples were given up."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dualnn.solvers.stats import those

OnFailure = Literal["raise", "nan"]
ON_FAILURE = ("raise", "nan")


class Status(enum.IntEnum):
    """How one sample's integration stands, or ended."""

    RUNNING = 0
    DONE = 1
    MAX_STEPS = 2
    NONFINITE = 3
    COLLAPSED = 4
    NEWTON = 5
    SINGULAR = 6
    EVENT = 7


REASONS = {
    Status.MAX_STEPS: (
        "took max_steps steps",
        "raise max_steps or rtol, or use a method for stiff problems (radau, rodas5p, bdf)",
    ),
    Status.NONFINITE: (
        "met a right-hand side that is nan or infinite, however short the step",
        "check fn and its arguments there: a root or logarithm of a negative number, a division by zero, an overflow",
    ),
    Status.COLLAPSED: (
        "needed a step too short for the dtype",
        "the solution may blow up or jump there (a discontinuity in fn?); otherwise raise rtol or atol, use float64, "
        "or a method for stiff problems",
    ),
    Status.NEWTON: (
        "has stage equations that Newton's method does not solve",
        "with fixed steps take shorter ones; else fn may have a kink or a jump there, or rtol is too small for the "
        "dtype: raise it, use float64, or try rodas5p, which iterates nothing",
    ),
    Status.SINGULAR: (
        "has an iteration matrix that is singular or not finite, however short the step",
        "check fn's derivative in y there: it may be infinite, as a square root's at 0",
    ),
}


class OdeStats(NamedTuple):
    """The course of one call; what is a tensor holds one number for each sample.

    Attributes:
        steps: Accepted steps.
        rejected: Steps rejected by the error test.
        newton_failures: Steps given up because Newton's method did not converge.
        newton_iterations: Newton iterations in all attempted steps.
        status: `Status` codes.
        time: Where the integration stands: the last time asked for, a terminal event, or where it was given up.
        step_size: The last accepted step, signed.
        evaluations: Right-hand sides, each on the whole batch (those inside Jacobians and tangents not counted).
        jacobians: Jacobians formed, on the whole batch.
        factorisations: Matrices factorised, on the whole batch.
    """

    steps: Tensor
    rejected: Tensor
    newton_failures: Tensor
    newton_iterations: Tensor
    status: Tensor
    time: Tensor
    step_size: Tensor
    evaluations: int
    jacobians: int
    factorisations: int

    @property
    def done(self) -> Tensor:
        """Which samples reached the end, or a terminal event."""
        return (self.status == Status.DONE) | (self.status == Status.EVENT)


def failure(stats: OdeStats, method: str, where: Callable[[Status], bool] | None = None) -> str:
    """Which samples were given up, why, at what time and step, and what to do."""
    status, time = stats.status.reshape(-1), stats.time.reshape(-1)
    step, count = stats.step_size.reshape(-1), stats.steps.reshape(-1)
    total = status.numel()
    lines: list[str] = []
    for code, (why, cure) in REASONS.items():
        found = torch.nonzero(status == code).flatten().tolist()
        if found:
            b = found[0]
            first = "" if total == 1 else f"sample {b} "
            lines.append(
                f"{those(found, total)} {why}: {first}at t = {float(time[b]):.9g} after {int(count[b])} steps, the "
                f"last of {float(step[b]):.3g}: {cure}."
            )
    return f"odeint by {method}: " + " ".join(lines) + " on_failure='nan' returns the other samples' results."
