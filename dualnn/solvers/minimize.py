r"""Minima of functions, with implicit derivatives.

.. math:: x(p) = \arg\min_x f(x, p), \qquad \nabla_x f(x, p) = 0, \qquad
    \dot x = -H^{-1}\, \frac{\partial \nabla_x f}{\partial p}\,\dot p, \quad H = \nabla_x^2 f

A method finds x on plain tensors; the derivative is that of the minimum (`solvers.implicit`), with the exact Hessian,
whatever approximation of it the method stepped with: for least squares
:math:`H = J^T J + \sum_i r_i \nabla^2 r_i`, also where the residual does not vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import DualInputError, UnsupportedOpError, unknown_name
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.bfgs import BFGS
from dualnn.solvers.conjugate_gradients import ConjugateGradients
from dualnn.solvers.definite import Definite
from dualnn.solvers.descent import Step, descend
from dualnn.solvers.factors import Factors
from dualnn.solvers.gauss_newton import GaussNewton
from dualnn.solvers.gradients import FORWARD_LIMIT, Mode, gradient, probe
from dualnn.solvers.implicit import Problem, implicit, nested
from dualnn.solvers.lbfgs import LBFGS
from dualnn.solvers.levenberg_marquardt import LevenbergMarquardt
from dualnn.solvers.newton import default_tolerance
from dualnn.solvers.newton_minimum import Newton
from dualnn.solvers.objective import LeastSquares, Objective, half_squares
from dualnn.solvers.root import Differentiate, check_start
from dualnn.solvers.stats import OnFailure, Stats, Status, settle
from dualnn.solvers.wolfe import plain

METHODS: dict[str, Callable[[Any], Step]] = {
    "newton": Newton,
    "bfgs": BFGS,
    "lbfgs": LBFGS,
    "gauss_newton": GaussNewton,
    "levenberg_marquardt": LevenbergMarquardt,
}
LEAST_SQUARES = ("gauss_newton", "levenberg_marquardt")
MATRIX_FREE = ("lbfgs",)  # above FORWARD_LIMIT unknowns
GRADIENTS = ("auto", "forward", "reverse")


# Iterations with a data-dependent stop do not trace: one clean graph break instead.
@torch.compiler.disable
def minimize(
    fn: Callable[..., Tensor],
    x0: Tensor,
    args: Sequence[Any] = (),
    method: str = "newton",
    tol: float | None = None,
    full_output: bool = False,
    *,
    max_steps: int = 500,
    gradient: Literal["auto", "forward", "reverse"] = "auto",
    differentiate: Differentiate = "implicit",
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Find a local minimum of ``fn(x, *args)`` from ``x = x0``, differentiably in ``args``.

    K directions cost one evaluation of the gradient on duals and one solve with the Hessian each, whatever the number
    of iterations; so does a backward pass. Minima and roots may be nested in ``fn``, and derivatives of any order are
    exact. A point where the gradient vanishes but the Hessian is not positive definite (a saddle, a flat direction) is
    a failure: there is no isolated minimum, and no derivative.

    =========================  =========================================================================================
    ``"newton"``               exact Hessians, made positive definite: few steps, n of some hundreds at most
    ``"bfgs"``                 gradients only, an ``(n, n)`` matrix a sample
    ``"lbfgs"``                gradients only, 20 vectors a sample. Above 32 unknowns the derivative's Hessian is never
                               formed either: conjugate gradients solve with its products, and it is tested along
                               their directions only, when a derivative is taken
    ``"gauss_newton"``         least squares: fn returns the residuals r, and :math:`\tfrac12|r|^2` is minimised
    ``"levenberg_marquardt"``  the same, damped: for poor starts and Jacobians of deficient rank
    =========================  =========================================================================================

    Args:
        fn: ``fn(x, *args)`` returns one number a sample, for the least-squares methods a vector a sample.
        x0: Where to start: ``(n,)`` for one problem, ``(B, n)`` for B of them. Its derivative does not matter.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: See above.
        tol: Largest entry of the gradient at which a sample is solved. None: as exactly as the dtype gives.
        full_output: Return ``(x, Stats)``.
        max_steps: Steps at most.
        gradient: ``"forward"`` by n dual directions, right also for code that cuts autograd graphs; ``"reverse"`` by
            autograd, cheap for many unknowns (it is compared with a dual direction once, and raises if autograd sees
            only part of ``fn``); ``"auto"``: forward up to 32 unknowns.
        differentiate: ``"implicit"``: the derivative of the minimum. ``"one_step"``: with the Hessian of Newton's last
            step instead, which saves one; its relative error is of the order of that step's length (first derivatives
            only). ``"unroll"``: through every iteration, for comparison; step lengths and damping are frozen.
        on_failure: For samples without a minimum: ``"raise"``, or give ``"nan"``, or the ``"last"`` iterate (its
            derivative is nan).

    Returns:
        The minimum, of x0's shape; with ``full_output``, and its `Stats`, whose ``residual`` is the gradient's.

    Raises:
        ConvergenceError: Samples that were not solved: which, why, the last gradient, and what to do.
        StructureError: fn returned another shape or dtype than asked for, or samples influence one another.
        TangentLostError: ``gradient="reverse"``, and fn hides part of itself from autograd.
        SingularMatrixError: From a matrix-free derivative: the Hessian is not positive definite.
        DualInputError: An argument that makes no sense.

    Reference:
        Nocedal, Wright, "Numerical Optimization", 2006; Blondel et al., 2022, arXiv 2105.15183 (implicit derivatives).

    Example:
        >>> import torch, dualnn as dn
        >>> ridge = lambda x, strength: ((x - 1) ** 2).sum(-1) + strength * (x * x).sum(-1)
        >>> strength = torch.tensor(1.0, dtype=torch.float64)
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> x, dx = dn.jvp(lambda s: dn.solvers.minimize(ridge, x0, (s,)), (strength,), (torch.ones_like(strength),))
        >>> x.tolist(), dx.tolist()  # 1 / (1 + s), -1 / (1 + s)^2
        ([0.5, 0.5], [-0.25, -0.25])
    """
    start = check_start(x0, args, tol, max_steps, on_failure, differentiate)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if gradient not in GRADIENTS:
        raise unknown_name("gradient", gradient, GRADIENTS)
    if differentiate == "one_step" and method != "newton":
        raise UnsupportedOpError(
            f"differentiate='one_step' needs the Hessian of the last step, which {method!r} does not have: use "
            "'implicit', or method='newton'"
        )
    if differentiate == "one_step" and nested(args):
        raise UnsupportedOpError("differentiate='one_step' gives first derivatives only: use 'implicit'")
    mode: Mode = gradient if gradient != "auto" else "forward" if start.shape[-1] <= FORWARD_LIMIT else "reverse"
    task = _Task(fn, method, mode, tol, max_steps, differentiate, on_failure)
    if differentiate == "unroll":
        x, _ = task.solve(start, *args)
    else:
        x = implicit(Problem(task.slope, task.solve, task.linearise), start, *args)
    return (x, task.report) if full_output else x


class _Task:
    """One call: how its minimum is found, and what equation it satisfies."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        method: str,
        mode: Mode,
        tol: float | None,
        max_steps: int,
        differentiate: Differentiate,
        on_failure: OnFailure,
    ) -> None:
        self.squares = method in LEAST_SQUARES
        self.given, self.fn = fn, half_squares(fn) if self.squares else fn
        self.method, self.mode, self.tol, self.max_steps = method, mode, tol, max_steps
        self.differentiate, self.on_failure = differentiate, on_failure
        self.report: Stats | None = None
        self.probed = False

    # The start is an argument of the equation (on which it does not depend), so that torch.func can unwrap it.
    def slope(self, x: Tensor, start: Tensor, *args: Any) -> Tensor:
        """The equation: a gradient of zero."""
        return gradient(self.fn, x, args, self.mode)[1]

    def solve(self, start: Tensor, *args: Any) -> tuple[Tensor, Factors | None]:
        """The minimum, and its Hessian's factors where a dense Hessian is affordable."""
        bare = [plain(a) if isinstance(a, Tensor) else a for a in args]
        self._check(start, bare)
        objective = self._objective(args)
        step = METHODS[self.method](objective)
        x, stats = descend(objective, step, start, self.tol, self.max_steps)
        limit = default_tolerance(start) if self.tol is None else self.tol
        factors: Factors | None = None
        if self._dense(start):
            known = step.hessian if isinstance(step, Newton) and self.differentiate == "one_step" else None
            certificate = self._objective(bare)
            matrix = certificate.hessian(plain(x)) if known is None else known
            objective.jacobians += known is None
            definite = Definite(matrix)
            bad = stats.converged & ~definite.regular
            stats = stats._replace(status=torch.where(bad, Status.NOT_MINIMUM, stats.status))
            factors = definite.restrict(stats.converged)
        elif not bool(stats.converged.all()):
            factors = self._products(plain(x), bare, stats.converged)
        self.report = stats._replace(evaluations=objective.evaluations, jacobians=objective.jacobians)
        return settle(x, self.report, self.on_failure, f"minimize by {self.method}", limit), factors

    def linearise(self, x: Tensor, start: Tensor, *args: Any) -> Factors:
        """Factors of the Hessian, where those of `solve` do not apply."""
        return Definite(self._objective(args).hessian(x)) if self._dense(x) else self._products(x, args, None)

    def _dense(self, x: Tensor) -> bool:
        return self.method not in MATRIX_FREE or x.shape[-1] <= FORWARD_LIMIT

    def _objective(self, args: Sequence[Any]) -> Objective:
        if self.squares:
            return LeastSquares(self.fn, args, self.mode, self.given)
        return Objective(self.fn, args, self.mode)

    def _products(self, x: Tensor, args: Sequence[Any], good: Tensor | None) -> Factors:
        def product(v: Tensor) -> Tensor:
            g, tan = push(lambda u: gradient(self.fn, u, args, self.mode)[1], (x,), [Dense(v)])
            return dense_of(tan, g)  # type: ignore[return-value]

        return ConjugateGradients(product, x.shape[:-1], strict=self.on_failure == "raise", good=good)

    def _check(self, start: Tensor, args: Sequence[Any]) -> None:
        """What is wrong with ``fn`` whatever the method, found out at the start."""
        if self.probed:
            return
        self.probed = True
        value = self.fn(start, *args)
        if isinstance(value, DualTensor):
            raise DualInputError(
                "fn uses a DualTensor that is not among its arguments, so its tangent would be lost: pass it in args"
            )
        probe(self.fn, start, args, self.mode)
