r"""Roots of systems of equations, with implicit derivatives.

.. math:: F(x, p) = 0, \qquad \dot x = -F_x^{-1} F_p\,\dot p

A method finds x on plain tensors; the derivative is that of the solution (`solvers.implicit`), whatever the path to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, UnsupportedOpError, unknown_name
from dualnn.engine.untraced import untraced
from dualnn.solvers.bracketed import TRIALS, bracketed_root
from dualnn.solvers.broyden import broyden
from dualnn.solvers.factors import Factors, same_shape
from dualnn.solvers.fused import fused
from dualnn.solvers.implicit import Problem, implicit, nested
from dualnn.solvers.jacobians import choose
from dualnn.solvers.newton import Linearise, default_tolerance, newton
from dualnn.solvers.stats import OnFailure, Stats, check_on_failure, settle

Differentiate = Literal["implicit", "one_step", "unroll"]
DIFFERENTIATE = ("implicit", "one_step", "unroll")


class Method(Protocol):
    """A root finder: plain code on ``x: (*batch, n)``, each sample for itself."""

    def __call__(
        self, fn: Callable[[Tensor], Tensor], linearise: Linearise, x: Tensor, tol: float | None, max_steps: int
    ) -> tuple[Tensor, Stats, Factors | None]:
        """The last iterate, its course, and the factors of the last step (or None)."""


METHODS: dict[str, Method] = {"newton": newton, "broyden": broyden}


# Iterations with a data-dependent stop do not trace: one clean graph break instead.
@untraced
def root(
    fn: Callable[..., Tensor],
    x0: Tensor | None = None,
    args: Sequence[Any] = (),
    method: str = "newton",
    tol: float | None = None,
    full_output: bool = False,
    *,
    max_steps: int = 100,
    jacobian: str | Callable[..., Tensor] = "dense",
    bandwidth: tuple[int, int] | None = None,
    bracket: tuple[Any, Any] | None = None,
    differentiate: Differentiate = "implicit",
    on_failure: OnFailure = "raise",
    compile: bool = False,
) -> Any:
    r"""Solve ``fn(x, *args) = 0`` from ``x = x0``, differentiably in ``args``.

    K directions cost one evaluation of ``fn`` on duals and one back-substitution each, whatever the number of
    iterations; so does a backward pass. Roots may be nested in ``fn``, and derivatives of any order are exact.

    Args:
        fn: ``fn(x, *args)`` returns a residual of x's shape: sample by sample, or for the bracketed methods entry by
            entry.
        x0: Where to start: ``(n,)`` for one system, ``(B, n)`` for B of them. Its derivative does not matter. For the
            bracketed methods any shape, and optional: the first point to try.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: ``"newton"``, with a backtracking line search; ``"broyden"``, with one Jacobian that updates keep
            current; ``"chandrupatla"`` (of Brent's class) or ``"bisect"`` between the ends of a ``bracket``.
        tol: Largest entry of the residual at which a sample is solved. None: as exactly as the dtype gives.
        full_output: Return ``(x, Stats)``.
        max_steps: Steps at most.
        jacobian: ``"dense"``; ``"banded"`` with a ``bandwidth``, from a few coloured directions; ``"krylov"``, never
            formed, for large systems; or a callable ``jacobian(x, *args) -> (*batch, n, n)`` (`solvers.jacobians`).
        bandwidth: ``(lower, upper)``, the bands below and above the diagonal.
        bracket: ``(lo, hi)``, numbers or tensors, maybe infinite, between which each entry changes sign.
        differentiate: ``"implicit"``: the derivative of the solution, with a Jacobian taken there. ``"one_step"``: with
            the factors of the last step instead, which saves that Jacobian; its relative error is of the order of the
            last step's length (first derivatives only; methods that hold no exact factors take a Jacobian anyway).
            ``"unroll"``: through every iteration, for comparison (dense or given Jacobians).
        on_failure: For samples without a solution: ``"raise"``, or give ``"nan"``, or the ``"last"`` iterate.
        compile: Record a few Newton steps and the derivative as one compiled program, for this and every later call
            with the same ``fn`` (the same object) and shapes; where the program does not arrive, or duals are nested,
            the ordinary solver takes over. Building it takes half a minute; a small system then costs a tenth or less.
            What varies from call to call must be among ``args``, as tensors. Newton with a dense Jacobian only.

    Returns:
        The solution, of x0's shape; with ``full_output``, and its `Stats`.

    Raises:
        ConvergenceError: Samples that were not solved: which, why, the last residual, and what to do.
        StructureError: The residual has another shape or dtype than x0, samples influence one another, or a Jacobian
            is not what was claimed.
        DualInputError: An argument that makes no sense.

    Reference:
        Dennis, Schnabel, "Numerical Methods for Unconstrained Optimization and Nonlinear Equations", 1996. One-step
        differentiation: Bolte, Pauwels, Vaiter, 2023, arXiv 2305.13768.

    Example:
        >>> import torch, dualnn as dn
        >>> kepler = lambda E, e, M: E - e * torch.sin(E) - M
        >>> e, M = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
        >>> E, dE = dn.jvp(lambda M: dn.solvers.root(kepler, torch.ones_like(M), (e, M)), (M,), (torch.ones_like(M),))
        >>> round(float(E), 9), round(float(dE), 9)
        (0.630843528, 3.660017129)
    """
    if method not in METHODS and method not in TRIALS:
        raise unknown_name("method", method, [*METHODS, *TRIALS])
    if method in TRIALS:
        if jacobian != "dense" or bandwidth is not None:
            raise DualInputError(f"method={method!r} uses no Jacobian: leave jacobian and bandwidth out")
        check_options(args, tol, max_steps, on_failure, differentiate)
        found = bracketed_root(fn, x0, args, method, bracket, tol, max_steps, differentiate, on_failure)
        return found if full_output else found[0]
    if bracket is not None:
        raise DualInputError(f"bracket is for method={' or '.join(map(repr, TRIALS))}, not {method!r}")
    start = check_start(x0, args, tol, max_steps, on_failure, differentiate)
    search = METHODS[method]
    if compile:
        if method != "newton" or jacobian != "dense" or differentiate != "implicit":
            raise DualInputError("compile=True is for method='newton', jacobian='dense', differentiate='implicit'")
        if (quick := fused(fn, start, args, tol)) is not None:
            return quick if full_output else quick[0]
    linear = choose(jacobian, bandwidth, strict=on_failure == "raise")
    limit = default_tolerance(start) if tol is None else tol
    report: list[Stats] = []

    # The start is an argument as well, so that torch.func's transforms unwrap it.
    def residual(x: Tensor, start: Tensor, *rest: Any) -> Tensor:
        return fn(x, *rest)

    def find(start: Tensor, *rest: Any) -> tuple[Tensor, Factors | None]:
        def equations(x: Tensor) -> Tensor:
            return fn(x, *rest)

        same_shape(equations(start), start)
        x, stats, factors = search(equations, lambda x: linear(fn, x, rest, False), start, tol, max_steps)
        report[:] = [stats]
        keep = differentiate == "one_step" and linear.kept
        return settle(x, stats, on_failure, f"root by {method}", limit), factors if keep else None

    def linearise(x: Tensor, start: Tensor, *rest: Any) -> Factors:
        return linear(fn, x, rest, True)[1]

    if differentiate == "unroll":
        if jacobian in ("banded", "krylov"):
            raise UnsupportedOpError(f"differentiate='unroll' does not go through jacobian={jacobian!r}: use 'dense'")
        x, _ = find(start, *args)
    else:
        if differentiate == "one_step" and nested(args):
            raise UnsupportedOpError("differentiate='one_step' gives first derivatives only: use 'implicit'")
        x = implicit(Problem(residual, find, linearise), start, *args)
    return (x, report[0]) if full_output else x


def check_start(
    x0: Any, args: Sequence[Any], tol: float | None, max_steps: int, on_failure: str, differentiate: str
) -> Tensor:
    """Check what every solver is given, and return the plain starting point."""
    if not isinstance(x0, Tensor):
        raise DualInputError(f"x0 must be a torch.Tensor, got {type(x0).__name__}")
    if not x0.dtype.is_floating_point:
        raise DualInputError(f"x0 must be floating point, got {x0.dtype}: convert it with x0.double()")
    if x0.dim() == 0 or x0.shape[-1] == 0:
        raise DualInputError(f"x0 must be (n,) for one system or (B, n) for B of them, n >= 1: got {tuple(x0.shape)}")
    check_options(args, tol, max_steps, on_failure, differentiate)
    return primal_of(x0).detach()


def check_options(args: Sequence[Any], tol: float | None, max_steps: int, on_failure: str, differentiate: str) -> None:
    """Check what every root finder is told."""
    if not isinstance(args, (tuple, list)):
        raise DualInputError(f"args must be a tuple of further arguments, got {type(args).__name__}: write args=(a,)")
    if max_steps < 1 or (tol is not None and not tol > 0):
        raise DualInputError(f"max_steps must be >= 1 and tol > 0, got {max_steps} and {tol}")
    if differentiate not in DIFFERENTIATE:
        raise unknown_name("differentiate", differentiate, DIFFERENTIATE)
    check_on_failure(on_failure)
