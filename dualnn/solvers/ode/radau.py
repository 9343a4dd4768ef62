r"""Radau IIA of order 5: collocation at three points, the last one the end of the step.

.. math:: z_i = h \sum_j a_{ij} f(t_n + c_j h,\; y_n + z_j), \qquad y_{n+1} = y_n + z_3.

Values come from Newton's method with the Jacobian of the step's start, in the coordinates in which :math:`A^{-1}` is
diagonal: one real and one complex matrix of size n. The derivative of the step solves the stage equations' own
linearisation, **with the Jacobian at every stage**: with one Jacobian for all of them the tangents are wrong by
percents while the values stay right.

Reference:
    Hairer, Wanner, "Solving Ordinary Differential Equations II", 1996, section IV.8; step-size prediction: Gustafsson,
    "Control-theoretic techniques for stepsize selection in implicit Runge-Kutta methods", 1994.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, make, primal_of
from dualnn.engine.tangents import Dense
from dualnn.solvers.factors import LU
from dualnn.solvers.implicit import Problem, implicit
from dualnn.solvers.ode.along import along, apart
from dualnn.solvers.ode.control import Controller, Tolerance
from dualnn.solvers.ode.field import Field
from dualnn.solvers.ode.method import Carry, Others, State, Trial
from dualnn.solvers.ode.newton import Limits, newton

_S = 6**0.5
C = torch.tensor([(4 - _S) / 10, (4 + _S) / 10, 1.0], dtype=torch.float64)
A = torch.tensor(
    [
        [(88 - 7 * _S) / 360, (296 - 169 * _S) / 1800, (-2 + 3 * _S) / 225],
        [(296 + 169 * _S) / 1800, (88 + 7 * _S) / 360, (-2 - 3 * _S) / 225],
        [(16 - _S) / 36, (16 + _S) / 36, 1 / 9],
    ],
    dtype=torch.float64,
)
A_INVERSE = torch.linalg.inv(A)
# Weights of the stages in the embedded method's difference, times h.
E = torch.tensor([(-13 - 7 * _S) / 3, (-13 + 7 * _S) / 3, -1 / 3], dtype=torch.float64)
MAX_ITERATIONS = 7


def _diagonal() -> tuple[float, Tensor, Tensor, Tensor]:
    r""":math:`A^{-1} = V \Lambda V^{-1}`: the real eigenvalue, and V, its inverse and Lambda with one of the pair."""
    values, vectors = torch.linalg.eig(A_INVERSE)
    order = sorted(range(3), key=lambda i: (abs(float(values[i].imag)) > 1e-8, -float(values[i].imag)))
    values, vectors = values[order], vectors[:, order]
    inverse = torch.linalg.inv(vectors)
    return float(values[0].real), values[:2], vectors[:, :2], inverse[:2]


REAL, VALUES, VECTORS, INVERSE = _diagonal()


def _lagrange() -> Tensor:
    """Coefficients (stage, power) of the cubics that are 1 at one node, and 0 at the others and at 0."""
    rows = []
    for i in range(3):
        others = [float(C[j]) for j in range(3) if j != i]
        scale = float(C[i]) * (float(C[i]) - others[0]) * (float(C[i]) - others[1])
        rows.append([others[0] * others[1] / scale, -(others[0] + others[1]) / scale, 1 / scale])
    return torch.tensor(rows, dtype=torch.float64)


P = _lagrange()


class Radau:
    """Stages are kept as ``(*batch, 3, n)``."""

    # The collocation polynomial between the steps is of order 3 only, so steps end where results are asked for.
    land = True
    error_order = 3
    control = Controller(a=0.25, least=0.2, most=8.0)

    def solution(self, carry: Carry) -> Tensor:
        """Its first part."""
        return carry[0]

    def tolerance(self, tol: Tolerance) -> Tolerance:
        """Wider, as in the authors' code: the estimate is of order 3 and the result of order 5."""
        wider = 0.1 * tol.rtol ** (2 / 3)
        return tol._replace(rtol=wider, atol=tol.atol * (wider / tol.rtol))

    def begin(self, field: Field, t: Tensor, y: Tensor, f: Tensor, h: Tensor) -> State:
        """Slope and Jacobian; no polynomial yet from which to guess."""
        f, jacobian, _ = field.linearise(t, y)
        z = torch.zeros((*y.shape[:-1], 3, y.shape[-1]), dtype=y.dtype, device=y.device)
        return State((y,), (f, jacobian, z, h, torch.zeros_like(h, dtype=torch.bool)))

    def attempt(
        self, field: Field, t: Tensor, state: State, h: Tensor, active: Tensor, tol: Tolerance, limits: Limits
    ) -> Trial:
        """Newton's method from the last polynomial's continuation; the error by one more solution."""
        (y,) = state.carry
        f, jacobian, last, last_h, rejected = state.memory
        wide = h[..., None, None]
        inertia = field.inertia(y)
        real = field.factorise(REAL / wide * inertia - jacobian)
        pair = field.factorise(complex(VALUES[1]) / wide * inertia - jacobian)
        c, a_inverse, weights = C.to(h), A_INVERSE.to(h), E.to(h)
        vectors, inverse, values = (x.to(torch.complex(h, h).dtype).to(h.device) for x in (VECTORS, INVERSE, VALUES))
        scale = tol.scale(y)

        def step(z: Tensor) -> tuple[Tensor, Tensor]:
            slopes = self._slopes(field, t, y, z, h, c)
            # In the eigenvectors' coordinates: (lambda / h M - J) dw = V^-1 F - lambda / h M w.
            moved = inverse @ (slopes.to(inverse.dtype) - field.weigh_stages(a_inverse @ z / wide).to(inverse.dtype))
            first = real.solve(moved[..., 0, :].real)
            second = pair.solve(moved[..., 1, :])
            both = torch.stack([first.to(second.dtype), 2 * second], -2)
            return (vectors @ both).real, slopes

        guess = self._continued(last, last_h, h)
        found = newton(step, guess, scale.unsqueeze(-2), active, limits, tol, MAX_ITERATIONS)
        z = found.x
        end = y + z[..., 2, :]
        shifted = field.weigh(weights @ z) / wide[..., 0]
        error = real.solve(f + shifted)
        full = tol.scale(y, end)
        norm = tol.measure(error, full)
        # The first step, and one after a rejection: the estimate is filtered once more where it is large.
        again = active & found.solved & (norm > 1) & rejected
        if bool(again.any()):
            filtered = real.solve(field(t, y + error) + shifted)
            error = torch.where(again.unsqueeze(-1), filtered, error)
            norm = tol.measure(error, full)
        state = State((end,), (f, jacobian, z, h, torch.zeros_like(rejected)))
        finite = torch.isfinite(jacobian).flatten(-2).all(-1)  # LU of an infinite matrix can look like a regular one's
        solved, regular = found.solved & finite, found.regular & finite
        return Trial(state, (z,), (z,), error, norm, solved, regular, found.iterations)

    def adapt(
        self,
        field: Field,
        t: Tensor,
        trial: Trial,
        state: State,
        norm: Tensor,
        last: Tensor,
        good: Tensor,
        tol: Tolerance,
        fixed: bool,
        others: Others | None = None,
    ) -> tuple[State, Tensor]:
        """Gustafsson's prediction, damped by the number of iterations."""
        f, jacobian, z, h, _ = state.memory
        if bool(good.any()):
            f, jacobian, _ = field.linearise(t, state.carry[0])
        state = State(state.carry, (f, jacobian, z, h, ~good))
        damped = (2 * MAX_ITERATIONS + 1) / (2 * MAX_ITERATIONS + trial.iterations)
        return state, self.control.factor(norm / damped.to(norm) ** 4, last, good)

    def carry(self, field: Field, t: Tensor, y: Tensor, h: Tensor) -> Carry:
        """The solution."""
        return (y,)

    def follow(
        self, field: Field, t: Tensor, carry: Carry, h: Tensor, frozen: tuple[Tensor, ...]
    ) -> tuple[Carry, tuple[Any, ...], Callable[[], Tensor]]:
        """One implicit node for all stages."""
        (y,) = carry
        (known,) = frozen
        c, a = C.to(h), A.to(h)
        n = known.shape[-1]
        if (quick := along(field, (y, t), n)) is not None:
            start, dy = apart(y, quick.level, quick.num)
            now, dt = apart(t, quick.level, quick.num) if isinstance(t, DualTensor) else (t, None)
            pairs = [quick.linearise(now + c[i] * h, start + known[..., i, :], dt, dy) for i in range(3)]
            forced = h[..., None, None] * (a @ torch.stack([g for _, g in pairs], -2))
            matrix = stage_matrix(a, [j for j, _ in pairs], h, quick.field.mass)
            moved = LU(matrix).solve(forced.flatten(-2)).unflatten(-1, (3, n))
            z = make(known, Dense(moved), quick.level)
            end = make(start + known[..., 2, :], Dense(dy + moved[..., 2, :]), quick.level)
            return (end,), (z,), lambda: self._estimate(field, t, y, z, h)

        def residual(flat: Tensor, y: Tensor, t: Tensor, *args: Any) -> Tensor:
            z = flat.unflatten(-1, (3, n))
            inner = field.at(args)
            return (inner.weigh_stages(z) - h[..., None, None] * (a @ self._slopes(inner, t, y, z, h, c))).flatten(-2)

        def linearise(flat: Tensor, y: Tensor, t: Tensor, *args: Any) -> LU:
            z = flat.unflatten(-1, (3, n))
            inner = field.at(args)
            jacobians = [inner.linearise(t + c[i] * h, y + z[..., i, :])[1] for i in range(3)]
            return LU(stage_matrix(a, jacobians, h, inner.mass))

        problem = Problem(residual, lambda *_: (known.flatten(-2), None), linearise)
        z = implicit(problem, y, t, *field.args).unflatten(-1, (3, n))
        end = y + z[..., 2, :]

        return (end,), (z,), lambda: self._estimate(field, t, y, z, h)

    def dense(self, old: Carry, new: Carry, stages: tuple[Any, ...], h: Tensor, theta: Tensor) -> Tensor:
        """The collocation polynomial."""
        (z,) = stages
        return old[0] + _polynomial(z, theta)

    @staticmethod
    def _estimate(field: Field, t: Tensor, y: Tensor, z: Tensor, h: Tensor) -> Tensor:
        """With constant factors: their own motion changes the estimate by a factor near 1."""
        now, start = primal_of(t).detach(), primal_of(y).detach()
        plain = field.at([primal_of(x).detach() if isinstance(x, Tensor) else x for x in field.args])
        jacobian = plain.linearise(now, start)[1]
        defect = field(t, y) + field.weigh(E.to(h) @ z) / h.unsqueeze(-1)
        return _solved(LU(REAL / h[..., None, None] * plain.inertia(start) - jacobian), defect)

    @staticmethod
    def _slopes(field: Field, t: Tensor, y: Tensor, z: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return torch.stack([field(t + c[i] * h, y + z[..., i, :]) for i in range(3)], -2)

    @staticmethod
    def _continued(last: Tensor, last_h: Tensor, h: Tensor) -> Tensor:
        """The last step's polynomial at this step's nodes, from its end on."""
        ratio = h / last_h
        at = [_polynomial(last, 1 + float(c) * ratio) for c in C]
        return torch.stack(at, -2) - last[..., 2:, :]


def _solved(factors: LU, rhs: Tensor) -> Tensor:
    """With constant factors, on duals."""
    if isinstance(rhs, DualTensor):
        return make(_solved(factors, rhs._primal), rhs._tan.map(factors.solve), rhs._level)
    return factors.solve(rhs)


def _polynomial(z: Tensor, theta: Tensor) -> Tensor:
    powers = torch.stack([theta, theta * theta, theta * theta * theta], -1)  # (*batch, 3)
    weights = powers @ P.to(device=z.device, dtype=z.dtype).T
    return (weights.unsqueeze(-2) @ z).squeeze(-2)


def stage_matrix(a: Tensor, jacobians: list[Tensor], h: Tensor, mass: Tensor | None = None) -> Tensor:
    r""":math:`I_3 \otimes M - h (a_{ij} J_j)_{ij}`: ``(*batch, 3n, 3n)``."""
    n = jacobians[0].shape[-1]
    stacked = torch.stack(jacobians, -3)  # (*batch, j, n, n)
    # (*batch, i, n, j, n)
    blocks = a[:, None, :, None] * stacked.movedim(-3, -2).unsqueeze(-4)
    whole = blocks.reshape(*jacobians[0].shape[:-2], 3 * n, 3 * n)
    eye = torch.eye(3 * n if mass is None else 3, dtype=whole.dtype, device=whole.device)
    return (eye if mass is None else torch.kron(eye, mass)) - h[..., None, None] * whole
