"""Every registered rule, on the samples it brought: value, first and second derivative, K = 0."""

import pytest
import torch

import dualnn.engine
from dualnn.engine.registry import SPECS
from tests.engine.oracles import check_first, check_second, rand, separated

# torch.func.jvp is not an oracle for these (wrong or raising in some torch version).
TORCH_JVP_FAILS = {"batch_norm", "embedding", "linalg.det", "logit"}

CASES = [
    pytest.param(spec, sample, id=f"{name}-{i}")
    for name, spec in sorted(SPECS.items())
    for i, sample in enumerate(spec.samples(rand()))
]


@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_first_order(spec, sample):
    check_first(spec, sample)


@pytest.mark.parametrize(("spec", "sample"), CASES)
def test_second_order(spec, sample):
    check_second(spec, sample)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("spec", "sample"),
    [c for c in CASES if c.values[0].name not in TORCH_JVP_FAILS],
)
def test_first_order_against_torch(spec, sample):
    inputs, call, _ = separated(sample)
    directions = [torch.ones_like(x) for x in inputs]
    try:
        _, oracle = torch.func.jvp(lambda *xs: call(spec.op, *xs), tuple(inputs), tuple(directions))
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"torch.func.jvp cannot: {error}"[:80])
    duals = call(spec.op, *[dualnn.engine.dual(x, d) for x, d in zip(inputs, directions, strict=True)])
    for d, o in zip(duals, oracle, strict=True):
        torch.testing.assert_close(d.tangent[0], o, rtol=1e-9, atol=1e-9)


def test_every_rule_module_brings_samples():
    assert len(SPECS) > 150
