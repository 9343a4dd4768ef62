import pytest
import torch

from dualnn.activations.monotone import increasing_root
from dualnn.engine.errors import ConvergenceError, DualInputError


def cube(x: torch.Tensor):
    return lambda y: (y**3 - x, 3 * y * y, (y**3).abs() + x.abs())


def test_bad_starts_and_flat_slopes_still_converge() -> None:
    x = torch.tensor([-8.0, 1e-9, 27.0, 1e9], dtype=torch.float64)
    # start at the stationary point 0, where Newton's step is infinite or NaN
    y = increasing_root(cube(x), torch.full_like(x, -2e3), torch.full_like(x, 2e3), torch.zeros_like(x))
    torch.testing.assert_close(y, torch.tensor([-2.0, 1e-3, 3.0, 1e3], dtype=torch.float64))


def test_newton_that_cycles_is_bisected() -> None:
    # f = y / sqrt(1 + y^2): from |y| = 1 Newton's step leads to -y, from further away it diverges
    x = torch.tensor([1.0, -1.0, 5.0, -1e6], dtype=torch.float64)

    def evaluate(y: torch.Tensor):
        r = torch.rsqrt(1 + y * y)
        return y * r, r**3, (y * r).abs() + 1

    y = increasing_root(evaluate, torch.full_like(x, -1e6), torch.full_like(x, 2e6), x)
    assert y.abs().max() < 1e-14


def test_gives_up_with_a_count_and_a_cure() -> None:
    x = torch.tensor([1.0, 8.0, 27.0])
    with pytest.raises(
        ConvergenceError, match=r"myroot: 2 of 3 entries did not converge in 1 steps \(worst.*max_steps"
    ):
        increasing_root(cube(x), 0 * x, x, torch.ones_like(x), max_steps=1, name="myroot")


def test_tolerance_zero_runs_every_step_and_does_not_raise() -> None:
    x = torch.tensor([1.0, 8.0])
    calls = []

    def evaluate(y: torch.Tensor):
        calls.append(1)
        return cube(x)(y)

    y = increasing_root(evaluate, 0 * x, x, x, tol=0, max_steps=300)
    assert len(calls) == 300
    torch.testing.assert_close(y, torch.tensor([1.0, 2.0]))
    increasing_root(evaluate, 0 * x, x, x, tol=0, max_steps=1)


@pytest.mark.parametrize(("tol", "max_steps"), [(-1e-3, 10), (float("nan"), 10), (1e-3, 0)])
def test_settings_are_checked(tol: float, max_steps: int) -> None:
    x = torch.ones(1)
    with pytest.raises(DualInputError, match="tol >= 0"):
        increasing_root(cube(x), x, x, x, tol=tol, max_steps=max_steps)


def test_arguments_are_not_written_to() -> None:
    x = torch.tensor([8.0])
    lower, upper, start = torch.zeros(1), torch.full((1,), 9.0), torch.full((1,), 5.0)
    increasing_root(cube(x), lower, upper, start)
    assert (lower.item(), upper.item(), start.item()) == (0.0, 9.0, 5.0)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -1e30, 0.0])
def test_the_bracket_has_the_last_word_on_plain_steps(garbage: float) -> None:
    x = torch.tensor([-8.0, 27.0, 1e9], dtype=torch.float64)
    low = torch.full_like(x, -2e3)
    y = increasing_root(cube(x), low, -low, x / 10, newton=lambda y: y.fill_(garbage))
    torch.testing.assert_close(y, torch.tensor([-2.0, 3.0, 1e3], dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_plain_and_bracketed_steps_together_are_max_steps(steps: int) -> None:
    x = torch.tensor([8.0])
    plain, bracketed = [], []

    def evaluate(y: torch.Tensor):
        bracketed.append(y)
        return cube(x)(y)

    increasing_root(evaluate, 0 * x, x, x, tol=0, max_steps=steps, newton=plain.append)
    assert len(plain) + len(bracketed) == steps and len(bracketed) == 1


def test_plain_steps_stop_once_solved() -> None:
    x, steps = torch.tensor([8.0, torch.nan, 27.0]), []

    def newton(y: torch.Tensor) -> None:
        steps.append(y)
        y.sub_((y**3 - x) / (3 * y * y))

    y = increasing_root(cube(x), 0 * x, x, torch.tensor([2.0, 1.0, 3.0]), newton=newton)
    assert len(steps) == 4 and y[0] == 2 and y[2] == 3
