"""The judge itself: it must catch a wrong derivative, a lost tangent, a kink taken for smooth, and an error."""

import pytest
import torch

from dualnn.conformance.case import Case, case_of
from dualnn.conformance.differences import difference
from dualnn.conformance.sweep import judge
from dualnn.conformance.verdicts import NAN, RAISES, RIGHT, WRONG
from dualnn.engine.dual_tensor import DualTensor

X = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)


def case(function, x=X) -> Case:
    made = case_of("op", 0, function, ((x,), {}), lambda t: True)
    assert made is not None
    return made


def outcomes(function, x=X) -> dict:
    return judge("op", [case(function, x)], torch_too=False).outcomes


def test_a_right_function_is_right():
    assert outcomes(lambda x: torch.sin(x) * x) == {
        "value": "bitwise",
        "first": RIGHT,
        "second": RIGHT,
        "reverse": RIGHT,
    }


def test_a_lost_tangent_is_wrong():
    def cut(x):
        return x.detach() * x if isinstance(x, DualTensor) else x * x

    assert outcomes(cut)["first"] == WRONG


def test_a_wrong_value_is_wrong():
    assert outcomes(lambda x: x * (2 if isinstance(x, DualTensor) else 3))["value"] == WRONG


def test_a_wrong_second_derivative_is_wrong():
    def flat_slope(x):  # right at first order: the slope is a constant
        if isinstance(x, DualTensor):
            return 2 * x.detach() * x - (x.detach() * x).detach()
        return x * x

    found = outcomes(flat_slope)
    assert (found["first"], found["second"]) == (RIGHT, WRONG)


def test_an_op_without_a_rule_raises():
    assert outcomes(lambda x: x.numpy() if isinstance(x, DualTensor) else x * 2)["first"] == RAISES


def test_nan_is_told_apart():
    def singular(x):
        return x * x * (torch.nan if isinstance(x, DualTensor) and isinstance(x.primal, DualTensor) else 1.0)

    found = outcomes(singular)
    assert (found["first"], found["second"]) == (RIGHT, NAN)


@pytest.mark.parametrize("kink", [torch.abs, torch.relu])
def test_the_difference_at_a_kink_is_not_trusted(kink):
    _, (trusted,) = difference(lambda h: [kink(torch.tensor([0.0, 1.0], dtype=torch.float64) + h)])
    assert trusted.tolist() == [False, True]


def test_the_difference_is_accurate_where_it_is_trusted():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    (slope,), (trusted,) = difference(lambda h: [torch.exp(torch.sin(3 * (x + h)))])
    torch.testing.assert_close(slope, 3 * torch.cos(3 * x) * torch.exp(torch.sin(3 * x)), rtol=1e-8, atol=1e-8)
    assert bool(trusted.all())
