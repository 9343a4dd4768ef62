r"""The implicit function theorem as one differentiable node, to every order and in every mode.

A solution :math:`x(p)` of :math:`F(x, p) = 0` moves with its arguments as

.. math:: F_x\,\dot x + F_p\,\dot p = 0, \qquad \bar p = -F_p^T F_x^{-T} \bar x,

whatever found it: the iterations are not differentiated, so their number costs neither time nor memory here, and K
directions cost one back-substitution each with factors that the solver already has.

Higher orders come by recursion, not by formulas. The equation for :math:`\dot x` is itself a system, linear in
:math:`\dot x`, with the *same* factors and a residual that is one dual evaluation of F; so a nested dual, or autograd
over a dual, solves it by the same node. The transposed system of the backward pass likewise. What depends on the solver
is kept out: nothing here knows how x was found.

Reference:
    Griewank, Walther, "Evaluating Derivatives", 2008, chapter 15; Blondel et al., "Efficient and modular implicit
    differentiation", 2022, arXiv 2105.15183.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack, is_functorch_wrapped_tensor

from dualnn.engine.bridge import refuse_nested_jvp, save, saved
from dualnn.engine.dual_tensor import DualTensor, count, make, primal_of, split, top_level
from dualnn.engine.errors import TangentLostError
from dualnn.engine.tangents import Dense, Tangent, Zero
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.factors import Factors


class Problem:
    """A system of equations, how it is solved, and the factors of its Jacobian at the solution.

    Args:
        residual: ``residual(x, *args)`` of x's shape, zero at the solution; plain torch code.
        solve: ``solve(*args) -> (x, factors or None)`` on plain tensors, under ``no_grad``, by any code.
        linearise: ``linearise(x, *args) -> Factors`` of the residual's Jacobian in x, where ``solve`` gave none.
        cut: ``cut(x, *args)``: whether a residual that autograd finds to depend on nothing was cut from the graph.
            False: it may be constant, as the equations of a linear problem's derivative are.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        solve: Callable[..., tuple[Tensor, Factors | None]],
        linearise: Callable[..., Factors],
        cut: Callable[..., bool] | None = None,
    ) -> None:
        self.residual, self.solve, self._linearise, self._cut = residual, solve, linearise, cut
        self._known: tuple[Tensor, Factors] | None = None

    def run(self, *args: Any) -> Tensor:
        """Solve, and remember the factors."""
        with torch.no_grad():
            x, factors = self.solve(*args)
        if any(x is a for a in args):  # a start that was the solution: autograd's node must not return its input
            x = x.clone()
        self._known = None if factors is None else (x, factors)
        return x

    def factors(self, x: Tensor, args: Sequence[Any]) -> Factors:
        """Those of the solver if they belong to this solution (under ``torch.func`` they may not), else new ones."""
        if self._known is None or not _same(self._known[0], x):
            with torch.no_grad():
                self._known = x, self._linearise(x, *args)
        return self._known[1]

    def cut(self, x: Tensor, *args: Any) -> bool:
        """Whether the equations carry no graph."""
        if self._cut is not None:
            return self._cut(x, *args)
        with torch.enable_grad():
            return not self.residual(x.detach().requires_grad_(), *args).requires_grad

    def alone(self) -> Problem:
        """The same problem, without the factors."""
        return Problem(self.residual, self.solve, self._linearise, self._cut)


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b or get_interpreter_stack() or any(is_functorch_wrapped_tensor(t) for t in (a, b)):
        return a is b
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()


def implicit(problem: Problem, *args: Any) -> Tensor:
    """Solve, differentiably: for DualTensors of any level, autograd, and ``torch.func``.

    Args:
        problem: The system.
        *args: Arguments of its residual after the unknown; those that are not floating point tensors are constants.

    Returns:
        The solution: a tensor with one node of graph, or a DualTensor where an argument is one.
    """
    level = top_level(args)
    if not level:
        if not _recorded(args):
            return problem.run(*args)
        refuse_nested_jvp()
        return _Implicit.apply(problem, *args)  # type: ignore[no-untyped-call]
    num = count(level, args)
    parts = [split(a, level) for a in args]
    primals = [p for p, _ in parts]
    x = implicit(problem, *primals)
    present = [t for _, t in parts if t is not None]
    if not present or not num:
        return make(x, Zero(num), level)
    if not top_level((x, *primals)) and not _recorded((x, *primals, *(t.dense() for t in present))):
        y, tan = push(problem.residual, (x, *primals), [None, *(t for _, t in parts)])
        return make(x, _solved(problem.factors(x, primals), tan, num), level)
    t = implicit(_moved(problem, [t is not None for _, t in parts], num), x, *primals, *(t.dense() for t in present))
    return make(x, present[0].map(lambda _: t), level)


def _solved(factors: Factors, tan: Tangent, num: int) -> Tangent:
    return Zero(num) if tan.is_zero else tan.map(lambda d: -factors.solve(d))


def _moved(problem: Problem, moving: Sequence[bool], num: int) -> Problem:
    r"""The linear system :math:`F_x t + F_p \dot p = 0` for ``t: (K, *x.shape)``, as a function of (x, p, dp)."""
    count_args = len(moving)

    def unpack(rest: Sequence[Any]) -> tuple[Sequence[Any], list[Tangent | None]]:
        primals, dense = rest[:count_args], iter(rest[count_args:])
        return primals, [Dense(next(dense)) if m else None for m in moving]

    def residual(t: Tensor, x: Tensor, *rest: Any) -> Tensor:
        primals, tangents = unpack(rest)
        y, tan = push(problem.residual, (x, *primals), [Dense(t), *tangents])
        return dense_of(tan, y)  # type: ignore[return-value]

    def solve(x: Tensor, *rest: Any) -> tuple[Tensor, Factors]:
        primals, tangents = unpack(rest)
        y, tan = push(problem.residual, (x, *primals), [None, *tangents])
        factors = problem.factors(x, primals)
        return -factors.solve(dense_of(tan, y)), factors  # type: ignore[arg-type]

    return Problem(
        residual,
        solve,
        lambda t, x, *rest: problem.factors(x, unpack(rest)[0]),
        lambda t, x, *rest: problem.cut(x, *unpack(rest)[0]),
    )


class _Transposed:
    """Factors of the transposed Jacobian."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.solve, self.solve_transposed = factors.solve_transposed, factors.solve


def _adjoint(problem: Problem) -> Problem:
    r"""The linear system :math:`F_x^T v = g` for v, as a function of (g, x, p): what backward solves."""

    def residual(v: Tensor, g: Tensor, x: Tensor, *args: Any) -> Tensor:
        (pulled,) = _pulled(lambda u: problem.residual(u, *args), [x], v, create_graph=True)
        return (torch.zeros_like(g) if pulled is None else pulled) - g

    def solve(g: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Factors]:
        factors = problem.factors(x, args)
        return factors.solve_transposed(g), _Transposed(factors)

    return Problem(
        residual,
        solve,
        lambda v, g, x, *args: _Transposed(problem.factors(x, args)),
        lambda v, g, x, *args: problem.cut(x, *args),
    )


def _pulled(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    v: Tensor,
    create_graph: bool,
    cut: Callable[[], bool] = lambda: True,
) -> Sequence[Tensor | None]:
    """Cotangents of ``inputs`` (None: no dependence) from that of ``fn(*inputs)``, by one evaluation."""
    if get_interpreter_stack():  # torch.func's own levels: requires_grad_ has no meaning inside them
        return torch.func.vjp(fn, *inputs)[1](v)
    with torch.enable_grad():
        # Fresh aliases: what else depends on these tensors must count as constant here.
        fresh = [
            x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for x in map(primal_of, inputs)
        ]
        y = fn(*(_on(x, leaf) for x, leaf in zip(inputs, fresh, strict=True)))
        if top_level((y, v)):
            product = (y * v).sum()
            return [_component(product, leaf) for leaf in fresh]
        if not y.requires_grad:
            if not cut():
                return [None] * len(fresh)
            raise TangentLostError(
                "the equations carry no graph to backpropagate through: they run under no_grad, or detach what they "
                "compute. Differentiate forward (dualnn.jvp), or wrap the part that cuts the graph in "
                "dualnn.layers.Dual."
            )
        return torch.autograd.grad(y, fresh, v, create_graph=create_graph, allow_unused=True)


def _on(x: Tensor, leaf: Tensor) -> Tensor:
    """A dual of any levels with another plain value under it."""
    return make(_on(x._primal, leaf), x._tan, x._level) if isinstance(x, DualTensor) else leaf


def _component(product: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a dual scalar in the plain value under a dual: that of its primal, and of every tangent."""
    if isinstance(product, DualTensor):
        num, rows = product._tan.num, [] if product._tan.is_zero else product._tan.dense().unbind(0)
        tan = Dense(torch.stack([_component(row, leaf) for row in rows])) if rows else Zero(num)
        return make(_component(product._primal, leaf), tan, product._level)
    if not product.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(product, leaf, create_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


def _recorded(args: Sequence[Any]) -> bool:
    """Whether somebody differentiates or vectorises these plain arguments."""
    if get_interpreter_stack() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


class _Implicit(torch.autograd.Function):
    """One node: backward solves the transposed system, then pulls back through one evaluation of the residual."""

    @staticmethod
    def forward(problem: Problem, *args: Any) -> Tensor:  # noqa: D102
        return problem.run(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        ctx.problem, *args = inputs
        save(ctx, args, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        args, (x,) = saved(ctx)
        problem: Problem = ctx.problem
        if torch.is_grad_enabled() or get_interpreter_stack():  # differentiated again: v moves with x and the arguments
            v = implicit(_adjoint(problem), grad, x, *args)
        else:
            x = x.detach()
            v = problem.factors(x, args).solve_transposed(grad)
        wanted = [
            i for i, a in enumerate(args) if ctx.needs_input_grad[i + 1] and (a.is_floating_point() or a.is_complex())
        ]

        def moved(*chosen: Tensor) -> Tensor:
            inner = list(args)
            for i, a in zip(wanted, chosen, strict=True):
                inner[i] = a
            return problem.residual(x, *inner)

        # The user's own equations must depend on what they are differentiated in; derived ones need not.
        cut = (lambda: True) if problem._cut is None else (lambda: problem.cut(x, *args))
        grads = _pulled(moved, [args[i] for i in wanted], -v, torch.is_grad_enabled(), cut)
        out: list[Tensor | None] = [None] * len(args)
        for i, g in zip(wanted, grads, strict=True):
            out[i] = g
        return None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> Tensor:  # noqa: D102
        args, (x,) = saved(ctx)
        present = [t.unsqueeze(0) for t in tangents if t is not None]
        # A node of its own: torch.vmap over this unwraps what the solver sees.
        return implicit(_moved(ctx.problem, [t is not None for t in tangents], 1), x, *args, *present)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, problem: Problem, *args: Any) -> tuple[Tensor, int]:  # noqa: D102
        rows = []
        for b in range(info.batch_size):
            one = [a if d is None else a.select(d, b) for a, d in zip(args, in_dims[1:], strict=True)]
            rows.append(_Implicit.apply(problem.alone(), *one))  # type: ignore[no-untyped-call]
        return torch.stack(rows), 0


def nested(args: Sequence[Any]) -> bool:
    """Whether more than one derivative is being taken: duals of two levels, or autograd over duals."""
    level = top_level(args)
    if not level:
        return False
    below: list[Any] = []
    for a in args:
        primal, tan = split(a, level)
        below += [primal] if tan is None else [primal, tan.dense()]
    return bool(top_level(below)) or _recorded(below)
