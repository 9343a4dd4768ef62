"""Each method by itself: its coefficients, its order, its matrices."""

import pytest
import torch

from dualnn.solvers import odeint
from dualnn.solvers.ode import bdf, radau
from dualnn.solvers.ode.dop853 import DOP853
from dualnn.solvers.ode.dopri5 import DOPRI5
from dualnn.solvers.ode.odeint import METHODS as REGISTERED
from dualnn.solvers.ode.rodas5p import RODAS5P
from tests.solvers.ode.problems import F64

ORDER = {"dopri5": 5, "dop853": 8, "radau": 5, "rodas5p": 5}
DENSE = {"dopri5": 4, "dop853": 7, "radau": 3, "rodas5p": 4}


def pendulum(t, y):
    """Neither linear nor autonomous: every order condition takes part."""
    a, b = y.unbind(-1)
    return torch.stack([b * torch.cos(t) + 0.3 * a, -torch.sin(a) - 0.5 * a * b + t], -1)


def solve(method, step, t):
    t = torch.tensor([0.0, *t], dtype=F64)
    options = {"step_size": step, "land": False}
    return odeint(pendulum, torch.tensor([1.0, -0.4], dtype=F64), t, method=method, options=options)


@pytest.fixture(scope="module")
def exact():
    return odeint(
        pendulum, torch.tensor([1.0, -0.4], dtype=F64), torch.tensor([0.0, 0.43, 1.0], dtype=F64), method="dop853",
        rtol=1e-13, atol=1e-15, options={"land": True},
    )  # fmt: skip


def slope(errors, steps):
    x, y = torch.tensor(steps, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


@pytest.mark.parametrize("method", ORDER)
def test_the_order_with_fixed_steps(method, exact):
    steps = (1 / 2, 1 / 3, 1 / 4, 1 / 6) if method == "dop853" else (1 / 5, 1 / 7, 1 / 10, 1 / 14)
    ends = [solve(method, h, (1.0,))[-1] for h in steps]
    assert slope([float((e - exact[-1]).norm()) for e in ends], steps) > ORDER[method] - 0.4


@pytest.mark.parametrize("method", DENSE)
def test_the_order_between_the_steps(method, exact):
    """Errors at the same place within a step: at 0.43, steps of 0.43 / (k + 1/2)."""
    counts = (1, 2, 3, 4) if method == "dop853" else (3, 5, 7, 11)
    steps = [0.43 / (k + 0.5) for k in counts]
    found = [solve(method, h, (0.43, 1.0))[1] for h in steps]
    assert slope([float((e - exact[1]).norm()) for e in found], steps) > DENSE[method] - 0.3


@pytest.mark.parametrize("k", range(1, 6))
def test_bdf_orders(k):
    """From an exact history, so that the start at order 1 does not count."""
    alpha = bdf.ALPHA[k]

    def error(h):
        t = -h * torch.arange(8, dtype=F64)
        values = torch.exp(-2 * t)  # y' = -2 y
        history = [values]
        for _ in range(7):
            history.append(history[-1][:-1] - history[-1][1:])
        rows = torch.stack([d[0] for d in history])[:, None]
        order = torch.tensor(k)
        for _ in range(round(1 / h)):
            predicted, past = (bdf.PREDICT[order] @ rows).unbind(-2)
            c = h / alpha
            d = (-2 * c * predicted - past) / (1 + 2 * c)
            rows = bdf._updated(rows, d, order)
        return abs(float(rows[0]) - float(torch.exp(torch.tensor(-2.0, dtype=F64))))

    steps = (1 / 40, 1 / 60, 1 / 80, 1 / 120)
    assert abs(slope([error(h) for h in steps], steps) - k) < 0.25


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("ratio", [0.3, 1.7])
def test_bdf_rescaling_keeps_the_polynomial(k, ratio):
    def differences(h):
        values = (1 + 0.7 * -h * torch.arange(6, dtype=F64)) ** k
        out = [values]
        for _ in range(5):
            out.append(out[-1][:-1] - out[-1][1:])
        return torch.stack([d[0] for d in out])

    matrix = torch.eye(8, dtype=F64) + bdf.rescaling(torch.tensor(k), torch.tensor(ratio, dtype=F64))
    moved = matrix[:6, :6] @ differences(0.1)
    torch.testing.assert_close(moved[: k + 1], differences(0.1 * ratio)[: k + 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        bdf.rescaling(torch.tensor(k), torch.tensor(1.0, dtype=F64)), torch.zeros(8, 8, dtype=F64)
    )


def test_bdf_holds_a_sample_of_order_0():
    history = torch.randn(8, 3, dtype=F64)
    kept = bdf._updated(history, torch.zeros(3, dtype=F64), torch.tensor(0))
    torch.testing.assert_close(kept[0], history[0])


def test_radau_coefficients():
    """Collocation conditions, and an inverse that its eigenvectors diagonalise."""
    for k in range(1, 4):
        torch.testing.assert_close(radau.A @ radau.C ** (k - 1), radau.C**k / k)
    for k in range(1, 6):
        torch.testing.assert_close(radau.A[2] @ radau.C ** (k - 1), torch.tensor(1 / k, dtype=F64))
    pair = radau.VECTORS @ torch.diag(torch.tensor([1.0, 2.0], dtype=F64).to(torch.complex128) * radau.VALUES)
    torch.testing.assert_close((pair @ radau.INVERSE).real, torch.linalg.inv(radau.A), rtol=1e-12, atol=1e-12)


def test_explicit_and_rosenbrock_coefficients_are_consistent():
    for pair in (DOPRI5, DOP853):
        rows = (*zip(pair.a, pair.c, strict=True), *pair.later)
        for row, c in rows:
            torch.testing.assert_close(row.sum(), torch.tensor(c, dtype=F64), rtol=1e-14, atol=0)
        torch.testing.assert_close(pair.e.sum(0), torch.zeros_like(pair.e.sum(0)), rtol=0, atol=1e-15)
        # The interpolant ends at the step's end, with weights b, and its slopes are those of the step at both ends.
        n, powers = len(pair.a[-1]), torch.arange(1, pair.p.shape[1] + 1, dtype=F64)
        torch.testing.assert_close(pair.p.sum(1)[:n], pair.a[-1], rtol=0, atol=1e-12)
        ends = torch.stack([pair.p[:, 0], pair.p @ powers], -1)
        wanted = torch.zeros_like(ends)
        wanted[0, 0] = wanted[n, 1] = 1
        torch.testing.assert_close(ends, wanted, rtol=0, atol=1e-11)
    # Stage i of y' = 1: the sum of a_ij u_j is c_i h, u being what W u = 1 + C u / h gives with J = 0.
    u = [torch.tensor(RODAS5P.gamma, dtype=F64)]
    for row, c in zip(RODAS5P.rows, RODAS5P.c, strict=True):
        a, coupled = (torch.stack(u) @ row).unbind(-1)
        torch.testing.assert_close(a, torch.tensor(c, dtype=F64), rtol=0, atol=1e-12)
        u.append(RODAS5P.gamma * (1 + coupled))


def test_every_method_is_registered_under_its_name():
    assert set(REGISTERED) >= {"bdf", "radau", "rodas5p", "dopri5", "dop853"}
