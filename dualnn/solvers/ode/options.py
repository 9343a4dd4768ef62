"""What can be set beside the tolerances: `Options`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import DualInputError, unknown_name
from dualnn.solvers.ode.control import NORMS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `odeint`.

    Attributes:
        first_step: Length of the first step; None: chosen.
        max_step: Longest step; None: no limit.
        step_size: Fixed steps, without an error test: a number, or a tensor ``(S,)`` of successive lengths. Stage
            equations are then solved to rounding.
        max_steps: Attempted steps of any sample, at most.
        norm: Of the error, over the components: ``"rms"`` or ``"max"``.
        land: Whether steps end at every requested time (else only at the last; results between are interpolated).
            None: as suits the method.
        newton_tol: When Newton's method has converged, as a fraction of the error test's tolerance.
        sensitivities: Tangents take part in the error test. Outside of it nothing controls them: a value may meet its
            tolerance beside tangents that are off by orders of magnitude, most of all where an explicit method runs at
            the edge of its stability (``experiments/work-precision``). The steps then depend on the tangents.
        max_order: Of bdf.
        project: With a singular mass matrix, make any ``y0`` consistent with the algebraic equations, as far as
            ``M y0`` leaves it open. Otherwise one that is more than the tolerance away is refused.
        progress: Show a bar: how far the slowest sample is.
        compile: Record a whole step, its decision and its derivative as one compiled program, for this and every later
            call with the same ``fn`` (the same object) and shapes; for rodas5p. Building it takes seconds for a small
            system on a CPU, a minute otherwise; a small system then costs a hundredth or less (`THEORY.md`, section 7).
            What varies from call to call must be among ``args``, as tensors, or belong to the module that ``fn`` is;
            other tensors that ``fn`` captures are those of the first call. First-order forward derivatives are part of
            the program; others follow its steps as usual. Where there can be no program, the ordinary loop runs, and a
            `CompileFallbackWarning` says why.
    """

    first_step: float | None = None
    max_step: float | None = None
    step_size: float | Tensor | None = None
    max_steps: int = 100_000
    norm: str = "rms"
    land: bool | None = None
    newton_tol: float | None = None
    sensitivities: bool = False
    max_order: int = 5
    project: bool = False
    progress: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("first_step", "max_step", "newton_tol"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DualInputError(f"options[{name!r}] must be > 0 (the direction is that of t), got {value}")
        if self.step_size is not None and not bool((torch.as_tensor(self.step_size) > 0).all()):
            raise DualInputError("options['step_size'] must be > 0 (the direction is that of t)")
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if not 1 <= self.max_order <= 5:
            raise DualInputError(f"options['max_order'] must be 1 to 5, got {self.max_order}")
        if self.max_steps < 1:
            raise DualInputError(f"options['max_steps'] must be >= 1, got {self.max_steps}")

    @classmethod
    def of(cls, given: dict[str, Any] | None) -> Options:
        """From a dict; a name that is none of them raises."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in given or {}:
            if key not in names:
                raise unknown_name("option", key, names)
        return cls(**(given or {}))
