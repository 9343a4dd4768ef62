"""`ODEBlock`: a layer that follows a module's vector field for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack

from dualnn.engine.autocast import as_now
from dualnn.engine.errors import DualInputError, DualShapeError, StructureError, unknown_name
from dualnn.engine.parameters import Places
from dualnn.engine.untraced import untraced
from dualnn.layers.solving import empty
from dualnn.solvers.ode import odeint
from dualnn.solvers.ode.odeint import METHODS
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.stats import ON_FAILURE, OdeStats, OnFailure

RETURNS = ("last", "all")


class ODEBlock(nn.Module):
    r"""Integrate a module's vector field from the input: a neural ODE.

    .. math:: \frac{dy}{dt} = f_w(t, y), \qquad y(t_0) = x, \qquad \text{output: } y(t_1)

    Every sample has steps of its own. Derivatives in x, in the weights and in the times are those of the discrete
    solution, in reverse (memory: a few numbers a step and unknown, no graph), forward (memory that does not depend on
    the steps) and of higher order: see `dualnn.solvers.odeint`.

    Args:
        fn: Called as ``fn(t, y)``; returns dy/dt, of y's shape, sample by sample. t broadcasts with y: ``(B, 1, …)``.
            It is called several times a step: a dropout mask drawn anew each time is no vector field.
        t: Where x is, and where the solution is wanted: increasing or decreasing.
        method: ``"dopri5"``, or ``"dop853"`` at tight tolerances; ``"radau"``, ``"rodas5p"`` or ``"bdf"`` where the
            field is stiff.
        rtol: Relative tolerance of a step's error.
        atol: Absolute tolerance.
        options: See `dualnn.solvers.ode.options.Options`: ``step_size`` for fixed steps, ``max_steps``, …
        returns: ``"last"``, the solution at the last time, or ``"all"``.
        on_failure: For samples that cannot be integrated: ``"raise"`` or ``"nan"``.

    Shape:
        ``x: (B, …) -> y: (B, …)``, with ``returns="all"`` ``(T, B, …)``. An empty batch gives an empty output. bfloat16
        and float16 states are integrated in float32, their field in its own precision: coarse tolerances, then.

    Raises:
        ConvergenceError: Samples that were given up: which, why, when.
        StructureError: fn returns another shape than y's, or mixes samples.
        DualInputError: Inputs that are not floating point tensors, times out of order, tolerances out of range.
        DualShapeError: An input without a batch axis or without unknowns.
        UnknownNameError: A method, an option or a choice that does not exist.

    Attributes:
        stats: The course of the last call (`dualnn.solvers.ode.stats.OdeStats`): steps, rejections, evaluations; None
            within ``torch.func``.

    Reference:
        Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", 2018, arXiv 1806.07366.

    Example:
        >>> class Field(torch.nn.Module):
        ...     def __init__(self, n: int):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(n + 1, n)
        ...     def forward(self, t, y):
        ...         return torch.tanh(self.net(torch.cat([y, t.expand(len(y), 1)], 1)))
        >>> block = ODEBlock(Field(3), t=(0.0, 2.0))
        >>> block(torch.randn(5, 3)).square().mean().backward()
        >>> block.fn.net.weight.grad.shape, bool(block.stats.done.all())
        (torch.Size([3, 4]), True)

        In YAML::

            class_path: dualnn.layers.ODEBlock
            init_args:
              fn: {class_path: mine.Field, init_args: {n: 3}}
              t: [0.0, 2.0]
              method: radau
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(
        self,
        fn: nn.Module,
        t: Sequence[float] = (0.0, 1.0),
        method: str = "dopri5",
        rtol: float = 1e-4,
        atol: float = 1e-5,
        *,
        options: dict[str, Any] | None = None,
        returns: Literal["last", "all"] = "last",
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(fn, nn.Module):
            raise DualInputError(f"ODEBlock: fn must be an nn.Module, called as fn(t, y), got {type(fn).__name__}")
        times = [float(v) for v in t]
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        if not gaps or not (min(gaps) > 0 or max(gaps) < 0):
            raise DualInputError(f"ODEBlock: t must be two times or more, increasing or decreasing, got {times}")
        if not min(rtol, atol) > 0:
            raise DualInputError(f"ODEBlock: rtol and atol must be > 0, got {rtol} and {atol}")
        for name, value, choices in (
            ("method", method, METHODS),
            ("returns", returns, RETURNS),
            ("on_failure", on_failure, ON_FAILURE),
        ):
            if value not in choices:
                raise unknown_name(name, value, choices)
        Options.of(options)
        self.fn, self.t = fn, tuple(times)
        self.method, self.rtol, self.atol, self.options = method, rtol, atol, options
        self.returns, self.on_failure = returns, on_failure
        self.stats: OdeStats | None = None

    def extra_repr(self) -> str:
        """The times and the solver's settings."""
        first = f"t={self.t}, method={self.method!r}, rtol={self.rtol}, atol={self.atol}, options={self.options}"
        return f"{first}, returns={self.returns!r}, on_failure={self.on_failure!r}"

    @untraced
    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Integrate from x; ``t``, ``(T,)``, stands in for the block's own times and is differentiated too."""
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DualInputError(f"ODEBlock: x must be a floating point tensor, got {got}: convert it (x.float())")
        if x.dim() < 2 or x.shape[1:].numel() == 0:
            raise DualShapeError(f"ODEBlock: x needs a batch axis and unknowns, (B, …), got shape {tuple(x.shape)}")
        if t is not None and (not isinstance(t, Tensor) or not t.dtype.is_floating_point):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise DualInputError(f"ODEBlock: t must be a floating point tensor, got {got}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        times = torch.tensor(self.t, dtype=dtype, device=x.device) if t is None else t.to(x.device, dtype)
        if (nothing := empty(x, self.fn, ())) is not None:
            return nothing.expand(len(times), *x.shape) if self.returns == "all" else nothing
        places = Places(self.fn)

        def field(t: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
            now, here = t.reshape(-1, *(1,) * (x.dim() - 1)), y.reshape(-1, *x.shape[1:])
            with places.swapped(weights):
                f = self.fn(now.to(x.dtype), here.to(x.dtype))
            if not isinstance(f, Tensor) or f.shape != here.shape:
                got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
                raise StructureError(f"ODEBlock: fn must return dy/dt of y's shape {tuple(here.shape)}, got {got}")
            return f.reshape(y.shape).to(y.dtype)

        called = as_now(field, x.device.type)
        counted = not get_interpreter_stack()  # a transform of torch.func has no place for the statistics
        with torch.autocast(x.device.type, enabled=False):
            found = odeint(
                called,
                x.reshape(len(x), -1).to(dtype),
                times,
                tuple(places.parameters),
                self.method,
                self.rtol,
                self.atol,
                self.options,
                full_output=counted,
                on_failure=self.on_failure,
            )
        found, self.stats = found if counted else (found, None)
        if self.returns == "last":
            return found[-1].reshape(x.shape).to(x.dtype)
        return found.reshape(len(times), *x.shape).to(x.dtype)
