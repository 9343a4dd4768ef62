"""Elementwise roots of increasing functions: Newton's method that cannot leave its bracket.

Shared by the activations that solve an equation (`implicit_tanh`, `kepler`). It is value-only code: in place,
under `no_grad`, with a stop that depends on the data. Derivatives come from the implicit function theorem at
the solution (`dualnn.engine.bridge.Equation`), never from these iterations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, DualInputError

#: A residual counts as zero below ROUNDING * eps * (sum of the absolute values of its terms): evaluating three
#: terms, one of them a transcendental function good to about an ulp, cannot do better than this.
ROUNDING = 4.0

#: Plain Newton steps between two looks at the residual, and how many of them before the bracket takes over.
ROUND, PLAIN_STEPS = 4, 12

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def increasing_root(
    evaluate: Evaluate,
    lower: Tensor,
    upper: Tensor,
    start: Tensor,
    tol: float | None = None,
    max_steps: int = 100,
    name: str = "increasing_root",
    newton: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Solve f(y) = 0 for every entry, f increasing with a root in [lower, upper].

    A step is Newton's, y - f / f', if it stays inside the bracket and the last step at least halved abs(f);
    otherwise the bracket is bisected, so that no start can make it fail. An entry whose residual is down to
    rounding is frozen. Entries whose residual is NaN (a NaN input, an infinite one) keep their start and stop
    nobody else.

    The bracket costs several times a Newton step. Where plain Newton is known to climb or fall monotonically to the
    root, `newton` runs first, and the bracket only has the last word: it judges the result and repairs what plain steps
    left unsolved.

    Args:
        evaluate: y -> (f, f', size), size the sum of the absolute values of f's terms (the scale of its rounding).
        lower: Lower ends of the brackets.
        upper: Upper ends of the brackets.
        start: First guesses, of the same shape.
        tol: Stop once abs(f) <= tol * size everywhere. None takes 4 eps of the dtype. 0 never stops early: exactly
            `max_steps` steps run, and no error is raised.
        max_steps: Number of steps after which to give up.
        name: What to call the solver in an error.
        newton: Overwrites y by y - f / f', in place; only for an f whose Newton steps from `start` are monotone.

    Shape:
        lower, upper, start: (*) -> y: (*).

    Raises:
        ConvergenceError: Some entry has not reached the tolerance after `max_steps` steps.
        DualInputError: `tol` is negative or `max_steps` is not at least 1.

    Example:
        >>> x = torch.tensor([8.0, 27.0])
        >>> increasing_root(lambda y: (y**3 - x, 3 * y * y, y**3 + x), 0 * x, x, x)
        tensor([2., 3.])
    """
    if (tol is not None and not tol >= 0) or max_steps < 1:
        raise DualInputError(f"{name}: need tol >= 0 (or None) and max_steps >= 1, got {tol=} and {max_steps=}")
    floor = ROUNDING * torch.finfo(start.dtype).eps
    goal = floor if tol is None else tol
    frozen = max(goal, floor)
    y, lower, upper = start.clone(), lower.clone(), upper.clone()
    last = torch.full_like(y, torch.inf)
    taken = 0
    if newton is not None:
        # At least one step is left to the bracket; with tol = 0 nothing is looked at on the way.
        plain = max_steps - 1 if goal == 0 else min(max_steps - 1, PLAIN_STEPS)
        while taken < plain:
            for _ in range(min(ROUND, plain - taken)):
                newton(y)
                taken += 1
            if goal > 0 and _solved(evaluate, y, frozen):
                break
        # Infinite inputs have no Newton step, and a point outside would spoil the bracket: back to their start.
        torch.where((y >= lower) & (y <= upper), y, start, out=y)
    for _ in range(max_steps - taken):
        f, slope, size = evaluate(y)
        unsolved = f.abs() > frozen * size  # False for NaN
        if goal > 0 and not bool(unsolved.any()):
            return y
        torch.where(f < 0, y, lower, out=lower)
        torch.where(f > 0, y, upper, out=upper)
        step = y - f / slope
        slow = f.abs() > last / 2
        bisect = ~((step >= lower) & (step <= upper)) | slow
        torch.where(bisect, lower + (upper - lower) / 2, step, out=step)
        # After a bisection Newton gets another try: at worst the bracket halves every second step.
        last = f.abs().masked_fill_(bisect, torch.inf)
        torch.where(unsolved, step, y, out=y)
    if goal > 0:
        f, _, size = evaluate(y)
        unsolved = f.abs() > frozen * size
        if bool(unsolved.any()):
            worst = f.abs()[unsolved].max().item()
            raise ConvergenceError(
                f"{name}: {int(unsolved.sum())} of {y.numel()} entries did not converge in {max_steps} steps (worst "
                f"residual {worst:.3g}, tol {frozen:.3g} relative to the equation's terms, {y.dtype}). "
                "Raise max_steps, loosen tol, or compute in float64."
            )
    return y


def _solved(evaluate: Evaluate, y: Tensor, frozen: float) -> bool:
    """Whether every residual is down to the tolerance (a NaN counts as solved, as in the bracketed steps)."""
    f, _, size = evaluate(y)
    return not bool((f.abs_() > size.mul_(frozen)).any())
