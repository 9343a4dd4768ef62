r"""Initial value problems, stiff or not, with error-controlled values and exact derivatives of the discrete solution.

.. math:: y' = f(t, y, p), \qquad y(t_0) = y_0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from dualnn.engine.dual_tensor import primal_of, top_level
from dualnn.engine.errors import ConvergenceError, DualInputError, UnsupportedOpError, unknown_name
from dualnn.engine.untraced import untraced
from dualnn.solvers.factors import refuse_mixing
from dualnn.solvers.ode.bdf import BDF
from dualnn.solvers.ode.captured import lifted, refuse_captured
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.ode.dop853 import DOP853
from dualnn.solvers.ode.dopri5 import DOPRI5
from dualnn.solvers.ode.field import Counts, Field
from dualnn.solvers.ode.follow import Forward, differentiated, sizes
from dualnn.solvers.ode.loop import Follower, integrate
from dualnn.solvers.ode.method import Method
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.radau import Radau
from dualnn.solvers.ode.reverse import Reverse
from dualnn.solvers.ode.rodas5p import RODAS5P
from dualnn.solvers.ode.stats import ON_FAILURE, OnFailure, failure

METHODS: dict[str, Callable[[Options], Method]] = {
    "bdf": lambda options: BDF(options.max_order),
    "dop853": lambda options: DOP853,
    "dopri5": lambda options: DOPRI5,
    "radau": lambda options: Radau(),
    "rodas5p": lambda options: RODAS5P,
}


# Loops with a data-dependent end do not trace: one clean graph break instead.
@untraced
def odeint(
    fn: Callable[..., Tensor],
    y0: Tensor,
    t: Tensor,
    args: Sequence[Any] = (),
    method: str = "bdf",
    rtol: float | Tensor = 1e-6,
    atol: float | Tensor = 1e-9,
    options: dict[str, Any] | None = None,
    full_output: bool = False,
    *,
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Integrate ``y' = fn(t, y, *args)`` from ``y(t[0]) = y0``, differentiably in ``y0``, ``t`` and ``args``.

    Every sample of a batch has steps of its own, so a hard one does not cost the others accuracy. The methods for stiff
    problems get Jacobians from the engine: ``fn`` is ordinary torch code.

    Derivatives are those of the discrete solution: a step's size and order are constants, its equations are
    differentiated exactly at its stages (``solvers/ode/THEORY.md``). Tangents are carried along, in memory that does
    not depend on the number of steps; a backward pass repeats the steps one by one from what each of them keeps, a few
    times n numbers. Both nest, to any order.

    ===========  =====================================================================================================
    ``bdf``      backward differences of order 1 to 5: for stiff problems with many unknowns or an expensive ``fn``
    ``radau``    Radau IIA of order 5, implicit: accurate, robust; the choice for tight tolerances
    ``rodas5p``  Rosenbrock of order 5, without iterations: for stiff problems with few unknowns
    ``dopri5``   Dormand-Prince 5(4), explicit: for problems that are not stiff
    ``dop853``   Dormand-Prince 8(5,3), explicit: for problems that are not stiff, at tight tolerances
    ===========  =====================================================================================================

    Args:
        fn: ``fn(t, y, *args)`` returns y's shape and dtype. A module's parameters are differentiated as well; what else
            it captures must not be.
        y0: ``(n,)`` for one system, ``(B, n)`` for B of them; float32 or float64.
        t: Times at which the solution is wanted, increasing or decreasing, the first of them that of ``y0``. ``fn``
            gets a time of shape ``()`` for one system, ``(B, 1)`` for a batch.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: See the table.
        rtol: Relative tolerance of a step's error, a number or one for each component.
        atol: Absolute tolerance, likewise.
        options: See `solvers.ode.options.Options`: ``first_step``, ``max_step``, ``step_size`` (fixed), ``max_steps``,
            ``norm``, ``land``, ``newton_tol``, ``sensitivities`` (tangents take part in the error test), ``max_order``.
        full_output: Return ``(y, OdeStats)``.
        on_failure: For samples that cannot be integrated to the end: ``"raise"``, or give ``"nan"`` from there on.

    Returns:
        The solution at all times; with ``full_output``, and its `OdeStats`.

    Shape:
        ``y0: (*batch, n), t: (T,) -> (T, *batch, n)``.

    Raises:
        ConvergenceError: Samples that were given up: which, why, when, and what to do.
        StructureError: ``fn`` returns another shape or dtype, or mixes samples.
        TangentLostError: ``fn`` captured something that is being differentiated.
        DualInputError: Times out of order, shapes or dtypes that disagree, tolerances that the dtype cannot meet.

    Reference:
        Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996; sensitivities: Maly, Petzold, "Numerical
        methods and software for sensitivity analysis of differential-algebraic systems", 1996 (staggered).

    Example:
        >>> import torch, dualnn as dn
        >>> t, rate = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
        >>> def decay(t, y, rate):
        ...     return -rate * y
        >>> def end(rate):
        ...     return odeint(decay, torch.ones_like(rate), t, (rate,), "radau", rtol=1e-9)[-1]
        >>> y, dy = dn.jvp(end, (rate,), (torch.ones_like(rate),))
        >>> round(float(y), 6), round(float(dy), 6)  # exp(-2), -exp(-2)
        (0.135335, -0.135335)
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if on_failure not in ON_FAILURE:
        raise unknown_name("on_failure", on_failure, ON_FAILURE)
    _check(y0, t, args)
    chosen = Options.of(options)
    fn, args = lifted(fn, args)
    values = y0, t, *args
    y, times, *plain = (primal_of(v).detach() if isinstance(v, Tensor) else v for v in values)
    tol = _tolerance(rtol, atol, y, chosen)
    refuse_captured(fn, times[0] + torch.zeros_like(y[..., 0]), y, plain)
    scheme = METHODS[method](chosen)
    field = Field(fn, plain, Counts())
    follower: Follower | None = None
    if differentiated(values):
        whole = Field(fn, args)
        if top_level(values):
            follower = Forward(scheme, whole, y0, t, sizes(values).to(y) if chosen.sensitivities else None)
        else:
            follower = Reverse(scheme, whole, y0, t)
    with torch.no_grad():
        if y.dim() > 1 and len(y) > 1:
            refuse_mixing(lambda y: field(times[0] + torch.zeros_like(y[..., 0]), y), y)
        found, stats = integrate(scheme, field, y, times, tol, chosen, follower)
    if on_failure == "raise" and not bool(stats.done.all()):
        raise ConvergenceError(failure(stats, method))
    if follower is not None:
        found = follower.finish()
    return (found, stats) if full_output else found


def _check(y0: Any, t: Any, args: Any) -> None:
    if get_interpreter_stack():
        raise UnsupportedOpError(
            "odeint inside a torch.func transform: use dualnn.jvp for forward derivatives, backward() or "
            "torch.autograd.grad for reverse ones, and a batch (B, n) for vmap"
        )
    for name, x in (("y0", y0), ("t", t)):
        if not isinstance(x, Tensor):
            raise DualInputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in (torch.float32, torch.float64):
            raise DualInputError(f"{name} must be float32 or float64, got {x.dtype}: convert it")
        if not bool(torch.isfinite(primal_of(x)).all()):
            raise DualInputError(f"{name} holds values that are nan or infinite")
    if y0.dim() not in (1, 2) or y0.numel() == 0:
        raise DualInputError(f"y0 must be (n,) for one system or (B, n) for B of them: got {tuple(y0.shape)}")
    if t.dtype != y0.dtype or t.device != y0.device:
        raise DualInputError(f"t is {t.dtype} on {t.device}, y0 is {y0.dtype} on {y0.device}: write t.to(y0)")
    if t.dim() != 1 or t.numel() == 0:
        raise DualInputError(f"t must be (T,), the start and the times asked for, got {tuple(t.shape)}")
    gaps = primal_of(t).detach().diff()
    if len(gaps) and not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        bad = int(torch.nonzero(gaps * gaps[0] <= 0)[0])
        raise DualInputError(
            f"t must increase or decrease without repetition: t[{bad}] = {float(primal_of(t)[bad]):.9g} is followed by "
            f"{float(primal_of(t)[bad + 1]):.9g}. Sort it, and drop what is repeated."
        )
    if not isinstance(args, (tuple, list)):
        raise DualInputError(f"args must be a tuple of further arguments, got {type(args).__name__}: write args=(a,)")


def _tolerance(rtol: float | Tensor, atol: float | Tensor, y: Tensor, options: Options) -> Tolerance:
    parts = []
    for name, value in (("rtol", rtol), ("atol", atol)):
        x = torch.as_tensor(value, dtype=y.dtype, device=y.device)
        if x.dim() and x.shape != y.shape[-1:]:
            raise DualInputError(f"{name} must be a number or ({y.shape[-1]},), one a component: got {tuple(x.shape)}")
        if not bool((x > 0).all()):
            raise DualInputError(
                f"{name} must be > 0, got {float(x.min()):.3g}"
                + (": a component that passes through 0 has no relative accuracy" if name == "atol" else "")
            )
        parts.append(x)
    least = 10 * torch.finfo(y.dtype).eps
    if float(parts[0].min()) < least:
        raise DualInputError(
            f"rtol = {float(parts[0].min()):.3g} is below what {y.dtype} can give, {least:.2g}: raise it"
            + (", or use float64" if y.dtype == torch.float32 else "")
        )
    return Tolerance(parts[0], parts[1], options.norm)
