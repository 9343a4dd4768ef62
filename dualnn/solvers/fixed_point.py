r"""Fixed points :math:`z^* = f(z^*, x, …)` for a batch, with implicit derivatives.

*Solve*: Anderson acceleration (type II): over the last m iterates, weights :math:`\alpha` that sum to 1 and minimise
:math:`\lVert \sum_i \alpha_i (f(z_i) - z_i) \rVert` give the next iterate :math:`\sum_i \alpha_i f(z_i)`;
m = 1 is Picard.

*Differentiate*: at the solution, :math:`(I - J)\,dz = f_x\,dx` with :math:`J = \partial f / \partial z` (implicit
function theorem). J is a block per sample, got from one dual pass of n directions shared by all samples; the iterations
are not differentiated, so their number costs no memory.

Reference:
    Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49, 2011;
    Bai, Kolter, Koltun, "Deep equilibrium models", 2019, arXiv 1909.01377.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge import floats, refuse_nested_jvp
from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.errors import ConvergenceError, DualInputError, StructureError
from dualnn.engine.tangents import Dense, Tangent, Zero
from dualnn.engine.transforms import dense_of, push

BLOCK_LIMIT = 2048


# Iterations with a data-dependent stop do not trace: one clean graph break instead.
@torch.compiler.disable
def fixed_point(
    fn: Callable[..., Tensor],
    x0: Tensor,
    args: Sequence[Any] = (),
    *,
    tol: float | None = None,
    max_steps: int = 200,
    memory: int = 5,
) -> Tensor:
    """Solve ``z = fn(z, *args)`` from ``z = x0``, sample by sample.

    Args:
        fn: Maps ``(B, n)`` (or ``(B, …)``) to itself; samples must not influence one another.
        x0: Where to start; its derivative does not matter to the solution.
        args: Further arguments. DualTensors, and tensors that require grad, are differentiated.
        tol: Largest entry of ``fn(z) - z`` at which a sample has converged; by default the square root of the
            dtype's precision, to the power 1.5 (float64: 1.8e-12, float32: 6e-6).
        max_steps: Evaluations of ``fn`` at most.
        memory: Iterates that Anderson acceleration combines; 1 is plain iteration.

    Returns:
        The solution, of ``x0``'s shape.

    Raises:
        ConvergenceError: Samples that did not converge, with their largest residual.
        StructureError: ``fn`` returns another shape, or mixes samples.
        DualInputError: A tolerance or number of steps that makes no sense; more than 2,048 unknowns a sample.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
        >>> z = fixed_point(lambda z, x: torch.cos(z) / 2 + x, torch.zeros(2, 1, dtype=torch.float64), (x,))
        >>> z.sum().backward()
        >>> bool((x.grad - 1 / (1 + torch.sin(z) / 2)).abs().max() < 1e-10)
        True
    """
    if x0.dim() < 2:
        raise DualInputError(f"x0 needs a batch axis and at least one more, got shape {tuple(x0.shape)}")
    if max_steps < 1 or memory < 1 or (tol is not None and tol < 0):
        raise DualInputError(f"max_steps and memory must be >= 1, tol >= 0: got {max_steps}, {memory}, {tol}")
    if x0.shape[1:].numel() > BLOCK_LIMIT:
        raise DualInputError(
            f"{x0.shape[1:].numel()} unknowns a sample: the block Jacobian is formed for at most {BLOCK_LIMIT}"
        )
    level = top_level((x0, *args))
    if level:
        return _on_duals(fn, x0, args, level, tol, max_steps, memory)
    refuse_nested_jvp()

    def cast(z: Tensor, *plain: Any) -> Tensor:
        y = fn(z, *plain)
        return y if y.dtype == z.dtype else y.to(z.dtype)  # autocast returns another precision than z's

    def solve(*plain: Any) -> Tensor:
        return anderson(lambda z: cast(z, *plain), x0.detach(), tol, max_steps, memory)

    return _FixedPoint.apply(solve, cast, *args)  # type: ignore[no-untyped-call]


def anderson(f: Callable[[Tensor], Tensor], z: Tensor, tol: float | None, max_steps: int, memory: int) -> Tensor:
    """Iterate to convergence; a sample that has converged is held."""
    limit = torch.finfo(z.dtype).eps ** 0.75 if tol is None else tol
    shape, batch = z.shape, len(z)
    past: list[tuple[Tensor, Tensor]] = []
    current = z.flatten(1)
    worst = current.new_zeros(batch)
    for _ in range(max_steps):
        value = f(current.reshape(shape))
        if value.shape != shape:
            raise StructureError(f"a fixed point needs fn(z) of z's shape {tuple(shape)}, got {tuple(value.shape)}")
        value = value.flatten(1)
        residual = value - current
        worst = residual.abs().amax(1) if residual.shape[1] else residual.new_zeros(batch)
        done = worst <= limit
        if bool(done.all()):
            return value.reshape(shape)
        past = [*past, (value, residual)][-memory:]
        with torch.autocast(z.device.type, enabled=False):
            following = _mixed(past)
        following = torch.where(torch.isfinite(following), following, value)
        current = torch.where(done.unsqueeze(1), current, following)
    lost = torch.nonzero(~(worst <= limit)).flatten().tolist()
    raise ConvergenceError(
        f"fixed point not reached in {max_steps} steps for {len(lost)} of {batch} samples (first: {lost[:8]}); largest "
        f"|fn(z) - z| is {float(worst[lost].max()):.3g}, tolerance {limit:.3g}. Raise max_steps or tol, or make fn "
        "contract (scale it down, spectral normalisation)."
    )


def _mixed(past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's combination: least squares on residual differences, per sample."""
    value, residual = past[-1]
    if len(past) == 1:
        return value
    wide = _wide(value)
    dr = torch.stack([residual - r for _, r in past[:-1]], 2).to(wide)
    dv = torch.stack([value - v for v, _ in past[:-1]], 2).to(wide)
    gram = dr.transpose(1, 2) @ dr
    # Nearly parallel differences make the Gram matrix singular: a relative ridge far below the tolerance.
    ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gamma, info = torch.linalg.solve_ex(
        gram + ridge[:, None, None] * eye, dr.transpose(1, 2) @ residual.unsqueeze(2).to(wide)
    )
    mixed = value - (dv @ gamma).squeeze(2).to(value.dtype)
    return torch.where((info == 0).unsqueeze(1), mixed, value)


def _wide(x: Tensor) -> torch.dtype:
    """The precision of the linear algebra: torch has none for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def block_jacobian(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Derivative of each sample's output in its own input, ``(B, n, n)``: n directions shared by the batch.

    Raises:
        StructureError: Samples influence one another (a further direction moves half of them only).
    """
    batch, n = len(z), z.shape[1:].numel()
    unit = torch.eye(n, dtype=z.dtype, device=z.device).reshape(n, 1, *z.shape[1:]).expand(n, *z.shape)
    half = torch.arange(batch, device=z.device) % 2 == 0
    probe = torch.ones_like(z.detach()) * half.reshape(-1, *(1,) * (z.dim() - 1))
    y, tan = push(fn, (z,), [Dense(torch.cat([unit, probe.unsqueeze(0)]))])
    columns = dense_of(tan, y)
    leak = columns[-1][~half].detach().abs()  # type: ignore[index]
    if leak.numel() and float(leak.max()) > 1e-6 * float(columns.detach().abs().max()):  # type: ignore[union-attr]
        raise StructureError("fn mixes samples (BatchNorm in training?): a fixed point is solved sample by sample")
    return columns[:-1].reshape(n, batch, n).permute(1, 2, 0)  # type: ignore[index]


def _implicit_matrix(fn: Callable, z: Tensor, args: Sequence[Any]) -> Tensor:
    jac = block_jacobian(lambda u: fn(u, *args), z).to(_wide(z))
    return torch.eye(jac.shape[1], dtype=jac.dtype, device=jac.device) - jac


def _on_duals(
    fn: Callable, x0: Tensor, args: Sequence[Any], level: int, tol: float | None, max_steps: int, memory: int
) -> Tensor:
    num = count(level, (x0, *args))
    parts = [split(a, level) for a in args]
    primals = [p for p, _ in parts]
    z = fixed_point(fn, split(x0, level)[0], primals, tol=tol, max_steps=max_steps, memory=memory)
    if all(t is None for _, t in parts):
        return make(z, Zero(num), level)
    y, tan = push(lambda *a: fn(z, *a), primals, [t for _, t in parts])
    return make(z, _solved(_implicit_matrix(fn, z, primals), tan, y), level)


def _solved(matrix: Tensor, tan: Tangent, y: Tensor) -> Tangent:
    """(I - J)^-1 applied to every direction of f(z*, x)."""

    def apply(t: Tensor) -> Tensor:
        columns = t.reshape(t.shape[0], *matrix.shape[:2], 1).to(matrix.dtype)
        return torch.linalg.solve(matrix, columns).reshape(t.shape).to(t.dtype)

    return tan.map(apply)


class _FixedPoint(torch.autograd.Function):
    """One node: backward solves with (I - J)^T, then pulls back through a single application of fn."""

    @staticmethod
    def forward(solve: Callable, fn: Callable, *args: Any) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return solve(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        _, fn, *args = inputs
        ctx.fn = fn
        ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
        tensors = [a for a in args if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def _saved(ctx: Any) -> tuple[list[Any], Tensor]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if c is None else c[0] for c in ctx.constants]
        return args, next(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        args, z = _FixedPoint._saved(ctx)
        higher = torch.is_grad_enabled()  # this backward is differentiated again: keep z and args in the graph
        matrix = _implicit_matrix(ctx.fn, z, args)
        flat = grad.reshape(*matrix.shape[:2], 1).to(matrix.dtype)
        v = torch.linalg.solve(matrix.transpose(1, 2), flat).reshape(grad.shape).to(grad.dtype)
        wanted = [i for i in floats(args) if ctx.needs_input_grad[i + 2]]
        with torch.enable_grad():
            inner = list(args)
            for i in wanted:
                # A fresh alias: z depends on the argument itself, and must count as constant here.
                inner[i] = args[i].view_as(args[i]) if higher else args[i].detach().requires_grad_()
            y = ctx.fn(z, *inner)
            grads = torch.autograd.grad(y, [inner[i] for i in wanted], v, create_graph=higher, allow_unused=True)
        out: list[Tensor | None] = [None] * len(args)
        for i, g in zip(wanted, grads, strict=True):
            out[i] = g
        return None, None, *out

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Tensor:  # noqa: D102
        args, z = _FixedPoint._saved(ctx)
        seeds: list[Tangent | None] = [None if t is None else Dense(t.unsqueeze(0)) for t in tangents]
        y, tan = push(lambda *a: ctx.fn(z, *a), args, seeds)
        return dense_of(_solved(_implicit_matrix(ctx.fn, z, args), tan, y), y)[0]  # type: ignore[index]
