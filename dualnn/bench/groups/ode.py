"""A stiff initial value problem with the sensitivities of its parameters, at equal achieved error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualnn.bench.benchmark import Arm, Benchmark, Group, Run, Settings
from dualnn.bench.ivp import PROBLEMS, robertson
from dualnn.bench.peers import require, the_jax
from dualnn.engine import jvp
from dualnn.engine.errors import DualnnError
from dualnn.solvers import odeint

TARGET = 1e-6
LADDER = [10.0 ** (-k / 2) for k in range(6, 25)]
ATOL = 1e-6  # of rtol: the smallest species is of size 1e-5
NOTE = (
    "Robertson's problem to t = {end:g} with the sensitivities of its three rates; float64. Every arm has the loosest "
    "of the relative tolerances 1e-3, 10^-3.5, ... at which its largest relative error, over states and "
    "sensitivities, is below {target:g}; the remark says which, and the error. scipy gets the variational equations: "
    "in numpy and without their Jacobian, as one writes them, or, tuned, in Python's floats with an exact one by hand."
)


class Inaccurate(DualnnError, RuntimeError):
    """No tolerance of the ladder reaches the accuracy that is asked for."""


class AtEqualError:
    """A solver at the loosest tolerance whose achieved error is below the target.

    Args:
        solve: ``rtol -> (y, dy)``, the states ``(B, 3)`` and sensitivities ``(3, B, 3)``.
        truth: The same, exact.
        target: Largest relative error of any number.
    """

    def __init__(self, solve: Callable[[float], tuple[Any, Any]], truth: tuple[Tensor, Tensor], target: float) -> None:
        self.solve = solve
        for self.rtol in LADDER:
            error = max(_error(mine, exact) for mine, exact in zip(solve(self.rtol), truth, strict=True))
            if error <= target:
                self.remark = f"rtol {self.rtol:.1g}, error {error:.1g}"
                return
        raise Inaccurate(f"error {error:.2g} at rtol {self.rtol:.2g}")

    def __call__(self) -> dict[str, Any]:
        """Solve."""
        y, dy = self.solve(self.rtol)
        return {"y": y, "dy": dy}


def _error(mine: Any, exact: Tensor) -> float:
    return float(((torch.as_tensor(mine).cpu() - exact) / exact).abs().max())


def sensitivities(sets: int, settings: Settings) -> Benchmark:
    """One or many sets of rates."""
    end, target = (0.4, 1e-3) if settings.quick else (40.0, TARGET)
    spread = torch.rand(sets, 3, dtype=torch.float64, generator=settings.generator())
    p = PROBLEMS["robertson"].p * (1 + 0.2 * (spread if sets > 1 else torch.zeros(1, 3)))
    truth = _ours("radau", p, end, {"sensitivities": True})(1e-8 if settings.quick else 1e-12)
    on_device = p.to(settings.device)

    def arm(method: str, **options: Any) -> Callable[[], Run]:
        return lambda: AtEqualError(_ours(method, on_device, end, options), truth, target)

    def peer(build: Callable[[Tensor, float, Settings], Any], compiled: bool = False) -> Arm:
        return Arm(lambda: AtEqualError(build(p, end, settings), truth, target), "peer", compiled)

    arms = {
        "radau": Arm(arm("radau"), "ours"),
        "rodas5p": Arm(arm("rodas5p"), "ours"),
        "bdf": Arm(arm("bdf"), "ours"),
    }
    if not settings.quick:
        arms["rodas5p compiled"] = Arm(arm("rodas5p", compile=True), "ours", compiled=True)
    if sets == 1:
        for method in ("Radau", "BDF"):
            arms[f"scipy {method}"] = peer(partial(_scipy, method, False))
            arms[f"scipy {method} tuned"] = peer(partial(_scipy, method, True))
    arms["CVODES"] = peer(_cvodes)
    arms["diffrax Kvaerno5"] = peer(_diffrax, compiled=True)
    reference = "scipy Radau" if sets == 1 else "diffrax Kvaerno5"
    note = NOTE.format(end=end, target=target)
    if sets > 1:
        note += " CVODES solves the sets one by one."
    return Benchmark("ode", "robertson", {"sets": sets, "K": 3}, arms, reference, 2 * target, note)


def _ours(method: str, p: Tensor, end: float, options: dict[str, Any]) -> Callable[[float], tuple[Tensor, Tensor]]:
    one = len(p) == 1
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=p.dtype, device=p.device).expand(len(p), 3).contiguous()
    t = torch.tensor([0.0, end], dtype=p.dtype, device=p.device)
    seeds = torch.eye(3, dtype=p.dtype, device=p.device)[:, None].expand(3, *p.shape)
    if one:
        y0, p, seeds = y0[0], p[0], seeds[:, 0]

    def solve(rtol: float) -> tuple[Tensor, Tensor]:
        y, dy = jvp(lambda p: odeint(robertson, y0, t, (p,), method, rtol, rtol * ATOL, options)[-1], (p,), (seeds,))
        return (y[None], dy[:, None]) if one else (y, dy)

    return solve


_FLOWS = ((-1.0, 1.0, 0.0), (1.0, -1.0, -1.0), (0.0, 0.0, 1.0))  # of the three reactions into the three species


def _scipy(method: str, tuned: bool, p: Tensor, end: float, settings: Settings) -> Callable[[float], tuple[Any, Any]]:
    """The variational equations beside the states: as one writes them, or in Python's floats with their Jacobian."""
    import numpy as np

    solve_ivp: Any = require("scipy.integrate").solve_ivp
    p1, p2, p3 = p[0].tolist()
    flows = np.array(_FLOWS)

    def plain(t: float, z: Any) -> Any:
        (y1, y2, y3), s = z[:3], z[3:].reshape(3, 3)
        own = np.array([y1, y2 * y3, y2 * y2])
        inner = flows @ np.array([[p1, 0, 0], [0, p2 * y3, p2 * y2], [0, 2 * p3 * y2, 0]])
        rates = np.array([p1, p2, p3])
        return np.concatenate([flows @ (rates * own), (s @ inner.T + (flows * own).T).ravel()])

    def fast(t: float, z: Any) -> list[float]:
        y1, y2, y3, *s = z.tolist()
        a, b, c = p1 * y1, p2 * y2 * y3, p3 * y2 * y2
        out = [b - a, a - b - c, c]
        own = ((y1, 0.0, 0.0), (0.0, y2 * y3, 0.0), (0.0, 0.0, y2 * y2))
        for k in range(3):
            s1, s2, s3 = s[3 * k : 3 * k + 3]
            da, db, dc = p1 * s1 + own[k][0], p2 * (y3 * s2 + y2 * s3) + own[k][1], 2 * p3 * y2 * s2 + own[k][2]
            out += [db - da, da - db - dc, dc]
        return out

    def jacobian(t: float, z: Any) -> Any:
        _, y2, y3, *s = z.tolist()
        whole = np.zeros((12, 12))
        inner = flows @ np.array([[p1, 0, 0], [0, p2 * y3, p2 * y2], [0, 2 * p3 * y2, 0]])
        whole[:3, :3] = inner
        own = (
            [[1.0, 0, 0], [0, 0, 0], [0, 0, 0]],
            [[0, 0, 0], [0, y3, y2], [0, 0, 0]],
            [[0] * 3, [0] * 3, [0, 2 * y2, 0]],
        )
        for k in range(3):
            _, s2, s3 = s[3 * k : 3 * k + 3]
            rows = slice(3 * k + 3, 3 * k + 6)
            whole[rows, rows] = inner
            whole[rows, :3] = flows @ (np.array(own[k]) + [[0, 0, 0], [0, p2 * s3, p2 * s2], [0, 2 * p3 * s2, 0]])
        return whole

    # The sensitivities' own sizes differ as their parameters do.
    sizes = np.concatenate([np.ones(3), np.repeat([1 / p1, 1 / p2, 1 / p3], 3)])
    start = [1.0] + [0.0] * 11

    def solve(rtol: float) -> tuple[Any, Any]:
        found = solve_ivp(
            fast if tuned else plain, (0.0, end), start, method=method, rtol=rtol, atol=rtol * ATOL * sizes,
            jac=jacobian if tuned else None, t_eval=[end],
        )  # fmt: skip
        z = found.y[:, -1]
        return z[None, :3], z[3:].reshape(3, 1, 3)

    return solve


def _cvodes(p: Tensor, end: float, settings: Settings) -> Callable[[float], tuple[Any, Any]]:
    """SUNDIALS' CVODES by casadi, one call a set."""
    import numpy as np

    casadi: Any = require("casadi")
    x, rates = casadi.MX.sym("x", 3), casadi.MX.sym("p", 3)
    a, b, c = rates[0] * x[0], rates[1] * x[1] * x[2], rates[2] * x[1] ** 2
    system = {"x": x, "p": rates, "ode": casadi.vertcat(b - a, a - b - c, c)}
    start, seeds, zeros, sets = np.array([1.0, 0, 0]), np.eye(3), np.zeros((3, 3)), p.numpy()
    known: dict[float, tuple[Any, Any]] = {}

    def solve(rtol: float) -> tuple[Any, Any]:
        if rtol not in known:
            options = {"reltol": rtol, "abstol": rtol * ATOL, "fsens_err_con": True, "max_num_steps": 100_000}
            value = casadi.integrator("value", "cvodes", system, 0, end, options)
            states = np.stack([np.array(value(x0=start, p=q)["xf"]).ravel() for q in sets])
            known[rtol] = states, value.forward(3)
        # Integrates states and sensitivities, and returns these only: a second call for the states is not counted.
        states, forward = known[rtol]
        dy = [forward(x0=start, p=q, out_xf=y, fwd_x0=zeros, fwd_p=seeds) for q, y in zip(sets, states, strict=True)]
        return states, np.stack([np.array(d["fwd_xf"]).T for d in dy], 1)

    return solve


def _diffrax(p: Tensor, end: float, settings: Settings) -> Callable[[float], tuple[Any, Any]]:
    """vmap over the sets of jvp over three directions, jitted with the tolerance as an argument."""
    jax = the_jax(settings)
    diffrax: Any = require("diffrax")
    numpy = jax.numpy

    def rhs(t: Any, y: Any, p: Any) -> Any:
        a, b, c = p[0] * y[0], p[1] * y[1] * y[2], p[2] * y[1] ** 2
        return numpy.stack([b - a, a - b - c, c])

    def final(p: Any, rtol: Any) -> Any:
        control = diffrax.PIDController(rtol=rtol, atol=rtol * ATOL)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(rhs), diffrax.Kvaerno5(), 0.0, end, None, numpy.array([1.0, 0.0, 0.0]), p,
            stepsize_controller=control, max_steps=100_000, adjoint=diffrax.ForwardMode(),
        ).ys[0]  # fmt: skip

    def one(p: Any, rtol: Any) -> Any:
        seeds = numpy.eye(3)
        y, dy = jax.vmap(lambda s: jax.jvp(lambda p: final(p, rtol), (p,), (s,)))(seeds)
        return y[0], dy

    call = jax.jit(jax.vmap(one, in_axes=(0, None), out_axes=(0, 1)))
    array = numpy.asarray(p.numpy())

    def solve(rtol: float) -> tuple[Any, Any]:
        import numpy as np

        y, dy = jax.block_until_ready(call(array, rtol))
        return np.array(y), np.array(dy)

    return solve


def _benchmarks(settings: Settings) -> list[Benchmark]:
    return [sensitivities(sets, settings) for sets in ((1,) if settings.quick else (1, 256))]


ODE = Group("stiff initial value problems with sensitivities", ("robertson",), _benchmarks)
