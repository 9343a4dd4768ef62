"""What the activations share that follow an ordinary differential equation from their input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from dualnn.activations.base import Activation, Formula
from dualnn.engine import bridge
from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, unknown_name
from dualnn.engine.untraced import untraced
from dualnn.solvers.ode import odeint
from dualnn.solvers.ode.odeint import METHODS

#: Scales that must be positive stay above this.
MINIMUM = 1e-2

#: The tolerance where none is given: an activation needs no more, and more steps cost as many times the time.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}


class Flow(Activation):
    r"""Base of the flows: every entry is the start, or the drive, of an ODE of its own, integrated over unit time.

    .. math:: \frac{ds}{d\tau} = F(s, c(x, \theta)), \qquad s(0) = s_0(x), \qquad y = s_1(1)

    The entries of a batch are a batch of small systems with steps of their own. Derivatives are those of the discrete
    solution (`dualnn.solvers.odeint`): of any order, in either mode.

    A subclass gives `field` and, where they differ from the parameters and from (x), `constants` and
    `begin`; the output is the first component.

    Args:
        num_channels: 1, or the input's number of channels.
        method: Of `dualnn.solvers.odeint`.
        tol: Tolerance of a step's error, relative and absolute; None: 1e-5 in float32, 1e-8 in float64.
        steps: This many equal steps in place of error control: the same work, and a smooth function, for every input.
        max_steps: Steps of any entry after which `ConvergenceError` is raised.

    Raises:
        UnknownNameError: another method.
        DualInputError: tol, steps or max_steps out of range.
        ConvergenceError: an entry that cannot be integrated.
    """

    def __init__(
        self,
        num_channels: int,
        method: str,
        tol: float | None = None,
        steps: int | None = None,
        max_steps: int = 10_000,
    ) -> None:
        """Check and keep the settings of the integrator."""
        super().__init__(num_channels)
        if method not in METHODS:
            raise unknown_name(f"method of {self.name}", method, METHODS)
        if tol is not None and not 0 < tol < 1:
            raise DualInputError(f"{self.name}: tol must lie between 0 and 1, got {tol}")
        for label, value in (("steps", steps), ("max_steps", max_steps)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (label == "steps" and value is None):
                raise DualInputError(f"{self.name}: {label} must be an integer >= 1, got {value!r}")
        self.method, self.tol, self.steps, self.max_steps = method, tol, steps, max_steps

    @staticmethod
    def field(state: Sequence[Tensor], *constants: Tensor) -> Sequence[Tensor]:
        """The state's derivative in time; time goes from 0 to 1."""
        raise NotImplementedError

    @staticmethod
    def constants(x: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """What `field` takes beside the state."""
        return parameters

    @staticmethod
    def begin(x: Tensor) -> Sequence[Tensor]:
        """The state at time 0."""
        return (x,)

    @property
    def local(self) -> Formula:
        """The integrated flow."""
        return Formula(self.integrate)

    @untraced
    def integrate(self, x: Tensor, *parameters: Tensor, backwards: bool = False) -> Tensor:
        """The output; with ``backwards`` from time 1 to time 0."""

        def flow(*args: Tensor) -> Tensor:
            return self._flow((1.0, 0.0) if backwards else (0.0, 1.0), *args)

        if get_interpreter_stack():  # torch.func cannot look into the loop: the bridge shows it the derivatives
            return bridge.elementwise(bridge.Opaque(flow), x, *parameters)
        return flow(x, *parameters)

    def _flow(self, times: tuple[float, float], *args: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(a.shape for a in args))
        if not shape.numel():
            return sum(args[1:], args[0])  # empty, and on the graph of all
        flat = [a if a.dim() == 0 else a.expand(shape).reshape(-1) for a in args]
        x, *parameters = flat
        x = x.expand(shape.numel())
        known = torch.isfinite(primal_of(x))
        x = torch.where(known, x, torch.zeros_like(primal_of(x)))
        options: dict[str, Any] = {"max_steps": self.max_steps}
        if self.steps is not None:
            options["step_size"] = 1 / self.steps
        tol = TOLERANCE[x.dtype] if self.tol is None else self.tol
        with torch.autocast(x.device.type, enabled=False):
            found = odeint(
                _Field(self.field),
                torch.stack(list(self.begin(x)), -1),
                torch.tensor(times, dtype=x.dtype, device=x.device),
                tuple(self.constants(x, *parameters)),
                self.method,
                tol,
                tol,
                options,
            )[-1]
        y = found[..., 0]
        return torch.where(known, y, torch.full_like(primal_of(y), torch.nan)).reshape(shape)

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"method={self.method!r}, tol={self.tol}, steps={self.steps}, max_steps={self.max_steps}"


class _Field:
    """A flow's right-hand side as `odeint` calls it."""

    def __init__(self, of: Callable[..., Sequence[Tensor]]) -> None:
        self.of = of

    def __call__(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        return torch.stack(list(self.of(y.unbind(-1), *args)), -1)


def discrete(field: Callable[..., Sequence[Any]], state: Sequence[Any], steps: int) -> list[Any]:
    """The tests' oracle: equal steps of Dormand and Prince's method, from scipy's tableau, on any numbers.

    Args:
        field: ``field(state) -> derivative``.
        state: At time 0.
        steps: Number of steps to time 1.

    Example:
        >>> [round(y, 6) for y in discrete(lambda s: [-s[0]], [1.0], 10)]  # exp(-1)
        [0.367879]
    """
    from scipy.integrate import RK45

    rows = [*(row[:i].tolist() for i, row in enumerate(RK45.A)), RK45.B.tolist()]
    now = list(state)
    for _ in range(steps):
        slopes: list[Sequence[Any]] = []
        for row in rows:
            at = [y + sum(w * k[i] for w, k in zip(row, slopes, strict=True)) / steps for i, y in enumerate(now)]
            slopes.append(field(at))
        now = at
    return now
