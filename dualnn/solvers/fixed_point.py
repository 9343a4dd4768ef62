r"""Fixed points :math:`z^* = f(z^*, x, …)` for a batch, with implicit derivatives.

A fixed point is a root of :math:`F(z, x) = z - f(z, x)`, so that

.. math:: (I - J)\,\dot z = f_x\,\dot x, \qquad J = \partial f / \partial z,

at the solution (`solvers.implicit`); the iterations are not differentiated, and their number costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.autocast import as_now
from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, StructureError, UnsupportedOpError, unknown_name
from dualnn.solvers.anderson import anderson
from dualnn.solvers.factors import Factors
from dualnn.solvers.implicit import Problem, implicit, nested
from dualnn.solvers.jacobians import choose
from dualnn.solvers.newton import default_tolerance
from dualnn.solvers.root import DIFFERENTIATE, Differentiate
from dualnn.solvers.stats import OnFailure, Stats, check_on_failure, settle

BLOCK_LIMIT = 2048  # unknowns a sample above which the Jacobian is not formed unless asked for
METHODS = ("anderson", "picard")
ADVICE = " Or make fn contract (scale it down, spectral normalisation)."


class Unit:
    """The identity instead of I - J: one step of the iteration is differentiated, and no more."""

    def solve(self, rhs: Tensor) -> Tensor:
        """The right-hand side."""
        return rhs

    solve_transposed = solve


# Iterations with a data-dependent stop do not trace: one clean graph break instead.
@torch.compiler.disable
def fixed_point(
    fn: Callable[..., Tensor],
    x0: Tensor,
    args: Sequence[Any] = (),
    method: str = "anderson",
    tol: float | None = None,
    full_output: bool = False,
    *,
    max_steps: int = 200,
    memory: int = 5,
    jacobian: str | Callable[..., Tensor] | None = None,
    differentiate: Differentiate = "implicit",
    on_failure: OnFailure = "raise",
) -> Any:
    r"""Solve ``z = fn(z, *args)`` from ``z = x0``, sample by sample, differentiably in ``args``.

    Args:
        fn: Maps ``(B, n)`` (or ``(B, …)``) to itself; samples must not influence one another.
        x0: Where to start; its derivative does not matter to the solution.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        method: ``"anderson"`` (acceleration), or ``"picard"`` (plain iteration).
        tol: Largest entry of ``fn(z) - z`` at which a sample has converged; by default the dtype's precision to the
            power 3/4 (float64: 1.8e-12, float32: 6.4e-6).
        full_output: Return ``(z, Stats)``.
        max_steps: Evaluations of ``fn`` at most.
        memory: Iterates that Anderson acceleration combines; 1 is plain iteration.
        jacobian: How the derivative solves with :math:`I - J`: ``"dense"``, a block per sample; ``"krylov"``, never
            formed; or a callable ``jacobian(z, *args) -> (B, n, n)`` of :math:`I - J`. None: dense up to 2,048 unknowns
            a sample, Krylov above.
        differentiate: ``"implicit"``, exact. ``"one_step"``: the derivative of one application of fn at the solution,
            which solves no system: :math:`\dot z \approx f_x \dot x`, with a relative error of about the contraction
            factor :math:`\rho = \lVert J \rVert` (first derivatives only). ``"unroll"``: through every iteration, for
            comparison.
        on_failure: For samples that do not converge: ``"raise"``, or give ``"nan"``, or the ``"last"`` iterate.

    Returns:
        The solution, of ``x0``'s shape; with ``full_output``, and its `Stats`.

    Raises:
        ConvergenceError: Samples that did not converge: which, why, the last residual, and what to do.
        StructureError: ``fn`` returns another shape, or mixes samples.
        DualInputError: A tolerance or number of steps that makes no sense.

    Reference:
        Walker, Ni, "Anderson acceleration for fixed-point iterations", 2011; Bai, Kolter, Koltun, "Deep equilibrium
        models", 2019, arXiv 1909.01377. One-step differentiation: Bolte, Pauwels, Vaiter, 2023, arXiv 2305.13768.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
        >>> z = fixed_point(lambda z, x: torch.cos(z) / 2 + x, torch.zeros(2, 1, dtype=torch.float64), (x,))
        >>> z.sum().backward()
        >>> bool((x.grad - 1 / (1 + torch.sin(z) / 2)).abs().max() < 1e-10)
        True
    """
    start = _check(x0, method, tol, max_steps, memory, differentiate, on_failure)
    shape, flat = start.shape, start.reshape(len(start), start.shape[1:].numel())
    limit = default_tolerance(start) if tol is None else tol
    kind = jacobian or ("dense" if flat.shape[1] <= BLOCK_LIMIT else "krylov")
    linear = choose(kind, strict=on_failure == "raise")
    report: list[Stats] = []

    def cast(z: Tensor, *rest: Any) -> Tensor:
        y = fn(z.reshape(z.shape[0], *shape[1:]), *rest)
        if not isinstance(y, Tensor) or y.shape != shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise StructureError(f"a fixed point needs fn(z) of z's shape {tuple(shape)}, got {got}")
        return y.reshape(z.shape).to(z.dtype)  # autocast returns another precision than z's

    same = as_now(cast, start.device.type)

    # The start is an argument as well, so that torch.func's transforms unwrap it.
    def residual(z: Tensor, start: Tensor, *rest: Any) -> Tensor:
        return z - same(z, *rest)

    def find(start: Tensor, *rest: Any) -> tuple[Tensor, Factors | None]:
        steps = memory if method == "anderson" else 1
        z, stats = anderson(lambda z: same(z, *rest), start, limit, max_steps, steps)
        report[:] = [stats]
        z = settle(z, stats, on_failure, f"fixed point by {method}", limit, ADVICE)
        return z, Unit() if differentiate == "one_step" else None

    def linearise(z: Tensor, start: Tensor, *rest: Any) -> Factors:
        if differentiate == "one_step":
            return Unit()
        return linear(lambda u, *rest: residual(u, start, *rest), z, rest, True)[1]

    if differentiate == "unroll":
        z, _ = find(flat, *args)
    else:
        if differentiate == "one_step" and nested(args):
            raise UnsupportedOpError("differentiate='one_step' gives first derivatives only: use 'implicit'")
        z = implicit(Problem(residual, find, linearise), flat, *args)
    z = z.reshape(shape)
    return (z, report[0]) if full_output else z


def _check(
    x0: Any, method: str, tol: float | None, max_steps: int, memory: int, differentiate: str, on_failure: str
) -> Tensor:
    if not isinstance(x0, Tensor) or not x0.dtype.is_floating_point:
        got = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise DualInputError(f"x0 must be a floating point tensor, got {got}")
    if x0.dim() < 2:
        raise DualInputError(f"x0 needs a batch axis and at least one more, got shape {tuple(x0.shape)}")
    if max_steps < 1 or memory < 1 or (tol is not None and not tol >= 0):
        raise DualInputError(f"max_steps and memory must be >= 1, tol >= 0: got {max_steps}, {memory}, {tol}")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if differentiate not in DIFFERENTIATE:
        raise unknown_name("differentiate", differentiate, DIFFERENTIATE)
    check_on_failure(on_failure)
    return primal_of(x0).detach()
