r"""Roots of systems of equations, with implicit derivatives.

.. math:: F(x, p) = 0, \qquad \dot x = -F_x^{-1} F_p\,\dot p

A method finds x on plain tensors; the derivative is that of the solution (`solvers.implicit`), whatever the path to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, UnsupportedOpError, unknown_name
from dualnn.solvers.factors import LU, Factors, block_jacobian, same_shape
from dualnn.solvers.implicit import Problem, implicit, nested
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


METHODS: dict[str, Method] = {"newton": newton}


# Iterations with a data-dependent stop do not trace: one clean graph break instead.
@torch.compiler.disable
def root(
    fn: Callable[..., Tensor],
    x0: Tensor,
    args: Sequence[Any] = (),
    method: str = "newton",
    tol: float | None = None,
    full_output: bool = False,
    *,
    max_steps: int = 100,
    differentiate: Differentiate = "implicit",
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Solve ``fn(x, *args) = 0`` from ``x = x0``, differentiably in ``args``.

    K directions cost one evaluation of ``fn`` on duals and one back-substitution each, whatever the number of
    iterations; so does a backward pass. Roots may be nested in ``fn``, and derivatives of any order are exact.

    Args:
        fn: ``fn(x, *args)`` returns a residual of x's shape, sample by sample.
        x0: Where to start: ``(n,)`` for one system, ``(B, n)`` for B of them. Its derivative does not matter.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: ``"newton"``, with a backtracking line search.
        tol: Largest entry of the residual at which a sample is solved. None: as exactly as the dtype gives.
        full_output: Return ``(x, Stats)``.
        max_steps: Steps at most.
        differentiate: ``"implicit"``: the derivative of the solution, with a Jacobian taken there. ``"one_step"``: with
            the factors of the last step instead, which saves that Jacobian; its relative error is of the order of the
            last step's length (first derivatives only). ``"unroll"``: through every iteration, for comparison.
        on_failure: For samples without a solution: ``"raise"``, or give ``"nan"``, or the ``"last"`` iterate.

    Returns:
        The solution, of x0's shape; with ``full_output``, and its `Stats`.

    Raises:
        ConvergenceError: Samples that were not solved: which, why, the last residual, and what to do.
        StructureError: The residual has another shape or dtype than x0, or samples influence one another.
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
    start = check_start(x0, args, tol, max_steps, on_failure, differentiate)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    search = METHODS[method]
    limit = default_tolerance(start) if tol is None else tol
    report: list[Stats] = []
    unprobed = [True]  # the first Jacobian shows whether samples mix

    def block(equations: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Factors]:
        value, jacobian = block_jacobian(equations, x, probe=bool(unprobed))
        unprobed.clear()
        return value, LU(jacobian)

    def find(*rest: Any) -> tuple[Tensor, Factors | None]:
        def equations(x: Tensor) -> Tensor:
            return fn(x, *rest)

        same_shape(equations(start), start)
        x, stats, factors = search(equations, lambda x: block(equations, x), start, tol, max_steps)
        report[:] = [stats]
        return settle(x, stats, on_failure, f"root by {method}", limit), factors

    def linearise(x: Tensor, *rest: Any) -> Factors:
        return block(lambda u: fn(u, *rest), x)[1]

    if differentiate == "unroll":
        x, _ = find(*args)
    elif differentiate == "one_step":
        if nested(args):
            raise UnsupportedOpError("differentiate='one_step' gives first derivatives only: use 'implicit'")
        x = implicit(Problem(fn, find, linearise), *args)
    else:
        x = implicit(Problem(fn, lambda *rest: (find(*rest)[0], None), linearise), *args)
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
    if not isinstance(args, (tuple, list)):
        raise DualInputError(f"args must be a tuple of further arguments, got {type(args).__name__}: write args=(a,)")
    if max_steps < 1 or (tol is not None and not tol > 0):
        raise DualInputError(f"max_steps must be >= 1 and tol > 0, got {max_steps} and {tol}")
    if differentiate not in DIFFERENTIATE:
        raise unknown_name("differentiate", differentiate, DIFFERENTIATE)
    check_on_failure(on_failure)
    return primal_of(x0).detach()
