"""gradcheck finds what is wrong, in the mode where it is, and says kink or unsupported where that is the matter."""

import math

import pytest
import torch
from torch import Tensor, nn

import dualnn as dn
from dualnn.engine.bridge import ClosedForm, elementwise
from dualnn.engine.differences import line_derivative
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.engine.gradcheck import FIRST, SECOND, GradcheckError, Report

ALL = (*FIRST, *SECOND)
POINTS = torch.tensor([0.3, -0.8, 1.2], dtype=torch.float64)


def status(report: Report) -> dict[str, str]:
    return {v.mode: v.status for v in report.verdicts}


def with_slope(slope):
    """sin with another derivative than its own, through the bridge."""
    return lambda x: elementwise(ClosedForm(torch.sin, lambda y, x: (slope(x),)), x)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (torch.sin, POINTS),
        (torch.sin, POINTS.float()),  # float32 inputs are checked in float64
        (lambda a, b: a @ b, (torch.ones(2, 3), torch.ones(3, 2))),
        (lambda x, n: x**n, (POINTS, 3)),
        (lambda pair: {"a": pair[0] * pair[1], "count": torch.tensor(3)}, ((POINTS, POINTS + 2),)),
        (torch.logsumexp, (POINTS, 0)),
        (torch.square, torch.tensor(2.0)),
    ],
)
def test_right_functions_are_right(fn, inputs, order: int) -> None:
    report = dn.gradcheck(fn, inputs, order)
    assert report and all(v.status == "right" for v in report.verdicts)
    assert {v.mode for v in report.verdicts} == set(ALL[: order + 1])


FLOWS = {"van_der_pol", "fitzhugh_nagumo", "learned_flow"}
# Their derivative is that of another function, as their names' docstrings say.
HARD = {"quantize", "hard_topk", "heaviside", "rank", "round", "sign", "spike"}


@pytest.mark.parametrize("name", dn.activations.available())
def test_the_zoo_is_right_and_a_surrogate_is_told(name: str) -> None:
    # An adaptive solver's steps jump with its input, which differences of its slope see: equal steps for the flows.
    act = dn.activations.get(name, **({"steps": 20} if name in FLOWS else {}))
    report = dn.gradcheck(act, POINTS.abs() + 0.2, raise_exception=False)
    assert bool(report) == (name not in HARD), str(report)
    assert {v.name for v in report.verdicts} == {"input 0", *(n for n, _ in act.named_parameters())}


def test_a_module_is_checked_in_all_modes_and_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(5, 3)
    report = dn.gradcheck(net, x, modes=ALL)
    assert all(v.status == "right" for v in report.verdicts), str(report)
    assert {v.name for v in report.verdicts} == {"input 0", *(n for n, _ in net.named_parameters())}
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("fn", "wrong"),
    [
        (with_slope(lambda x: 2 * x.cos()), set(ALL)),
        (with_slope(lambda x: x.cos().detach()), set(SECOND)),  # right once, constant afterwards
        (lambda x: x * x.detach(), set(ALL)),
        (lambda x: x.sin() + x.detach().cos(), set(ALL)),
    ],
)
def test_wrong_derivatives_are_found_where_they_are(fn, wrong: set[str]) -> None:
    report = dn.gradcheck(fn, POINTS, modes=ALL, raise_exception=False)
    assert status(report) == {m: "wrong" if m in wrong else "right" for m in ALL}
    assert not report


def test_one_wrong_entry_is_named() -> None:
    def slope(x: Tensor) -> Tensor:
        return x.cos() + torch.tensor([0.0, 0.0, 1e-3], dtype=x.dtype)

    with pytest.raises(GradcheckError, match=r"input 0\s+forward\s+wrong\s+1.0e-03\s+\[2\] -> out\[2\]") as caught:
        dn.gradcheck(with_slope(slope), POINTS)
    assert "differences 0.362358" in str(caught.value)


def test_a_small_error_is_found_and_a_smaller_one_forgiven() -> None:
    fn = with_slope(lambda x: x.cos() * (1 + 1e-4))
    assert not dn.gradcheck(fn, POINTS, 1, raise_exception=False)
    assert dn.gradcheck(fn, POINTS, 1, rtol=1e-3)


def test_a_cut_says_so() -> None:
    def cut(x: Tensor) -> Tensor:
        return torch.tensor(math.tanh(x.item()), dtype=torch.float64)

    report = dn.gradcheck(cut, torch.tensor(0.5), raise_exception=False)
    assert {v.status for v in report.verdicts} == {"wrong"}
    assert "no derivative arrives at all" in str(report)


def test_another_value_on_duals_is_wrong() -> None:
    def two_faced(x: Tensor) -> Tensor:
        return x * (2.0 if type(x).__name__ == "DualTensor" else 1.0)

    report = dn.gradcheck(two_faced, POINTS, 1, raise_exception=False)
    assert status(report) == {"forward": "wrong", "reverse": "right"}
    assert "the value on duals differs by 1.2e+00" in str(report)


@pytest.mark.parametrize("fn", [torch.abs, torch.relu, torch.sign, lambda x: x.floor(), lambda x: x.abs().sqrt()])
def test_a_kink_is_a_kink(fn) -> None:
    report = dn.gradcheck(fn, torch.zeros(1), raise_exception=False)
    assert {v.status for v in report.verdicts} == {"kink"}
    assert not report and "nothing could be judged" in str(report)


def test_a_kink_elsewhere_does_not_excuse_an_error() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.relu(x) * torch.tensor([1.0, 1.0, 1.0]) + x.detach() * torch.tensor([0.0, 1.0, 0.0])

    points = torch.tensor([0.0, 1.0, -1.0])
    assert dn.gradcheck(torch.relu, points)
    report = dn.gradcheck(fn, points, 1, raise_exception=False)
    assert status(report) == {"forward": "wrong", "reverse": "wrong"}
    assert "[1] -> out[1]" in str(report) and "on a kink, not judged" in str(report)


def test_a_kink_nearby_is_stepped_around() -> None:
    assert dn.gradcheck(torch.abs, torch.tensor([1e-4]), modes=("forward", "reverse"))
    assert dn.gradcheck(torch.log, torch.tensor([1e-3], dtype=torch.float64))  # the first steps leave the domain


def test_a_mode_that_raises_is_unsupported() -> None:
    def through_numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    def no_backward(x: Tensor) -> Tensor:
        y = torch.exp(x)
        y[y < 1] = 0
        return y

    report = dn.gradcheck(through_numpy, POINTS, raise_exception=False)
    assert not report and {v.status for v in report.verdicts} == {"unsupported"}
    with pytest.raises(GradcheckError, match="nothing could be judged"):
        dn.gradcheck(through_numpy, POINTS)
    report = dn.gradcheck(no_backward, POINTS)  # reverse raises, forward is right
    assert status(report)["forward"] == "right" and status(report)["reverse"] == "unsupported"
    assert "modified by an inplace operation" in str(report)


def test_large_inputs_are_sampled_and_the_report_says_so() -> None:
    report = dn.gradcheck(torch.sin, torch.linspace(-2, 2, 1000), order=1, entries=5)
    assert report and "5 of 1000 entries" in str(report)


@pytest.mark.parametrize(
    ("fn", "inputs", "message"),
    [
        (torch.sin, torch.tensor([1, 2]), "no floating point tensor"),
        (torch.sin, torch.zeros(0), "no floating point tensor"),
        (torch.sin, torch.tensor([1.0, math.nan]), "input 0 holds 1 of 2"),
        (torch.log, torch.tensor([1.0, -1.0]), "returns 1 of 2 numbers that are not finite"),
        (lambda x: x.float().sin(), POINTS, "returns torch.float32 for inputs in float64"),
        (torch.argmax, POINTS, "returns no floating point tensor"),
        (nn.Dropout(0.5), torch.ones(20), "is not deterministic"),
    ],
)
def test_bad_input_is_named(fn, inputs, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        dn.gradcheck(fn, inputs)


def test_unknown_modes_and_orders_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'forward'"):
        dn.gradcheck(torch.sin, POINTS, modes=["forwards"])
    with pytest.raises(DualInputError, match="order 1 and 2, got 3"):
        dn.gradcheck(torch.sin, POINTS, 3)


def test_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    dn.gradcheck(torch.sin, POINTS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("order", "fn", "truth"),
    [
        (1, lambda h: math.exp(h), 1.0),
        (2, lambda h: math.exp(h), 1.0),
        (1, lambda h: math.sin(40 * h), 40.0),
        (2, lambda h: h * abs(h) ** 1.5, 0.0),
        (2, lambda h: 1e6 + h * h, 2.0),
    ],
)
def test_line_derivatives(order: int, fn, truth: float) -> None:
    found = line_derivative(lambda h: torch.tensor([fn(h)], dtype=torch.float64), order, 1e-2, 1e-5, 1e-6)
    assert not found.kink.any()
    assert abs(float(found.value) - truth) <= 1e-6 + 1e-5 * abs(truth) + float(found.error)


@pytest.mark.parametrize(
    ("order", "fn"),
    [
        (1, abs),
        (1, lambda h: max(h, 0.0)),
        (1, lambda h: float(h > 0)),
        (1, lambda h: abs(h) ** 0.5),
        (2, lambda h: max(h, 0.0) ** 2),
    ],
)
def test_kinks_of_lines(order: int, fn) -> None:
    assert line_derivative(lambda h: torch.tensor([fn(h)], dtype=torch.float64), order, 1e-2, 1e-5, 1e-6).kink.all()
