import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dualnn.activations.implicit_tanh import ImplicitTanh, implicit_tanh, parametrise, residual, solve
from dualnn.engine.errors import ConvergenceError, DualInputError

PAIRS = [
    (1.0, 1.0),
    (-1 + 1e-9, 1.0),
    (1.0, -0.999),
    (5.0, 3.0),
    (-5.0, -3.0),
    (1.0, 1e6),
    (1e6, 1e-3),
    (1e6, 1e6),
    (0.0, 2.0),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_solver_over_the_whole_line(a: float, b: float) -> None:
    small = torch.logspace(-14, 8, 500, dtype=torch.float64)
    x = torch.cat([torch.linspace(-4, 4, 2001, dtype=torch.float64), small, -small, a + small / 1e14])
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    y = solve(x, a, b)
    size = x.abs() + y.abs() + (a * torch.tanh(b * y)).abs()
    assert (residual(y, x, a, b).abs() <= 1e-15 * size).all()
    assert (y[:2001].diff() >= 0).all()  # increasing in x
    torch.testing.assert_close(solve(-x, a, b), -y)  # and odd


@pytest.mark.parametrize("steps", [10, 1000])
def test_gradients_equal_the_closed_implicit_derivative(steps: int) -> None:
    x = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    a = (torch.rand(8, dtype=torch.float64) * 2 - 0.4).requires_grad_()
    b = (torch.rand(8, dtype=torch.float64) + 0.5).requires_grad_()
    weights = torch.randn(64, 8, dtype=torch.float64)
    y = implicit_tanh(x, a, b, tol=0, max_steps=steps)
    gradients = torch.autograd.grad((weights * y).sum(), (x, a, b))
    t = torch.tanh(b * y)
    slope = 1 / (1 + a * b * (1 - t * t))
    expected = (slope, -t * slope, -a * y * (1 - t * t) * slope)
    for mine, closed in zip(gradients, expected, strict=True):
        closed = weights * closed
        torch.testing.assert_close(
            mine, closed if closed.shape == mine.shape else closed.sum(0), rtol=1e-12, atol=1e-12
        )


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes of live tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.known:
                size = t.untyped_storage().nbytes()
                self.known.add(key)
                self.live += size
                weakref.finalize(t.untyped_storage(), self.release, key, size)
        self.peak = max(self.peak, self.live)
        return out


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    peaks = []
    for steps in (10, 1000):
        act = ImplicitTanh(tol=0, max_steps=steps, num_channels=32)
        x = torch.randn(256, 32, requires_grad=True)
        with PeakBytes() as count:
            act(x).sum().backward()
        peaks.append(count.peak)
    assert peaks[0] == peaks[1]
    assert 0 < peaks[0] < 30 * x.numel() * 4  # a dozen temporaries


def test_gradient_equals_unrolled_newton() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.8))
    y = x * 1
    for _ in range(30):
        t = torch.tanh(b * y)
        y = y - (y + a * t - x) / (1 + a * b * (1 - t * t))
    unrolled = torch.autograd.grad((y**2).sum(), (x, a, b))
    exact = torch.autograd.grad((implicit_tanh(x, a, b) ** 2).sum(), (x, a, b))
    for mine, theirs in zip(exact, unrolled, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_not_converging_says_what_to_do() -> None:
    act = ImplicitTanh(a=3.0, b=4.0, max_steps=2)
    with pytest.raises(
        ConvergenceError, match=r"implicit_tanh: \d+ of 100 entries.*in 2 steps.*worst.*Raise max_steps"
    ):
        act(torch.linspace(-5, 5, 100))


@pytest.mark.parametrize(("a", "b"), [(-1.0, 1.0), (2.0, -1.0)])
def test_product_at_or_below_minus_one_is_refused(a: float, b: float) -> None:
    with pytest.raises(DualInputError, match=r"a \* b must exceed -1.*got -"):
        solve(torch.zeros(1), torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize("options", [{"a": -1.0}, {"b": 0.0}, {"b": -1.0}, {"margin": 0.0}, {"a": -0.9995}])
def test_bad_starting_values(options: dict) -> None:
    with pytest.raises(DualInputError, match="implicit_tanh"):
        ImplicitTanh(**options)


def test_parametrisation_cannot_leave_the_domain() -> None:
    raw = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])
    for slope in raw[1:]:
        a, b = parametrise(raw, slope, 1e-3)
        assert (a * b > -1).all() and (b > 0).all()
        assert solve(torch.ones(5), a, b).isfinite().all()


def test_infinite_input_passes() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 1.0])
    y = ImplicitTanh()(x)
    assert y[0] == torch.inf and y[1] == -torch.inf and y[2].isfinite()
