"""What `odeint` refuses before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.solvers.ode.control import Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.options import Options


def check_types(y0: Any, t: Any, args: Any, jac: Any) -> None:
    """Raise where start, times, arguments or Jacobian are none."""
    if jac is not None and not callable(jac):
        raise DualInputError(f"jac must be a function jac(t, y, *args), got {type(jac).__name__}")
    for name, x in (("y0", y0), ("t", t)):
        if not isinstance(x, Tensor):
            raise DualInputError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not isinstance(args, (tuple, list)):
        raise DualInputError(f"args must be a tuple of further arguments, got {type(args).__name__}: write args=(a,)")


def check_problem(y0: Tensor, t: Tensor) -> None:
    """Raise where start or times make no sense."""
    for name, x in (("y0", y0), ("t", t)):
        complex_too = " (or complex of their sizes)" if name == "y0" else ""
        if x.dtype not in (torch.float32, torch.float64, *((torch.complex64, torch.complex128) if complex_too else ())):
            raise DualInputError(f"{name} must be float32 or float64{complex_too}, got {x.dtype}: convert it")
        if not bool(torch.isfinite(primal_of(x)).all()):
            raise DualInputError(f"{name} holds values that are nan or infinite")
    if y0.dim() not in (1, 2) or y0.numel() == 0:
        raise DualInputError(f"y0 must be (n,) for one system or (B, n) for B of them: got {tuple(y0.shape)}")
    if t.dtype != y0.dtype.to_real() or t.device != y0.device:
        like = "y0.real" if y0.is_complex() else "y0"
        raise DualInputError(f"t is {t.dtype} on {t.device}, y0 is {y0.dtype} on {y0.device}: write t.to({like})")
    if t.dim() != 1 or t.numel() == 0:
        raise DualInputError(f"t must be (T,), the start and the times asked for, got {tuple(t.shape)}")
    gaps = primal_of(t).detach().diff()
    if len(gaps) and not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        bad = int(torch.nonzero(gaps * gaps[0] <= 0)[0])
        raise DualInputError(
            f"t must increase or decrease without repetition: t[{bad}] = {float(primal_of(t)[bad]):.9g} is followed by "
            f"{float(primal_of(t)[bad + 1]):.9g}. Sort it, and drop what is repeated."
        )


def tolerance(rtol: float | Tensor, atol: float | Tensor, y: Tensor, options: Options) -> Tolerance:
    """What was asked for, if the dtype can give it; for a complex ``y``, of real and imaginary parts."""
    parts = []
    for name, value in (("rtol", rtol), ("atol", atol)):
        x = torch.as_tensor(value, dtype=y.dtype.to_real(), device=y.device)
        if x.dim() and x.shape != y.shape[-1:]:
            raise DualInputError(f"{name} must be a number or ({y.shape[-1]},), one a component: got {tuple(x.shape)}")
        if not bool((x > 0).all()):
            raise DualInputError(
                f"{name} must be > 0, got {float(x.min()):.3g}"
                + (": a component that passes through 0 has no relative accuracy" if name == "atol" else "")
            )
        parts.append(x.repeat_interleave(2) if x.dim() and y.is_complex() else x)
    least = 10 * torch.finfo(y.dtype).eps
    if float(parts[0].min()) < least:
        raise DualInputError(
            f"rtol = {float(parts[0].min()):.3g} is below what {y.dtype} can give, {least:.2g}: raise it"
            + (", or use float64" if y.dtype.to_real() == torch.float32 else "")
        )
    return Tolerance(parts[0], parts[1], options.norm)


def check_use(y0: Tensor, method: str, explicit: bool) -> None:
    """Raise where a Jacobian given by the user cannot be used."""
    if explicit:
        raise DualInputError(f"method={method!r} is explicit and uses no Jacobian: leave jac out")
    if y0.is_complex():
        raise DualInputError(
            "jac is for real states: a complex system is integrated in its real and imaginary parts, whose Jacobian a "
            "complex matrix gives only for a holomorphic fn. Leave jac out."
        )


def check_jacobian(field: Field, t: Tensor, y: Tensor) -> None:
    """Raise where a Jacobian given by the user is not that of the right-hand side.

    Compared at a point a little off the start, where entries that vanish by chance at the start do not.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(y.shape, dtype=y.dtype, generator=generator).to(y.device)
    near = y + torch.finfo(y.dtype).eps ** 0.25 * noise * torch.clamp_min(y.abs(), 1e-3)
    exact = field.at(field.args).linearise(t, near)[1]
    given = field.linearise(t, near)[1]
    info, size = torch.finfo(y.dtype), exact.abs().amax((-2, -1), keepdim=True)
    slack = info.eps**0.5 * torch.maximum(exact.abs(), given.abs()) + 1e3 * info.eps * size + info.tiny
    wrong = ~((given - exact).abs() <= slack) & torch.isfinite(exact)
    if bool(wrong.any()):
        where = torch.nonzero(wrong)[0].tolist()
        raise StructureError(
            f"jac disagrees with fn's derivative at {int(wrong.sum())} of {wrong.numel()} entries: at {where} near the "
            f"start it is {float(given[tuple(where)]):.9g}, fn's is {float(exact[tuple(where)]):.9g}. "
            "jac(t, y, *args)[..., i, j] is the derivative of fn's component i in y's component j."
        )
