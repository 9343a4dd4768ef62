"""Directions of any order from torch's reverse mode: `by_reverse`, and the decompositions beside it."""

import pytest
import torch

import dualnn as dn
from dualnn.engine import by_reverse, releases
from dualnn.engine.errors import UnsupportedOpError
from tests.engine.oracles import five_point

X = torch.tensor([0.4, 1.3, 2.1], dtype=torch.float64)


def i0(x):  # served by torch's reverse mode; its derivatives are i1, (i0 + i2) / 2, …
    return torch.special.i0(x)


def test_it_is_what_serves_this_op():
    from dualnn.engine.registry import RULES

    assert RULES[torch.special.i0] is by_reverse.reverse_rule


def test_third_order_by_nesting():
    def derivative(fn):
        return lambda x: dn.jvp(fn, (x,), (torch.ones_like(x),))[1]

    third = derivative(derivative(derivative(i0)))(X)
    h = 1e-3
    values = [torch.special.i1(X + k * h) for k in (-2, -1, 0, 1, 2)]
    wanted = (-values[0] + 16 * values[1] - 30 * values[2] + 16 * values[3] - values[4]) / (12 * h * h)
    torch.testing.assert_close(third, wanted, rtol=1e-7, atol=1e-7)


def test_several_and_no_directions():
    basis = torch.eye(3, dtype=torch.float64)
    _, pushed = dn.jvp(i0, (X,), (basis,))
    torch.testing.assert_close(pushed, torch.diag(torch.special.i1(X)))
    assert dn.jvp(i0, (X,), (basis[:0],))[1].shape == (0, 3)


def test_reverse_over_dual_is_recorded():
    x = X.clone().requires_grad_()
    out = i0(dn.dual(x, torch.ones_like(X)))
    out.tangent.sum().backward()
    torch.testing.assert_close(x.grad, torch.special.i0(X) - torch.special.i1(X) / X)


def test_nothing_is_recorded_without_gradients():
    with torch.no_grad():
        out = i0(dn.dual(X.clone().requires_grad_(), torch.ones_like(X)))
    assert not out.tangent.requires_grad


def test_one_tensor_as_two_arguments():
    _, pushed = dn.jvp(lambda x: torch.cross(x, 2 * x, dim=0), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(pushed, torch.zeros_like(X))
    _, pushed = dn.jvp(lambda x: torch.vdot(x, x), (X,), (torch.ones_like(X),))
    torch.testing.assert_close(pushed, 2 * X.sum())


def test_in_place_form():
    x = dn.dual(X, torch.ones_like(X)).clone()
    x.index_fill_(0, torch.tensor([0]), 5.0)
    assert x.primal[0] == 5 and x.tangent[0].tolist() == [0.0, 1.0, 1.0]


def test_a_view_made_here_is_known_to_be_one():
    x = dn.dual(X, torch.ones_like(X)).clone()
    view = torch.as_strided(x, (2,), (1,), 1)
    view.mul_(2)
    assert torch.equal(x.primal[1:], 2 * X[1:]) and x.tangent[0].tolist() == [1.0, 2.0, 2.0]


def test_out_is_refused():
    with pytest.raises(UnsupportedOpError, match="out="):
        torch.special.i0(dn.dual(X, X), out=torch.empty(3, dtype=torch.float64))


def test_an_untested_release_raises_and_warns_once(monkeypatch):
    monkeypatch.setattr(by_reverse, "TESTED", frozenset())
    releases.warn_untested.cache_clear()
    with pytest.warns(UserWarning, match="not among the releases") as caught:
        for _ in range(2):
            with pytest.raises(UnsupportedOpError, match="not verified on this release"):
                i0(dn.dual(X, X))
    assert len(caught) == 1
    releases.warn_untested.cache_clear()


def test_one_draw_for_value_and_directions():
    torch.manual_seed(3)
    plain = torch.rrelu(-X, training=True)
    after = torch.rand(())
    torch.manual_seed(3)
    y = torch.rrelu(dn.dual(-X, torch.ones_like(X)), training=True)
    assert torch.equal(y.primal, plain) and torch.equal(torch.rand(()), after)
    torch.testing.assert_close(y.tangent[0], plain / -X)


def test_a_wide_range_in_logcumsumexp_where_torch_is_wrong():
    x = torch.tensor([0.0, -50.0, 100.0], dtype=torch.float64)
    _, pushed = dn.jvp(lambda a: torch.logcumsumexp(a, 0), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(pushed, torch.ones_like(x))


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 3, 3)], ids=str)
def test_geqrf_which_torch_cannot_differentiate(shape):
    a, t = (torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    _, pushed = dn.jvp(torch.geqrf, (a,), (t,))
    slopes = five_point(lambda h: list(torch.geqrf(a + h * t)))
    for got, wanted in zip(pushed, slopes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
