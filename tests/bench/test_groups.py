"""Every benchmark of every group runs in its small size, and its arms agree, without the extra."""

import sys

import pytest
import torch

from dualnn.bench import Settings, Unavailable, run
from dualnn.bench.groups import GROUPS
from dualnn.bench.peers import Compiled, checkpointed, require

QUICK = Settings(quick=True)
CASES = [pytest.param(g, n, id=f"{g}/{n}") for g, members in GROUPS.items() for n in members.names]


@pytest.fixture
def without_the_extra(monkeypatch):
    for name in ("jax", "optimistix", "diffrax", "casadi"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("dualnn.bench.peers._jax", [])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at an intermediate result's
@pytest.mark.parametrize(("group", "name"), CASES)
def test_it_runs_and_agrees(group, name, without_the_extra):
    for benchmark in GROUPS[group].benchmarks(QUICK):
        if benchmark.name != name:
            continue
        result = run(benchmark, QUICK)
        assert any(t.side == "ours" for t in result.timings) and any(t.side == "peer" for t in result.timings)
        # Torch's forward mode has no rule for fused attention.
        expected = (" is not installed", "NotImplementedError: Trying to use forward AD with")
        assert all(any(part in why for part in expected) for why in result.missing.values()), result.missing


def test_an_absent_package_is_unavailable_and_a_broken_one_is_not(without_the_extra, tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match=r"dualnn\[bench\]"):
        require("jax")
    (tmp_path / "broken_peer.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("broken_peer")


def test_what_dynamo_cannot_follow_is_recorded_and_remarked():
    def two_levels(x):
        return torch.func.jvp(lambda a: torch.vmap(torch.func.jacfwd(torch.sin))(a), (x,), (torch.ones_like(x),))[1]

    x = torch.linspace(0, 1, 3, dtype=torch.float64)
    plain, other = Compiled(torch.sin, (x,), "eager"), Compiled(two_levels, (x,), "eager")
    assert plain.remark == "" and torch.equal(plain(), x.sin())
    assert torch.allclose(other(), -x.sin())


@pytest.mark.parametrize(("steps", "segment"), [(7, 3), (6, 6), (4, 9), (5, 1)])
def test_checkpoints_change_no_gradient(steps, segment):
    x, p = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.7))

    def step(state, p):
        y, i = state
        return torch.sin(p * y) + i, i + 1

    y, count = checkpointed(step, (x, 0), steps, segment, p)
    expected = (x, 0)
    for _ in range(steps):
        expected = step(expected, p)
    assert count == steps
    for a, b in zip(torch.autograd.grad(y, (x, p)), torch.autograd.grad(expected[0], (x, p)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
