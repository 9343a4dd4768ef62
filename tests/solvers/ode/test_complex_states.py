"""Complex states, holomorphic right-hand sides or not."""

import pytest
import torch

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.solvers import Event, odeint
from tests.solvers.ode.problems import F64, METHODS, STIFF

C128 = torch.complex128
methods = pytest.mark.parametrize("method", METHODS)
T = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
Z0 = torch.tensor([1.0 - 0.5j, 0.3 + 0.2j], dtype=C128)
W = torch.tensor([2.0, -3.0], dtype=F64)
TOL = {"bdf": 1e-10, "radau": 1e-9, "rodas5p": 1e-9, "dopri5": 1e-10, "dop853": 1e-10}


def turn(t, z, w):
    return 1j * w * z


def bent(t, z, a):
    """Of z and its conjugate, with a complex parameter."""
    return a * z.conj() - 0.5 * z * z.abs() ** 2 + 1j * torch.cos(t)


def parted(t, y, a):
    """The same in real and imaginary parts, by hand."""
    x, v = y[..., :2], y[..., 2:]
    p, q = a.real, a.imag
    r = x * x + v * v
    return torch.cat([p * x + q * v - 0.5 * x * r, q * x - p * v - 0.5 * v * r + torch.cos(t)], -1)


@methods
def test_rotation_and_its_derivatives(method):
    tol = TOL[method]
    v = torch.tensor([0.5 + 1j, -1j], dtype=C128), torch.tensor([1.0, 0.3], dtype=F64)

    def ours(z0, w):
        return odeint(turn, z0, T, (w,), method, tol, tol)

    def exact(z0, w):
        return torch.exp(1j * w * T[:, None]) * z0

    (z, dz), (wanted, moved) = (dn.jvp(f, (Z0, W), v) for f in (ours, exact))
    assert z.dtype == C128 and z.shape == (3, 2)
    torch.testing.assert_close(z, wanted, rtol=3e-7, atol=0)
    torch.testing.assert_close(dz, moved, rtol=3e-6, atol=1e-7)
    leaves = [x.clone().requires_grad_() for x in (Z0, W)]
    pulled = torch.autograd.grad(ours(*leaves).abs().pow(2).sum() + ours(*leaves)[-1].imag.sum(), leaves)
    known = torch.autograd.grad(exact(*leaves).abs().pow(2).sum() + exact(*leaves)[-1].imag.sum(), leaves)
    for a, b in zip(pulled, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@methods
def test_conjugates_in_the_right_hand_side(method):
    """Equal to the system written in real parts, step by step, with derivatives in a complex parameter."""
    a = torch.tensor([0.7 - 0.4j, -1.1 + 0.3j], dtype=C128)
    options = {"step_size": 0.1}

    def real(z):
        return torch.cat([z.real, z.imag], -1)

    def ours(z0, a):
        return real(odeint(bent, z0, T, (a,), method, options=options))

    def by_hand(z0, a):
        return odeint(parted, real(z0), T, (a,), method, options=options)

    generator = torch.Generator().manual_seed(0)
    v = tuple(torch.randn(2, 2, dtype=C128, generator=generator) for _ in range(2))
    (z, dz), (wanted, moved) = (dn.jvp(f, (Z0, a), v) for f in (ours, by_hand))
    torch.testing.assert_close(z, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dz, moved, rtol=1e-10, atol=1e-10)
    one, other = (tuple(x.clone().requires_grad_() for x in (Z0, a)) for _ in range(2))
    weight = torch.randn(z.shape, dtype=F64, generator=generator)
    for got, known in zip(
        torch.autograd.grad((ours(*one) * weight).sum(), one),
        torch.autograd.grad((by_hand(*other) * weight).sum(), other),
        strict=True,
    ):
        torch.testing.assert_close(got, known, rtol=1e-10, atol=1e-10)


def test_a_batch_in_single_precision():
    z0 = torch.stack([Z0, 2 * Z0]).to(torch.complex64)
    w = torch.stack([W, -W]).float()
    z = odeint(turn, z0, T.float(), (w,), "radau", 1e-4, 1e-5)
    assert z.dtype == torch.complex64
    wanted = torch.exp(1j * w * T.float()[:, None, None]) * z0
    torch.testing.assert_close(z, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", STIFF)
def test_with_a_complex_mass_matrix(method):
    mass = torch.tensor([[1.0, 0.5j], [-0.2, 2.0 - 1j]], dtype=C128)
    rtol = TOL[method]
    z = odeint(lambda t, z, w: mass @ (1j * w * z), Z0, T, (W,), method, rtol, rtol, mass=mass)
    torch.testing.assert_close(z, torch.exp(1j * W * T[:, None]) * Z0, rtol=3e-7, atol=0)
    again = odeint(lambda t, z, w: 2j * w * z, Z0, T, (W,), method, rtol, rtol, mass=2 * torch.eye(2, dtype=F64))
    torch.testing.assert_close(again, z, rtol=1e-6, atol=0)


@methods
def test_tolerances_and_events(method):
    """exp(i w t) = i at t = pi / (2 w)."""
    tol = torch.tensor([1e-9, 1e-9], dtype=F64)
    event = Event(lambda t, z, w: z[..., 0].real, terminal=True)
    w = W.clone().requires_grad_()
    z, found = odeint(turn, torch.ones(2, dtype=C128), T, (w,), method, tol, tol, events=event)
    assert found.y.dtype == C128
    torch.testing.assert_close(found.y[0, 0].detach(), torch.tensor(1j, dtype=C128), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(found.t.sum(), w)
    torch.testing.assert_close(slope, torch.tensor([-torch.pi / 8, 0.0], dtype=F64), rtol=1e-5, atol=1e-12)


def test_what_is_refused():
    with pytest.raises(StructureError, match="complex128"):
        odeint(lambda t, z: z.real, Z0, T)
    with pytest.raises(DualInputError, match=r"t.to\(y0.real\)"):
        odeint(turn, Z0.to(torch.complex64), T, (W,))
    with pytest.raises(DualInputError, match="jac is for real states"):
        odeint(turn, Z0, T, (W,), jac=lambda t, z, w: torch.diag(1j * w))
    with pytest.raises(DualInputError, match=r"rtol must be a number or \(2,\)"):
        odeint(turn, Z0, T, (W,), rtol=torch.ones(4))
