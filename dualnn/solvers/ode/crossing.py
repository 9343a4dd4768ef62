r"""The derivative of an event: time and state, by the implicit function theorem.

In the step that holds it, the event lies at the root :math:`\theta` of g on the interpolant :math:`\hat y`, whose own
coefficients move:

.. math::

   \dot\theta = -\frac{g_t\,\dot t_n + g_y\,\dot{\hat y}(\theta) + g_p\,\dot p}{h\,g_t + g_y\,\hat y'(\theta)},
   \qquad t_e = t_n + \theta h, \qquad y_e = \hat y(\theta).

At the end of a step, where radau has its events, value and slope of the interpolant are those of the solution.

Reference:
    Hiskens, Pai, "Trajectory sensitivity analysis of hybrid systems", IEEE Trans. Circuits Syst. I 47, 2000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import SingularMatrixError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.ode.events import Crossing
from dualnn.solvers.ode.method import Carry, Method, formed
from dualnn.solvers.stats import those


class _Slope:
    """Division by the derivative of an event's function along the step."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def solve(self, rhs: Tensor) -> Tensor:
        """The quotient."""
        return rhs / self.slope

    solve_transposed = solve


def crossed(
    fn: Callable[..., Tensor],
    method: Method,
    args: Sequence[Any],
    t: Tensor,
    old: Carry,
    new: Carry,
    stages: tuple[Any, ...],
    h: Tensor,
    crossing: Crossing,
) -> tuple[Tensor, Tensor]:
    """Time and state of a known event, differentiably in the step that holds it and in the arguments.

    Raises:
        SingularMatrixError: The function touches zero without a slope: the event's time has no derivative.
    """
    parts = (*old, *new, *formed(stages))
    ends = len(old), len(old) + len(new), len(parts)

    def state(theta: Tensor, rest: tuple[Any, ...]) -> Tensor:
        return method.dense(rest[: ends[0]], rest[ends[0] : ends[1]], rest[ends[1] : ends[2]], h, theta)

    def residual(theta: Tensor, t: Tensor, *rest: Any) -> Tensor:
        g = fn(t + theta * h, state(theta, rest), *rest[ends[2] :])
        return torch.where(crossing.samples, g, theta - crossing.theta)

    def linearise(theta: Tensor, t: Tensor, *rest: Any) -> _Slope:
        value, tan = push(lambda x: residual(x, t, *rest), (theta,), [Dense(torch.ones_like(theta).unsqueeze(0))])
        slope: Any = dense_of(tan, value)
        flat = ~(slope[0].abs() > torch.finfo(h.dtype).eps ** 0.5 * crossing.scale) & crossing.samples
        if bool(flat.any()):
            where = torch.nonzero(flat.reshape(-1)).flatten().tolist()
            raise SingularMatrixError(
                f"event {crossing.event} has no derivative for {those(where, flat.numel())}: at t = "
                f"{float(crossing.t.reshape(-1)[where[0]]):.9g} its function has no slope in time (it touches zero, or "
                "is a step function). Watch a function that crosses zero, or differentiate without this event."
            )
        return _Slope(slope[0])

    theta = implicit(Problem(residual, lambda *_: (crossing.theta, None), linearise), t, *parts, *args)
    return t + theta * h, state(theta, parts)
