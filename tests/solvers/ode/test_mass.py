"""``M y' = f``: implicit ODEs and equations of index 1."""

import math

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import DualInputError, SingularMatrixError, UnsupportedOpError
from dualnn.solvers import odeint
from tests.solvers.ode.problems import F64, ROBERTSON, STIFF

stiff = pytest.mark.parametrize("method", STIFF)
TOL = {"radau": 1e-9, "rodas5p": 1e-9, "bdf": 1e-10}
FIXED = {"step_size": torch.tensor([0.04, 0.1, 0.07, 0.1], dtype=F64)}
T = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
LEFT = torch.tensor([[1.0, 0.4, -0.2], [0.3, -1.0, 0.5], [0.1, 0.2, 0.8]], dtype=F64)
RIGHT = torch.tensor([[0.9, -0.3, 0.2], [0.1, 1.1, 0.3], [-0.4, 0.2, 1.0]], dtype=F64)
SINGULAR = LEFT @ torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)) @ RIGHT
REGULAR = LEFT @ torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=F64)) @ RIGHT
P = torch.tensor([0.7, -1.3], dtype=F64)
START = torch.tensor([1.0, 0.5, 0.2], dtype=F64)


def mixed(t, y, p):
    """Neither linear nor autonomous; the combination of equations that LEFT makes algebraic determines y[2]."""
    x = (RIGHT @ y.unsqueeze(-1)).squeeze(-1)
    a, b, c = x.unbind(-1)
    t = t.squeeze(-1) if t.dim() else t
    f = torch.stack(
        [b + p[..., 0] * torch.sin(t) - c, -5 * b + p[..., 1] * a * c, a * p[..., 0] + torch.cos(t) - c - 0.2 * c**3],
        -1,
    )
    return (LEFT @ f.unsqueeze(-1)).squeeze(-1)


def reduced(t, x, p):
    """The same with c found by the formula of Cardano: an ODE for a, b."""
    a, b = x.unbind(-1)
    q = a * p[..., 0] + torch.cos(t)  # c + 0.2 c^3 = q
    root = torch.sqrt((2.5 * q) ** 2 + (5 / 3) ** 3)
    c = (2.5 * q + root) ** (1 / 3) - (root - 2.5 * q) ** (1 / 3)
    return torch.stack([b + p[..., 0] * torch.sin(t) - c, (-5 * b + p[..., 1] * a * c) / 2], -1), c


def robertson(t, y, p):
    a, b, c = y.unbind(-1)
    p1, p2, p3 = p.unbind(-1)
    return torch.stack([-p1 * a + p2 * b * c, p1 * a - p2 * b * c - p3 * b * b, a + b + c - 1], -1)


def transistor(t, y):
    """The transistor amplifier of the "Test Set for IVP Solvers" (problem transamp)."""
    source, base = 0.1 * torch.sin(200 * math.pi * t), 6.0
    one, other = (1e-6 * (torch.exp((y[..., i] - y[..., j]) / 0.026) - 1) for i, j in ((1, 2), (4, 5)))
    f = [
        (y[..., 0] - source) / 1000,
        (2 * y[..., 1] - base) / 9000 + 0.01 * one,
        y[..., 2] / 9000 - one,
        (y[..., 3] - base) / 9000 + 0.99 * one,
        (2 * y[..., 4] - base) / 9000 + 0.01 * other,
        y[..., 5] / 9000 - other,
        (y[..., 6] - base) / 9000 + 0.99 * other,
        y[..., 7] / 9000,
    ]
    return torch.stack(f, -1)


def capacities():
    m = torch.zeros(8, 8, dtype=F64)
    for c, i, j in ((1e-6, 0, 1), (3e-6, 3, 4), (5e-6, 6, 7)):
        m[i, i] = m[j, j] = -c
        m[i, j] = m[j, i] = c
    m[2, 2], m[5, 5] = -2e-6, -4e-6
    return m


def seeded(*shapes):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, dtype=F64, generator=generator) for s in shapes)


def differences(fn, h=1e-3):
    return (45 * (fn(h) - fn(-h)) - 9 * (fn(2 * h) - fn(-2 * h)) + (fn(3 * h) - fn(-3 * h))) / (60 * h)


@stiff
def test_robertson_with_its_conservation_law(method):
    known = ROBERTSON
    mass = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    y, dy = dn.jvp(
        lambda p: odeint(robertson, known.y0, known.t, (p,), method, 1e-7, 1e-11, mass=mass),
        (known.p,),
        (torch.eye(3, dtype=F64),),
    )
    torch.testing.assert_close(y[1:], known.y, rtol=2e-6, atol=0)
    torch.testing.assert_close(dy[:, 1:].transpose(0, 1), known.dy, rtol=1e-5, atol=0)
    torch.testing.assert_close(y.sum(-1), torch.ones(3, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.slow
@stiff
def test_transistor_amplifier(method):
    """A mass matrix of rank 5 in which no row is zero; the test set's reference."""
    reference = torch.tensor(
        [-0.5562145012262709e-2, 3.006522471903042, 2.849958788608128, 2.926422536206241,
         2.704617865010554, 2.761837778393145, 4.770927631616772, 1.236995868091548], dtype=F64,
    )  # fmt: skip
    y0 = torch.tensor([0, 3, 3, 6, 3, 3, 6, 0], dtype=F64)
    t = torch.tensor([0, 0.2], dtype=F64)
    y = odeint(transistor, y0, t, (), method, TOL[method] * 100, TOL[method], mass=capacities())[-1]
    torch.testing.assert_close(y, reference, rtol=2e-5, atol=1e-7)


@stiff
def test_an_equation_of_index_1_equals_its_ode(method):
    """Values and derivatives in everything, from a start that has to be projected: differentiably."""
    v = seeded(START.shape, P.shape, T.shape)
    rtol = TOL[method]
    options = {"project": True}

    def ours(y0, p, t):
        y = odeint(mixed, y0, t, (p,), method, rtol, rtol, options, mass=SINGULAR)
        return (RIGHT @ y.unsqueeze(-1)).squeeze(-1)

    def exact(y0, p, t):
        def ode(t, x, p):
            return reduced(t, x, p)[0]

        x = odeint(ode, (RIGHT @ y0)[:2], t, (p,), "dop853", 1e-12, 1e-13)
        return torch.cat([x, torch.stack([reduced(s, row, p)[1] for s, row in zip(t, x, strict=True)])[:, None]], -1)

    args = START, P, T
    y, dy = dn.jvp(ours, args, v)
    wanted, moved = dn.jvp(exact, args, v)
    torch.testing.assert_close(y, wanted, rtol=2e-7, atol=2e-7)
    torch.testing.assert_close(dy, moved, rtol=3e-5, atol=3e-5)
    leaves = [x.clone().requires_grad_() for x in args]
    (weight,) = seeded(y.shape)
    pulled = torch.autograd.grad((ours(*leaves) * weight).sum(), leaves)
    total = sum((a * b).sum() for a, b in zip(pulled, v, strict=True))
    torch.testing.assert_close(total, (dy * weight).sum(), rtol=1e-10, atol=1e-10)


@stiff
@pytest.mark.parametrize("kind", ["regular", "singular", "gains rank"])
def test_derivatives_in_the_mass_matrix(method, kind):
    """Exact for the discrete solution, also where entries give a singular matrix full rank; second order too."""
    if kind == "gains rank" and method == "bdf":
        pytest.skip("the slope at the start, part of the discrete solution, jumps with the rank")
    mass = REGULAR if kind == "regular" else SINGULAR
    y0 = odeint(mixed, START, T[:1], (P,), "radau", options={"project": True}, mass=SINGULAR)[0]
    v, w = seeded((3, 3), (3, 3))
    v, w = (mass @ v, mass @ w) if kind == "singular" else (v, w)

    def value(m):
        return odeint(mixed, y0, T, (P,), method, options=FIXED, mass=m)

    def slope(m):
        leaf = m.detach().clone().requires_grad_()
        return torch.autograd.grad(torch.sin(value(leaf)).sum(), leaf)[0]

    _, moved = dn.jvp(value, (mass,), (v,))
    torch.testing.assert_close(moved, differences(lambda s: value(mass + s * v), 1e-4), rtol=3e-9, atol=3e-9)
    leaf = mass.clone().requires_grad_()
    (weight,) = seeded(moved.shape)
    (pulled,) = torch.autograd.grad((value(leaf) * weight).sum(), leaf)
    torch.testing.assert_close((pulled * v).sum(), (moved * weight).sum(), rtol=1e-10, atol=1e-10)
    _, second = dn.jvp(lambda m: dn.jvp(lambda m: torch.sin(value(m)).sum(), (m,), (w,))[1], (mass,), (v,))
    measured = (differences(lambda s: slope(mass + s * v), 1e-4) * w).sum()
    torch.testing.assert_close(second, measured, rtol=1e-6, atol=1e-6)


@stiff
def test_a_regular_mass_matrix_is_an_ode(method):
    """Step by step: with the inverse in fn the discrete solution is the same."""

    def solved(t, y, p, m):
        return torch.linalg.solve(m, mixed(t, y, p))

    masses = torch.stack([REGULAR, SINGULAR + 0.3 * torch.eye(3, dtype=F64)])
    y0, p = torch.stack([START, -START]), torch.stack([P, 2 * P])
    one = odeint(mixed, y0, T, (p,), method, options=FIXED, mass=masses)
    other = odeint(solved, y0, T, (p, masses), method, options=FIXED)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@stiff
def test_a_batch_of_which_one_is_algebraic(method):
    masses = torch.stack([REGULAR, SINGULAR])
    p = torch.stack([P, 2 * P])
    options = {"project": True}
    both = odeint(mixed, torch.stack([START, START]), T, (p,), method, options=options, mass=masses)
    for b in range(2):
        one = odeint(mixed, START, T, (p[b],), method, options=options, mass=masses[b])
        torch.testing.assert_close(both[:, b], one, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both[0, 0], START)
    torch.testing.assert_close((SINGULAR @ both[0, 1]), SINGULAR @ START, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mass": SINGULAR[:2]}, r"\(3, 3\)"),
        ({"mass": SINGULAR.float()}, "float32"),
        ({"mass": 2.0}, "torch.Tensor"),
        ({"mass": SINGULAR * math.nan}, "nan"),
        ({"method": "dopri5"}, "explicit"),
        ({}, r"inconsistent for the system.*residual of .*times the tolerance.*project"),
    ],
)
def test_what_is_refused(change, words):
    given = {"method": "radau", "mass": SINGULAR, **change}
    with pytest.raises(DualInputError, match=words):
        odeint(mixed, START, T, (P,), **given)


def test_a_higher_index_is_refused():
    def pendulum(t, y):  # with the length's constraint: index 3
        x, v, force = y[..., :2], y[..., 2:4], y[..., 4]
        pull = -force.unsqueeze(-1) * x - torch.tensor([0.0, 9.81], dtype=F64)
        return torch.cat([v, pull, (x * x).sum(-1, keepdim=True) - 1], -1)

    mass = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=F64))
    y0 = torch.tensor([1.0, 0, 0, 0, 0], dtype=F64)
    with pytest.raises(SingularMatrixError, match="index 1.*Differentiate constraints"):
        odeint(pendulum, y0, T, (), "radau", mass=mass)


def test_projection_with_a_moving_null_space_is_refused():
    with pytest.raises(UnsupportedOpError, match="would move"):
        odeint(mixed, START, T, (P,), "radau", mass=SINGULAR.clone().requires_grad_(), options={"project": True})
