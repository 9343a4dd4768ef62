r"""Initial value problems, stiff or not, with error-controlled values and exact derivatives of the discrete solution.

.. math:: y' = f(t, y, p), \qquad y(t_0) = y_0
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from dualnn.engine.dual_tensor import top_level
from dualnn.engine.errors import CompileFallbackWarning, ConvergenceError, DualInputError, unknown_name
from dualnn.engine.untraced import untraced
from dualnn.solvers.factors import refuse_mixing
from dualnn.solvers.ode import fused, transformed
from dualnn.solvers.ode.along import single
from dualnn.solvers.ode.bdf import BDF
from dualnn.solvers.ode.captured import lifted, plain, refuse_captured
from dualnn.solvers.ode.checks import check_jacobian, check_problem, check_types, check_use, tolerance
from dualnn.solvers.ode.complex_states import real_event, real_matrix, real_rhs, to_complex, to_real
from dualnn.solvers.ode.dop853 import DOP853
from dualnn.solvers.ode.dopri5 import DOPRI5
from dualnn.solvers.ode.events import Event, events_of, gathered, missing
from dualnn.solvers.ode.field import Counts, Field
from dualnn.solvers.ode.follow import Forward, differentiated, sizes
from dualnn.solvers.ode.loop import Follower, integrate
from dualnn.solvers.ode.mass import check_mass, consistent
from dualnn.solvers.ode.method import Method
from dualnn.solvers.ode.options import Options
from dualnn.solvers.ode.progress import progress
from dualnn.solvers.ode.radau import Radau
from dualnn.solvers.ode.reverse import Reverse
from dualnn.solvers.ode.rodas5p import RODAS5P
from dualnn.solvers.ode.runge_kutta import RungeKutta
from dualnn.solvers.ode.stats import ON_FAILURE, OnFailure, failure
from dualnn.solvers.ode.watch import Watch

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
    mass: Tensor | None = None,
    jac: Callable[..., Tensor] | None = None,
    events: Callable[..., Tensor] | Event | Sequence[Callable[..., Tensor] | Event] | None = None,
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Integrate ``y' = fn(t, y, *args)`` from ``y(t[0]) = y0``, differentiably in ``y0``, ``t`` and ``args``.

    Every sample of a batch has steps of its own, so a hard one does not cost the others accuracy. The methods for stiff
    problems get Jacobians from the engine: ``fn`` is ordinary torch code.

    Derivatives are those of the discrete solution: a step's size and order are constants, its equations are
    differentiated exactly at its stages (``solvers/ode/THEORY.md``). Tangents are carried along, in memory that does
    not depend on the number of steps; a backward pass repeats the steps one by one from what each of them keeps, a few
    times n numbers. Both nest, to any order. Inside ``torch.func``'s transforms it is one node (`transformed`).

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
        y0: ``(n,)`` for one system, ``(B, n)`` for B of them; float32 or float64, or complex of their sizes: then the
            real and imaginary parts are integrated (``fn`` need not be holomorphic) and tested, each by itself.
        t: Times at which the solution is wanted, increasing or decreasing, the first of them that of ``y0``. ``fn``
            gets a time of shape ``()`` for one system, ``(B, 1)`` for a batch.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: See the table.
        rtol: Relative tolerance of a step's error, a number or one for each component.
        atol: Absolute tolerance, likewise.
        options: See `solvers.ode.options.Options`: ``first_step``, ``max_step``, ``step_size`` (fixed), ``max_steps``,
            ``norm``, ``land``, ``newton_tol``, ``sensitivities`` (tangents take part in the error test), ``max_order``,
            ``project`` (make ``y0`` consistent with the algebraic equations), ``progress`` (show a bar),
            ``compile`` (a small system at a hundredth of the price, after seconds of building; rodas5p).
        full_output: Return ``(y, OdeStats)``.
        mass: Mass matrix M of ``M y' = fn(t, y, *args)``, constant, ``(n, n)`` or ``(B, n, n)``, for the methods for
            stiff problems. It may be singular: rows without y' are algebraic equations (of index 1), which ``y0`` must
            satisfy. It may be differentiated.
        jac: ``jac(t, y, *args) -> (*batch, n, n)``, the derivative of ``fn`` in y, for the values of implicit methods;
            compared with the engine's once, at the start. Derivatives use the engine's. None: the engine's throughout.
        events: One function ``event(t, y, *args) -> (*batch,)`` whose zeros are wanted, or several; each may be an
            `Event` (terminal, direction, required), or have scipy's attributes ``terminal`` and ``direction``. A zero
            is seen where the function has changed sign over a step (``max_step`` finds shorter excursions), not at the
            start. After a terminal event a sample's results are nan.
        on_failure: For samples that cannot be integrated to the end: ``"raise"``, or give ``"nan"`` from there on.

    Returns:
        The solution at all times; with ``events``, then their `Occurrences` (a tuple of them if ``events`` is a
        sequence), differentiable as the solution; with ``full_output``, then its `OdeStats`.

    Shape:
        ``y0: (*batch, n), t: (T,) -> (T, *batch, n)``.

    Raises:
        ConvergenceError: Samples that were given up: which, why, when, and what to do.
        StructureError: ``fn`` returns another shape or dtype, or mixes samples.
        TangentLostError: ``fn`` captured something that is being differentiated.
        DualInputError: Times out of order, shapes or dtypes that disagree, tolerances that the dtype cannot meet, a
            ``y0`` that violates algebraic equations.
        SingularMatrixError: ``M y' = fn`` of an index above 1; the derivative of an event whose function touches zero.

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

        With an algebraic equation (the second row of the mass matrix is zero), and a Jacobian of one's own:

        >>> def both(t, y):
        ...     return torch.stack([-2 * y[..., 1], y[..., 0] - y[..., 1]], -1)
        >>> mass, known = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, -2.0], [1.0, -1.0]]]).double()
        >>> y = odeint(both, torch.ones(2).double(), t, (), "radau", mass=mass, jac=lambda t, y: known)[-1]
        >>> [round(v, 5) for v in y.tolist()]
        [0.13534, 0.13534]

        When is a quarter left, and how does that depend on the rate? At ln(4) / rate.

        >>> def left(t, y, rate):
        ...     return y[..., 0] - 0.25
        >>> rate.requires_grad_()
        tensor([2.], dtype=torch.float64, requires_grad=True)
        >>> _, found = odeint(decay, torch.ones(1).double(), t, (rate,), "dop853", events=Event(left, terminal=True))
        >>> found.t.sum().backward()
        >>> round(found.t.item(), 6), round(rate.grad.item(), 6)
        (0.693147, -0.346574)
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if on_failure not in ON_FAILURE:
        raise unknown_name("on_failure", on_failure, ON_FAILURE)
    check_types(y0, t, args, jac)
    original = fn, args
    given, (fn, args) = len(args), lifted(fn, args)
    jac = None if jac is None else own(jac, given)
    if get_interpreter_stack():
        transformed.refuse(fn, y0, t, args, (events is not None, full_output))
        if (options or {}).get("compile") and fn is not original[0]:
            warnings.warn(
                "odeint takes no compiled steps: a module inside torch.func", CompileFallbackWarning, stacklevel=3
            )
            options = {**(options or {}), "compile": False}

        def integrated(y0: Tensor, t: Tensor, mass: Tensor | None, *args: Any) -> Tensor:
            return odeint(fn, y0, t, args, method, rtol, atol, options, mass=mass, jac=jac, on_failure=on_failure)

        return transformed.through(integrated, y0, t, mass, *args)
    check_problem(y0, t)
    chosen = Options.of(options)
    scheme = METHODS[method](chosen)
    if chosen.compile and not isinstance(scheme, fused.Straight):
        raise DualInputError(f"options['compile'] is for method='rodas5p', not {method!r}")
    watched, alone = events_of(events)
    conditions = [event.fn for event in watched]
    tol = tolerance(rtol, atol, plain(y0), chosen)
    if mass is not None:
        check_mass(mass, y0, method, isinstance(scheme, RungeKutta))
    if jac is not None:
        check_use(y0, method, isinstance(scheme, RungeKutta))
    turned = y0.is_complex()
    if turned:
        fn, y0, conditions = real_rhs(fn), to_real(y0), [real_event(g) for g in conditions]
        mass = None if mass is None else real_matrix(mass)
    for name, depends in (("fn", fn), *((f"event {k}", own(g, given)) for k, g in enumerate(conditions))):
        refuse_captured(depends, times(plain(t)[0], plain(y0)), plain(y0), [plain(a) for a in args], name)
    if mass is not None:
        y0 = consistent(lambda t, y, *args: Field(fn, args)(t, y), t[0], y0, mass, args, tol, chosen.project)
        args = (mass, *args)
    values = y0, t, *args
    y, at, *rest = (plain(v) for v in values)
    field = Field(fn, rest, Counts(), mass is not None, jac)
    asked = [own(placed(g), given) for g in conditions]
    size = sizes(values).to(y) if chosen.sensitivities and top_level(values) else None

    def follow() -> Follower | None:
        if top_level(values):
            return Forward(scheme, field.at(args), y0, t, size, asked)
        return Reverse(scheme, field.at(args), y0, t, asked) if differentiated(values) else None

    follower, quick = None, None
    crossings: list[Any] = []
    if isinstance(scheme, fused.Straight) and chosen.compile:
        others = {
            "it watches events": watched, "there is a mass matrix": mass is not None, "jac is given": jac is not None,
            "the state is complex": turned, "it shows a progress bar": chosen.progress,
            "tangents of several levels take part in the error test": size is not None and not single(values),
        }  # fmt: skip
        if reason := next((words for words, found in others.items() if found), None):
            warnings.warn(f"odeint takes no compiled steps: {reason}", CompileFallbackWarning, stacklevel=3)
        else:
            follower = None if single(values) else follow()
            with torch.no_grad():
                quick = fused.integrate(*original, scheme, field, y0, t, tol, chosen, size, follower)
    if quick is not None:
        found, stats = quick
    else:
        follower = follow()
        with torch.no_grad():
            if y.dim() > 1 and len(y) > 1:
                refuse_mixing(lambda y: field(times(at[0], y), y), y)
            if jac is not None:
                check_jacobian(field, times(at[0], y), y)
            watch = partial(Watch, watched, [lambda t, y, g=g: g(t, y, *rest) for g in asked]) if watched else None
            with progress(at[0], at[-1], chosen.progress) as tell:
                found, stats, crossings = integrate(scheme, field, y, at, tol, chosen, follower, watch, tell)
    if on_failure == "raise" and not bool(stats.done.all()):
        raise ConvergenceError(failure(stats, method))
    if follower is not None:
        found, crossings = follower.finish(), follower.crossings
    occurrences = gathered(watched, crossings, y)
    if on_failure == "raise":
        missing(watched, occurrences)
    if turned:
        found, occurrences = to_complex(found), [o._replace(y=to_complex(o.y)) for o in occurrences]
    results: list[Any] = [found]
    if events is not None:
        results.append(occurrences[0] if alone else tuple(occurrences))
    if full_output:
        results.append(stats)
    return tuple(results) if len(results) > 1 else found


def times(t: Tensor, y: Tensor) -> Tensor:
    """A time for every sample."""
    return t.expand(y.shape[:-1])


def own(fn: Callable[..., Any], given: int) -> Callable[..., Any]:
    """A further function of the user's: it gets the arguments as they were given, the last ones of all."""
    return lambda t, y, *args: fn(t, y, *args[len(args) - given :])


def placed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """For times of the batch's shape."""
    return lambda t, y, *args: fn(t.unsqueeze(-1) if y.dim() > 1 else t, y, *args)
