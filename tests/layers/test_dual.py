import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError, TangentLostError, UnknownNameError
from dualnn.engine.snapshot import RandomStates
from dualnn.layers import Dual
from dualnn.training.meters import LiveBytes
from tests.layers.functions import (
    Channels,
    assert_same_gradients,
    cube_root,
    cube_root_unrolled,
    decay,
    gradients,
    kepler,
    kepler_unrolled,
)

F64 = torch.float64


def positive(*shape):
    return (torch.rand(shape, dtype=F64) + 0.5).requires_grad_()


@pytest.mark.parametrize("structure", ["elementwise", "dense", "auto"])
def test_a_loop_that_autograd_loses(structure):
    a = positive(3, 2)
    assert not cube_root(a).requires_grad
    assert_same_gradients(Dual(cube_root, structure)(a), cube_root_unrolled(a), [a])


@pytest.mark.parametrize("structure", ["elementwise", "dense"])
@pytest.mark.parametrize("shapes", [((4, 3), (3,)), ((3,), (4, 3)), ((4, 1), (3,)), ((), (2, 2)), ((2, 3), (2, 3))])
def test_broadcast_arguments(structure, shapes):
    mean, e = positive(*shapes[0]), (positive(*shapes[1]).detach() / 2).requires_grad_()
    assert_same_gradients(Dual(kepler, structure)(mean, e), kepler_unrolled(mean, e), [mean, e])


def test_keywords_constants_and_nested_outputs():
    x, rate = positive(3), positive(3)
    layer = Dual(decay, "dense")
    for name, value in (("end", lambda y: y), ("total", torch.sum)):
        y = x
        for _ in range(4):
            y = y - rate * y.roll(1, 0)
        out = layer(x, rate=rate, steps=4)
        assert list(out) == ["end", "total"]
        assert_same_gradients(out[name], value(y), [x, rate])


@pytest.mark.parametrize("structure", ["elementwise", "dense", "auto"])
@pytest.mark.parametrize("shape", [(4, 3), (3, 3), (2, 3, 2, 2), (2, 3, 3, 3), (2, 3, 2, 3)])
def test_parameters_per_channel(structure, shape):
    layer, control = Dual(Channels(3), structure), Channels(3, gradient=True)
    layer.fn.load_state_dict(control.state_dict())
    x = torch.randn(*shape, dtype=F64, requires_grad=True)
    ours, theirs = layer(x), control(x)
    weight = torch.randn(*shape, dtype=F64)
    for a, b in zip(
        gradients((ours * weight).sum(), [x, *layer.parameters()]),
        gradients((theirs * weight).sum(), [x, *control.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert layer.local.chosen == ("dense" if structure == "dense" else "elementwise")


def test_names_are_the_functions():
    layer = Dual(Channels(3))
    assert list(layer.state_dict()) == ["fn.rate", "fn.gain"]
    assert "structure='auto'" in repr(layer) and "cube_root" in repr(Dual(cube_root))


def test_a_complex_input_that_is_differentiated_is_refused():
    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex64)
    layer = Dual(lambda x, z: x * z.real**2)
    torch.testing.assert_close(layer(x, z), x * z.real**2)
    z.requires_grad_()
    with pytest.raises(DualInputError, match="complex"):
        layer(x, z)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, z), x * z.real**2)


def test_integer_inputs_are_constants():
    x, index = positive(4), torch.tensor([1, 0, 3, 3])
    layer = Dual(lambda x, i: x.detach()[i] * 0 + x[i] ** 2, "dense")
    assert_same_gradients(layer(x, index), x[index] ** 2, [x])
    with pytest.raises(DualInputError, match="no floating point tensor"):
        layer(index, index)


def test_auto_shows_its_choice():
    soft = Dual(lambda x: torch.softmax(x, -1))
    x = positive(2, 3)
    assert soft.local.chosen is None
    assert_same_gradients(soft(x), torch.softmax(x, -1), [x])
    assert soft.local.chosen == "block"


def test_auto_sees_flags_and_modes():
    layer = Dual(lambda x, flip=False: x.flip(0) * 2 if flip else x * 2)
    x = positive(3)
    assert_same_gradients(layer(x), 2 * x, [x])
    assert_same_gradients(layer(x, flip=True), 2 * x.flip(0), [x])
    norm = Dual(nn.BatchNorm1d(2).double())
    x = positive(4, 2)
    for training in (False, True, False):
        norm.train(training)
        fresh = copy.deepcopy(norm.fn)
        assert_same_gradients(norm(x), fresh(x), [x])


COUPLED = {
    "softmax": lambda x: torch.softmax(x, 0),
    "flip": lambda x: x.flip(0),
    "cumsum": lambda x: x.cumsum(0),
    "mean": lambda x: x - x.mean(),
    "detached mean": lambda x: x - x.mean().detach(),
    "item": lambda x: x * float(x.abs().max()),
    "batchnorm": nn.BatchNorm1d(3).double(),
    "sum": lambda x: x.sum(0),
    "two outputs": lambda x: (x, x),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_wrong_claim_is_refused(name):
    with pytest.raises(StructureError):
        Dual(COUPLED[name], "elementwise")(torch.randn(6, 3, dtype=F64))


def test_a_large_dense_jacobian_is_refused_unless_insisted_on():
    x = torch.randn(4097)
    with pytest.raises(StructureError, match="4097 tangents.*structure='dense'"):
        Dual(lambda x: x.flip(0))(x)


CUT = {
    "constant": lambda x: torch.ones_like(x.detach()),
    "detach": lambda x: x.detach() * 2,
    "item": lambda x: torch.tensor([v.item() for v in x], dtype=F64),
    "round": torch.round,
}


@pytest.mark.parametrize("structure", ["elementwise", "dense", "auto"])
@pytest.mark.parametrize("name", CUT)
def test_a_result_without_derivative_is_refused(name, structure):
    with pytest.raises(TangentLostError):
        Dual(CUT[name], structure)(positive(3))


@pytest.mark.parametrize("wrong", [{"structure": "elementwize"}, {"probe_every": 0}])
def test_bad_options(wrong):
    with pytest.raises((UnknownNameError, DualInputError), match="did you mean 'elementwise'|at least 1"):
        Dual(cube_root, **wrong)
    with pytest.raises(DualInputError, match="wraps a function or module"):
        Dual(3)


def test_a_nan_stays_where_it_is():
    x = torch.tensor([0.3, float("nan"), 0.7], dtype=F64, requires_grad=True)
    y = Dual(kepler, "elementwise")(x, torch.tensor(0.5, dtype=F64))
    y.sum().backward()
    assert x.grad.isnan().tolist() == y.isnan().tolist() == [False, True, False]


EVERY = [{"structure": s} for s in ("elementwise", "block", "dense", "auto")]
EVERY.append({"structure": "random", "tangents": 1})


@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["structure"])
@pytest.mark.parametrize("result", [3.0, None, torch.tensor(2), torch.ones(2, 3, dtype=F64)], ids=str)
def test_a_plain_constant_is_refused(result, options):
    with pytest.raises(TangentLostError, match="constant"):
        Dual(lambda x: result, **options)(positive(2, 3))


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["structure"])
def test_integer_inputs_alone_are_refused(options):
    with pytest.raises(DualInputError, match="no floating point tensor"):
        Dual(lambda x: x * 2, **options)(torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("options", [o for o in EVERY if o["structure"] != "dense"], ids=lambda o: o["structure"])
def test_nan_hides_no_structure(options):
    """A claim that was accepted among nan would hold for the next thousand calls."""
    layer, x = Dual(lambda x: torch.softmax(x, -1), **options), positive(2, 3)
    with pytest.raises(DualInputError, match="all outputs are nan or inf"):
        layer(x * float("nan"))
    if options["structure"] == "auto":
        assert_same_gradients(layer(x), torch.softmax(x, -1), [x])
        assert layer.local.chosen == "block"


def test_dense_claims_nothing_and_takes_nan():
    x = positive(3)
    Dual(lambda x: x.flip(0) * 2, "dense")(x * float("nan")).sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("options", EVERY, ids=lambda o: o["structure"])
@pytest.mark.filterwarnings("ignore::dualnn.layers.local.EstimateWarning")
def test_a_flat_spot_is_no_constant(options):
    x = positive(2, 3)
    Dual(lambda x: torch.relu(-x), **options)(x).sum().backward()
    assert not x.grad.any()


def test_an_empty_batch():
    layer = Dual(Channels(3))
    x = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 3) and layer.fn.rate.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("structure", ["elementwise", "dense"])
def test_higher_orders(structure):
    a = positive(2)
    layer = Dual(cube_root, structure)
    ours, theirs = layer(a), cube_root_unrolled(a)
    for order in range(3):
        ours, theirs = (torch.autograd.grad(y.sum(), a, create_graph=True)[0] for y in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=f"order {order + 1}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch.func.jvp's first call
@pytest.mark.parametrize("structure", ["elementwise", "dense", "auto"])
def test_torch_func(structure):
    x, e = positive(4).detach(), torch.full((4,), 0.4, dtype=F64)
    layer = Dual(kepler, structure)

    def both(transform):
        return transform(lambda *a: layer(*a).sum()), transform(lambda *a: kepler_unrolled(*a).sum())

    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, e),
        lambda f: torch.func.vmap(torch.func.grad(f, (0, 1)))(x, e),
        lambda f: torch.func.vmap(f, in_dims=(0, None))(x, e),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x, e).square().sum())(x),
        lambda f: torch.func.jvp(f, (x, e), (e, x)),
        lambda f: torch.func.jvp(lambda x: torch.func.grad(f)(x, e), (x,), (e,)),
        lambda f: torch.func.jacrev(torch.func.grad(f))(x, e),
    ):
        ours, theirs = both(transform)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", ["elementwise", "dense", "auto"])
def test_duals_pass_through(structure):
    x, e, v = positive(3), torch.full((3,), 0.4, dtype=F64), torch.randn(2, 3, dtype=F64)
    layer = Dual(kepler, structure)
    ours, theirs = (dn.jvp(f, (x, e), (v, 2 * v)) for f in (layer, kepler_unrolled))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    def second(f):
        return dn.jvp(lambda x: dn.jvp(lambda u: f(u, e), (x,), (v,))[1], (x,), (v[0],))[1]

    torch.testing.assert_close(second(layer), second(kepler_unrolled), rtol=1e-9, atol=1e-9)


def test_a_copy_runs_on_its_own_weights():
    layer = Dual(Channels(3))
    x = torch.randn(4, 3, dtype=F64)
    before = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            twin.fn.rate.fill_(0)
        torch.testing.assert_close(twin(x), x)
        assert torch.equal(layer(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(Dual(cube_root)))(x.exp()), cube_root(x.exp()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it at every graph break
def test_torch_compile_of_the_model():
    net = nn.Sequential(nn.Linear(3, 3), Dual(Channels(3)), nn.Linear(3, 1)).double()
    x = torch.randn(4, 3, dtype=F64)
    compiled = torch.compile(net, backend="aot_eager")
    ours, theirs = (gradients(f(x).sum(), list(net.parameters())) for f in (compiled, net))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_and_checkpointing():
    net = nn.Sequential(nn.Linear(3, 3), Dual(Channels(3)), nn.Linear(3, 1)).double()
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    plain = gradients(net(x).sum(), [x, *net.parameters()])
    again = gradients(checkpoint(net, x, use_reentrant=False).sum(), [x, *net.parameters()])
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x.float()).sum()
    half = gradients(loss, [*net.parameters()])
    for a, b in zip(plain[1:], half, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_a_random_function_leaves_the_random_state_as_one_call_does():
    layer = Dual(nn.Dropout(0.5), "elementwise")
    x = positive(100)
    torch.manual_seed(3)
    expected, after = nn.functional.dropout(x, 0.5), torch.get_rng_state()
    torch.manual_seed(3)
    y = layer(x)
    assert torch.equal(y, expected) and torch.equal(torch.get_rng_state(), after)


def test_pythons_and_numpys_generators_are_left_as_one_call_leaves_them():
    def noisy(x):
        return x * random.random() + float(np.random.rand()) * torch.rand(())

    x, states = positive(4), RandomStates()
    expected, after = noisy(x), (random.getstate(), np.random.get_state()[1].tolist())
    states.restore()
    y = Dual(noisy, "elementwise")(x)
    assert torch.equal(y, expected) and after == (random.getstate(), np.random.get_state()[1].tolist())


def test_statistics_are_updated_once():
    layer, control = Dual(nn.BatchNorm1d(3)), nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    layer(x), control(x)
    for ours, theirs in zip(layer.buffers(), control.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("structure", ["elementwise", "dense"])
def test_live_bytes_do_not_depend_on_the_steps(structure):
    def live(steps):
        def spring(x, k):
            with torch.no_grad():
                for _ in range(steps):
                    x = x - 0.01 * k * x
                return x

        x, k = torch.rand(8, requires_grad=True), torch.tensor([1.5], requires_grad=True)
        with LiveBytes() as meter:
            Dual(spring, structure)(x, k).sum().backward()
        return meter.peak

    assert live(10) == live(300)
