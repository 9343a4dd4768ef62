"""The usual stiff test problems, against their published solutions."""

import pytest
import torch

import dualnn as dn
from dualnn.bench.ivp import PROBLEMS
from dualnn.solvers import odeint
from tests.solvers.ode.problems import F64, STIFF

RTOL = {"radau": 1e-8, "rodas5p": 1e-8, "bdf": 1e-9}
# Where a relative error of 1e-6 is out of reach at these tolerances.
LOOSER = {("oregonator", "bdf"): 3e-6}


def solution(name, method, p=None):
    known = PROBLEMS[name]
    options = {"land": True} if len(known.t) > 2 else None
    p = known.p if p is None else p
    return odeint(known.fn, known.y0, known.t, (p,), method, RTOL[method], known.atol, options)[-1]


@pytest.mark.parametrize("method", STIFF)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("hires", "pollution") else pytest.mark.slow)
        for name in PROBLEMS
        if name != "e5"
    ],
)
def test_published_solutions_to_six_digits(name, method):
    published = PROBLEMS[name].y
    known = ~published.isnan()
    y = solution(name, method)
    torch.testing.assert_close(y[known], published[known], rtol=LOOSER.get((name, method), 1e-6), atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["radau", "bdf"])  # rodas5p iterates nothing, and keeps what its solves round off
def test_e5(method):
    y, published = solution("e5", method), PROBLEMS["e5"].y
    torch.testing.assert_close(y[1] * 1e22 * y[2] * 1e22, published[1] * 1e22 * published[2] * 1e22, rtol=1e-5, atol=0)
    torch.testing.assert_close(y[1], published[1], rtol=3e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hires", "oregonator", "pollution"])
def test_all_sensitivities_by_two_methods(name):
    """Relative to the parameter: d y / d log p, which differs by a hundred orders of magnitude otherwise."""
    p = PROBLEMS[name].p
    found = [dn.jvp(lambda p, m=m: solution(name, m, p), (p,), (torch.diag(p),))[1] for m in ("radau", "rodas5p")]
    scale = found[0].abs().amax(0)
    assert bool((scale > 0).all())
    torch.testing.assert_close(found[0] / scale, found[1] / scale, rtol=0, atol=2e-6)


def test_parameters_may_be_batched():
    for name, known in PROBLEMS.items():
        generator = torch.Generator().manual_seed(0)
        y = known.y0 + torch.rand(3, len(known.y0), dtype=F64, generator=generator) * (known.y0.abs() + 1e-6)
        t = torch.full((3, 1), 0.5, dtype=F64)
        p = known.p * torch.tensor([[1.0], [1.1], [0.9]], dtype=F64)
        each = torch.stack([known.fn(t[i, 0], y[i], p[i]) for i in range(3)])
        torch.testing.assert_close(known.fn(t, y, p), each, msg=name)
