import pytest
import torch
from torch import nn

from dualnn.engine.errors import StructureError
from dualnn.layers.structure import concrete, elementwise_layout

F64 = torch.float64


@pytest.mark.parametrize(
    ("shape", "parameter", "expected"),
    [((4, 3), (3,), None), ((4, 3), (1,), None), ((2, 3, 5), (3,), (3, 1)), ((2, 3, 3, 3), (3,), (3, 1, 1))],
)
def test_how_a_parameter_meets_the_channels(shape, parameter, expected):
    def fn(x, w):
        return x * torch.exp(w.reshape(-1, *(1,) * (len(shape) - 2)))

    layout = elementwise_layout(fn, [torch.randn(*shape, dtype=F64), torch.randn(*parameter, dtype=F64)], inputs=1)
    assert layout == [None, expected]


def test_last_axis_wins_where_the_function_says_so():
    x, w = torch.randn(2, 3, 3, dtype=F64), torch.randn(3, dtype=F64)
    assert elementwise_layout(lambda x, w: x * w, [x, w], inputs=1) == [None, None]


def test_a_tensor_that_does_not_broadcast():
    with pytest.raises(StructureError, match=r"shape \(2,\) does not broadcast"):
        elementwise_layout(lambda x, w: x * w.sum(), [torch.randn(4, 3), torch.randn(2)], inputs=1)


@pytest.mark.parametrize("slot", range(5))
def test_a_coupling_of_two_entries_is_found(slot):
    def fn(x):
        y = x.clone()
        y[slot] = x[slot] + 0.1 * x[(slot + 3) % 5]
        return y

    with pytest.raises(StructureError):
        elementwise_layout(fn, [torch.randn(5, dtype=F64)], inputs=1)


def test_the_numbers_under_wrappers():
    seen = []

    def fn(x):
        seen.append((concrete(x).tolist(), concrete(x).shape))
        return x.sum()

    x = torch.randn(4, 3, requires_grad=True)
    torch.func.vmap(torch.func.grad(fn))(x)
    assert seen == [(x[0].tolist(), (3,))]
    assert concrete(nn.Parameter(x)).requires_grad is False
