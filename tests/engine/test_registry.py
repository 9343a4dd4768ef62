"""The registry: nothing is registered twice, nothing unknown is followed, nothing drops a tangent."""

import pytest
import torch

import dualnn as dn
from dualnn.engine import StructureError, UnsupportedOpError, by_reverse, registry, releases
from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.dual_tensor import make as make_dual
from dualnn.engine.registry import RULES, SPECS, OpSpec, op_name, register, rule_for, spellings
from dualnn.engine.rules.trusted_samples import sampled
from dualnn.engine.tangents import Dense, PerSample

X = torch.tensor([0.5, 2.0])
MYSTERY = torch.library.custom_op(
    "dualnn_tests::mystery", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
)


def make():
    return dn.dual(X, torch.ones(2))


def rule(func, args, kwargs):
    raise AssertionError("never called")


def test_a_duplicate_raises():
    with pytest.raises(ValueError, match="already has a dual rule"):
        register(torch.tanh, rule=rule)
    with pytest.raises(ValueError, match="'tanh' is already registered"):
        register(rule=rule, spec=OpSpec("tanh", torch.tanh, lambda rand: []))


def test_registering_one_callable_under_several_names_is_no_duplicate(monkeypatch):
    monkeypatch.setattr(registry, "RULES", {})
    register(torch.fft.fft, torch.fft.fft, rule=rule)
    assert registry.RULES == {torch.fft.fft: rule}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: torch.special.bessel_j0(x), "bessel_j0"),
        (lambda x: torch.special.airy_ai(x), "airy_ai"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantize_per_tensor"),
        (lambda x: torch.linalg.ldl_factor(x.expand(2, 2)), "ldl_factor"),
        (lambda x: x.resize_(3), "Tensor.resize_"),
        (lambda x: torch.zeros(2).bernoulli_(x.sigmoid()), "Tensor.bernoulli_"),
        (lambda x: torch.full((2,), x[0]), "full|_local_scalar_dense"),
        (lambda x: torch.linspace(x[0], x[1], 3), "torch.linspace"),
        (lambda x: torch.special.zeta(x, 2.0), "zeta"),
        (lambda x: MYSTERY(x), "mystery"),
    ],
)
def test_an_op_without_a_rule_raises_with_its_name(call, name):
    with pytest.raises(UnsupportedOpError, match=name):
        call(make())
    with pytest.raises(NotImplementedError):
        call(make())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, o: torch.sin(x, out=o),
        lambda x, o: torch.add(x, x, out=o),
        lambda x, o: torch.cumsum(x, 0, out=o),
        lambda x, o: torch.where(X > 1, x, x, out=o),
        lambda x, o: torch.cat([x], out=o),
        lambda x, o: torch.cumprod(x, 0, out=o),
        lambda x, o: torch.clamp(x, 0, 1, out=o),
        lambda x, o: torch.norm(x, out=o),
    ],
)
@pytest.mark.parametrize("dual_out", [False, True])
def test_out_raises(call, dual_out):
    with pytest.raises(UnsupportedOpError, match="out"):
        call(make(), make() if dual_out else torch.zeros(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.matmul(x, X, wrong=1),
        lambda x: torch.where(X > 1, x, x, wrong=1),
        lambda x: torch.nn.functional.linear(x, X, wrong=1),
        lambda x: torch.lerp(x, x, 0.5, wrong=1),
        lambda x: torch.sin(x, wrong=1),
        lambda x: torch.sum(x, wrong=1),
        lambda x: torch.add(x, x, wrong=1),
        lambda x: torch.cat([x], wrong=1),
        lambda x: torch.nn.functional.mse_loss(x, X, wrong=1),
        lambda x: torch.cumprod(x, 0, wrong=1),
        lambda x: x.reshape(2, wrong=1),
    ],
)
def test_an_unknown_keyword_raises(call):
    with pytest.raises((UnsupportedOpError, TypeError), match="wrong"):
        call(make())


def test_numpy_keywords_of_torch_work():
    d = dn.dual(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.sum(d, axis=1, keepdims=True).shape == (2, 1)
    assert torch.sum(input=d, dim=0).tangent.shape == (1, 3)
    assert torch.mul(input=d, other=2.0).tangent.sum() == 12


def test_the_backstop_catches_what_slips_past_the_rules():
    d = make()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(UnsupportedOpError, match="aten.sin"):
        torch.sin(d)
    with pytest.raises(UnsupportedOpError, match="aten.add"):
        torch.ops.aten.add.Tensor(d, d)
    with pytest.raises(UnsupportedOpError):
        torch.vmap(torch.cos)(d)


def test_names():
    assert op_name(torch.tanh) == "torch.tanh" and op_name(torch.Tensor.put_) == "Tensor.put_"
    assert op_name(torch.linalg.qr).endswith("linalg_qr") and op_name(torch.Tensor.grad.__get__) == "Tensor.grad"
    assert torch.Tensor.exp in spellings("exp") and torch.Tensor.exp not in spellings("exp", method=False)


def test_a_found_rule_is_remembered():
    func = torch.nn.functional.softsign
    torch.nn.functional.softsign(make())
    assert func in RULES and rule_for(func) is RULES[func]


TRUSTED = [f for f, served in RULES.items() if served is reverse_rule]


def test_trusted_ops_bring_samples():
    assert len(TRUSTED) > 100
    assert len([name for name in SPECS if name.startswith("trusted.")]) > 50
    with pytest.raises(ValueError, match="has samples, and no rule"):
        sampled("mystery", lambda rand: [], functions=[MYSTERY])


def test_trusted_ops_mix_with_integer_results_and_constants():
    d = dn.dual(torch.tensor([3.0, 1.0, 2.0]), torch.eye(3))
    values, where = torch.kthvalue(d, 2)
    assert int(where) == 2 and torch.equal(values.tangent, torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(torch.kron(torch.ones(2), d).tangent[0], torch.tensor([1.0, 0, 0, 1, 0, 0]))
    assert not torch.cumprod(torch.zeros_like(d), 0).tangent.any()
    with pytest.raises(UnsupportedOpError, match="out="):
        torch.kron(d, d, out=torch.zeros(9))


def test_trusted_ops_keep_samples_apart_or_raise():
    loss = make_dual(torch.tensor(2.0), PerSample(torch.ones(4), 2), 1)
    other = make_dual(torch.tensor(3.0), PerSample(torch.ones(4), 2), 1)
    assert isinstance(torch.special.entr(loss)._tan, PerSample)
    assert isinstance(torch.special.xlog1py(loss, other)._tan, PerSample)
    with pytest.raises(StructureError):
        torch.special.xlog1py(loss, make_dual(torch.ones(2), Dense(torch.ones(4, 2)), 1))


def test_an_untested_torch_is_not_trusted_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(by_reverse, "TESTED", {(1, 0)})
    monkeypatch.setattr(releases, "TESTED", {(1, 0)})
    releases.warn_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"not among the releases .*1\.0") as caught:
        for func in TRUSTED:
            with pytest.raises(UnsupportedOpError, match="not verified on this release"):
                RULES[func](func, (make(),), {})
    assert len(caught) == 1
    assert torch.equal(torch.tanh(make()).primal, torch.tanh(X))  # our own rules do not ask torch
    releases.warn_untested.cache_clear()


def test_this_torch_is_tested():
    assert releases.release() in releases.TESTED
