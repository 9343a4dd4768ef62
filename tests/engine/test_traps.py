"""Traps of a dual engine, one by one: right, or a named error, never silent.

`ELSEWHERE` says where the tests of those traps are that belong to one part of the engine; the rest are here.
"""

import ast
import pathlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import dualnn as dn
from dualnn.engine.errors import DualnnError, DualShapeError, UnsupportedOpError
from tests.engine.oracles import five_point

ELSEWHERE = {
    "a plain destination, out=plain": "engine/test_inplace.py::test_writing_a_dual_into_a_plain_tensor_raises",
    "setitem into another level": "engine/test_inplace.py::test_a_write_of_a_higher_level_raises",
    "an operand mutated later": "engine/test_inplace.py::test_an_operand_mutated_after_the_op",
    "a seed mutated later": "engine/test_inplace.py::test_a_seed_mutated_after_the_op",
    ".tangent under no_grad": "engine/test_inplace.py::test_reading_a_tangent_under_no_grad_does_not_cut_the_graph",
    "an op under no_grad": "engine/test_inplace.py::test_an_op_under_no_grad_is_not_recorded",
    "where, infinite derivative": "engine/test_nesting.py::test_where_selects_and_never_multiplies",
    "zero times infinity": "engine/test_nesting.py::test_a_structural_zero_meets_infinity",
    "a zero that moves": "engine/test_second_order.py::test_the_second_derivative_where_the_first_is_exactly_zero",
    "equal tags": "engine/test_nesting.py::test_with_one_level_for_all_the_confusion_tests_would_fail",
    "custom autograd.Function": "engine/test_inplace.py::test_custom_functions_raise_while_a_derivative_is_computed",
    "checkpoint": "engine/test_inplace.py::test_checkpoints_are_right_or_raise",
    "full backward hooks": "engine/test_inplace.py::test_module_hooks",
    "transformer fast path": "engine/test_models.py::test_a_transformer_encoder_in_eval_mode_leaves_its_fast_path",
    "flat weights of LSTM and GRU": "engine/test_parameters.py::test_recurrent_nets_are_right_or_raise",
    "state_dict while swapped": "engine/test_parameters.py::test_state_dict_while_swapped_has_plain_values",
    "deepcopy, pickle, to while swapped": "engine/test_parameters.py::test_copies_and_moves_while_swapped_raise",
    "an exception while swapped": "engine/test_parameters.py::test_restores_after_an_exception",
    "BatchNorm statistics once": "engine/test_composite.py::test_running_statistics_are_updated_once",
    "one dropout mask": "engine/test_composite.py::test_one_dropout_mask_for_value_and_tangents",
    "non-adjacent indices": "engine/test_inplace.py::test_nonadjacent_advanced_indices",
    "like-arguments": "engine/test_dual_tensor.py::test_creation_from_a_dual_is_dual",
    "shapes, dtypes, devices, integers": "engine/test_dual_tensor.py::test_parts_that_do_not_fit",
    "K mismatch": "engine/test_dual_tensor.py::test_disagreeing_k",
    "numpy(), tensor(), backward()": "engine/test_dual_tensor.py::test_leaving_the_duals_raises_with_the_cure",
    "a number that leaves is a cut": "engine/test_dual_tensor.py::test_copying_into_a_new_tensor_raises",
    "an op without a rule": "engine/test_registry.py::test_an_op_without_a_rule_raises_with_its_name",
    "an untested torch": "engine/test_registry.py::test_an_untested_torch_is_not_trusted_and_one_warning_says_so",
    "bodies re-run per version": "engine/test_composite.py::test_the_body_can_be_run_again",
}
TESTS = pathlib.Path(__file__).parents[1]
X = torch.tensor([[0.5, -1.0, 2.0], [0.3, 1.5, -0.7]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.5, -2.0], [0.1, -0.4, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize("trap", ELSEWHERE)
def test_every_trap_has_its_test(trap):
    file, name = ELSEWHERE[trap].split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def two(x=X):
    return dn.dual(x, torch.stack([torch.ones_like(x), -2 * torch.ones_like(x)]))


# Dimensions: negative, none, all, of 0-dim tensors.

DIMS = {
    "negative": lambda x: x.cumsum(-2).softmax(-1).transpose(-1, -2).flip(-1),
    "sum None": lambda x: torch.sum(x, dim=None) * torch.sum(x, dim=()) * torch.mean(x, dim=[]),
    "sum negative pair": lambda x: (x * x).sum((-2, -1)),
    "amax ()": lambda x: torch.amax(x, ()) * torch.amin(x, (-1,)),
    "norm ()": lambda x: torch.linalg.vector_norm(x, dim=()) + torch.linalg.vector_norm(x, 3, dim=-2),
    "var ()": lambda x: torch.var(x, dim=()) + torch.std(x, dim=None) + torch.var(x, -1),
    "squeeze": lambda x: x[None].sin().squeeze((-3,)).unsqueeze(-1).squeeze(),
    "flip none": lambda x: torch.flip(x, ()) ** 2,
    "0-dim": lambda x: torch.softmax(x[0, 0], 0) + x[0, 1].cumsum(-1) + x[1, 1].sort(0)[0] + x[1, 2].sum(0).max(),
    "0-dim reductions": lambda x: x[0, 0].logsumexp(0) * x[0, 0].mean(-1) + x[1, 0].norm() + x[1, 1].amax(-1),
    "roll and indices": lambda x: x.roll(1, -1)[..., -1] * x[:, None, [0, -1]].sum((-1, -2)) + x[-1:, ::2].sum(),
}


@pytest.mark.parametrize("name", DIMS)
def test_dimensions(name):
    fn = DIMS[name]
    _, slope = dn.jvp(fn, (X,), (torch.stack([V, -2 * V]),))
    (wanted,) = five_point(lambda h: [fn(X + h * V)])
    torch.testing.assert_close(slope, torch.stack([wanted, -2 * wanted]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:0] @ x.T,
        lambda x: x[:0].sum(0),
        lambda x: x[:0].max(1)[0],
        lambda x: torch.cat([x[:0], x]),
        lambda x: torch.softmax(x[:, :0], -1),
        lambda x: nn.functional.layer_norm(x[:0], (3,)),
        lambda x: x[:0].prod(),
        lambda x: torch.linalg.det(x[:0, :0]) + torch.linalg.inv(x[:0, :0]).sum(),
    ],
)
def test_empty_tensors(fn):
    y = fn(two())
    assert torch.equal(y.primal, fn(X)) and y.tangent.shape == (2, *fn(X).shape)
    assert not torch.isnan(y.tangent).any()


# K.


def test_one_direction_does_not_broadcast_over_two():
    one, many = dn.dual(X, V), two()
    for op in (torch.mul, torch.matmul, lambda a, b: torch.cat([a, b]), lambda a, b: torch.where(X > 0, a, b)):
        with pytest.raises(DualShapeError, match=r"K = \[1, 2\]"):
            op(one, many.T if op is torch.matmul else many)
    with pytest.raises(DualShapeError, match="must be"):
        dn.dual(X, V[0])


# Seeds.


@pytest.mark.parametrize("seed", [0.0, float("nan"), float("inf"), 1e308, 5e-324])
def test_extreme_seeds_scale_as_numbers_do(seed):
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    y = torch.exp(dn.dual(x, torch.stack([torch.full_like(x, seed), torch.ones_like(x)])) * 2.0)
    assert torch.equal(y.tangent[0], seed * 2.0 * torch.exp(2.0 * x)) or seed != seed
    assert bool(torch.isnan(y.tangent[0]).all()) == (seed != seed)
    torch.testing.assert_close(y.tangent[1], 2.0 * torch.exp(2.0 * x))  # the other direction does not notice


# Levels.


def test_a_nested_op_without_a_rule_raises_at_every_level():
    mystery = torch.library.custom_op(
        "dualnn_traps::mystery", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    for transform in (dn.jacobian, dn.hessian, dn.laplacian):
        with pytest.raises(UnsupportedOpError, match="mystery"):
            transform(lambda x: mystery(torch.sin(x)).sum(), X)


def test_a_dual_that_outlives_its_derivative_is_a_constant_to_the_next():
    kept = []
    dn.jvp(lambda x: kept.append(x) or x, (X,), (V,))
    out, slope = dn.jvp(lambda y: y * kept[0], (X,), (V,))
    assert torch.equal(slope.primal, V * X)
    assert torch.equal(out.tangent[0], X * V)  # and still a dual of its own level, to nobody's confusion


# Ways out.

WAYS_OUT = {
    "numpy": lambda d: d.numpy(),
    "asarray": np.asarray,
    "a ufunc": np.sin,
    "pickle": pickle.dumps,
    "new_tensor": lambda d: X.new_tensor([1.0]).copy_(d[0, :1]),
    "torch.FloatTensor": lambda d: torch.DoubleTensor(d),
    "shared memory": lambda d: d.share_memory_(),
    "to_sparse": lambda d: d.to_sparse(),
    "backward": lambda d: d.sum().backward(),
    "autograd.grad": lambda d: torch.autograd.grad(d.sum(), X),
    "torch.func.vmap": torch.func.vmap(torch.sin),
    "torch.func.grad": torch.func.grad(lambda d: d.sum()),
    "aten": torch.ops.aten.sin.default,
    "a buffer": lambda d: nn.BatchNorm1d(3).double().running_mean.copy_(d[0]),
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_no_way_out_loses_tangents_in_silence(name):
    with pytest.raises(DualnnError) as caught:
        WAYS_OUT[name](two())
    assert len(str(caught.value)) > 40  # says what to do


def test_a_parameter_cannot_be_assigned_a_dual():
    with pytest.raises(TypeError, match="weight"):
        nn.Linear(3, 3).weight = two()


# Tracing.


def test_make_fx_of_one_step_with_other_numbers_and_another_shape():
    step = make_fx(lambda x, v: dn.jvp(lambda a: (torch.tanh(a) * a).sum(0), (x,), (v,))[1])(X, V)
    for x, v in ((2 * X, -V), (X[:, :2], V[:, :2])):
        torch.testing.assert_close(step(x, v), dn.jvp(lambda a: (torch.tanh(a) * a).sum(0), (x,), (v,))[1])


def test_make_fx_bakes_parameters_in_unless_they_are_inputs():
    layer = nn.Linear(3, 2).double().requires_grad_(False)
    step = lambda w, x, v: dn.jvp(lambda a: torch.func.functional_call(layer, {"weight": w}, a), (x,), (v,))[1]  # noqa: E731
    traced = make_fx(step)(layer.weight, X, V)
    replaced = nn.Parameter(3 * layer.weight, requires_grad=False)
    torch.testing.assert_close(traced(replaced, X, V), V @ replaced.T)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compile_is_right_or_raises():
    fn = lambda x: dn.jvp(lambda a: torch.sin(a) * a, (x,), (torch.ones_like(x),))[1]  # noqa: E731
    torch.testing.assert_close(torch.compile(fn, backend="eager")(X), torch.cos(X) * X + torch.sin(X))
    out = torch.compile(lambda a: a.sin() * 2, backend="eager")(two())
    torch.testing.assert_close(out.tangent, 2 * torch.cos(X) * two().tangent)


# Reduced precision.

LOW = {
    "elementwise": lambda x: torch.tanh(x) * torch.sigmoid(x),
    "layer_norm": lambda x: nn.functional.layer_norm(x, (3,)),
    "softmax": lambda x: torch.softmax(x, -1),
    "matmul": lambda x: x @ x.mT,
    "sum": lambda x: (x * x).sum(-1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW)
def test_reduced_precision(name, dtype):
    x, v = X.to(dtype), V.to(dtype)
    y, slope = dn.jvp(LOW[name], (x,), (v,))
    assert y.dtype == slope.dtype == dtype and torch.equal(y, LOW[name](x))
    wanted = dn.jvp(LOW[name], (x.double(),), (v.double(),))[1]
    assert (slope.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * max(1, float(wanted.abs().max()))


def test_autocast():
    layer = nn.Linear(3, 3).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(dn.dual(X.float(), V.float()))
        assert torch.equal(y.primal, layer(X.float()))
    assert y.dtype == y.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(y.tangent[0].float(), V.float() @ layer.weight.T, rtol=0.02, atol=0.02)
