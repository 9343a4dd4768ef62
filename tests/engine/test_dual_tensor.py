"""A dual looks like a tensor, reads its value, and refuses by name what would drop its tangents."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import dualnn as dn
from dualnn.engine import DualnnError, DualShapeError, UnsupportedOpError
from dualnn.engine.registry import Sample
from tests.engine.oracles import rand

X = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]], dtype=torch.float64)


def make(num: int = 2) -> dn.DualTensor:
    return dn.dual(X.clone(), rand(3)(num, *X.shape))


def test_it_is_a_tensor():
    d = make()
    assert isinstance(d, Tensor) and isinstance(d, dn.DualTensor)
    assert not isinstance(X, dn.DualTensor)
    assert d.shape == X.shape and d.size() == X.shape and d.size(-1) == 3 and len(d) == 2
    assert d.dtype == torch.float64 and d.device == X.device and d.layout == torch.strided
    assert d.ndim == d.dim() == 2 and d.numel() == d.nelement() == 6 and d.stride() == (3, 1)
    assert d.is_floating_point() and not d.is_complex() and d.is_contiguous() and not d.is_cuda
    assert d.element_size() == 8 and d.nbytes == 48
    assert d.num_tangents == 2 and d.tangent.shape == (2, 2, 3) and torch.equal(d.primal, X)
    assert d.grad is None and d.grad_fn is None and d.is_leaf and not d.requires_grad
    assert "DualTensor" in repr(d) and "num_tangents=2" in repr(d)
    assert len({d, d}) == 1


def test_requires_grad_reads_both_parts():
    assert dn.dual(X.clone().requires_grad_(), X).requires_grad
    assert dn.dual(X, X.clone().requires_grad_()).requires_grad
    assert not (dn.dual(X.clone().requires_grad_(), X) > 0).requires_grad


def test_single_direction_needs_no_k():
    assert dn.dual(X, X).tangent.shape == (1, 2, 3)
    assert dn.dual(torch.tensor(1.0), torch.tensor([1.0, 2.0])).num_tangents == 2
    assert dn.dual(X, X.new_zeros(0, 2, 3)).sin().tangent.shape == (0, 2, 3)


def test_scalars_and_formatting_read_the_value():
    d = make()
    assert float(d[0, 0]) == 1.0 and int(d[1, 0]) == 3 and bool(d[0, 0]) and complex(d[0, 0]) == 1.0
    assert d[0, 0].item() == 1.0 and d.tolist() == X.tolist()
    assert f"{d[0, 0]:.2f}" == "1.00" and math.sin(d[0, 0]) == math.sin(1.0)
    assert str(d[0, 0].primal) in str(d[0, 0])
    assert 3.0 in d and torch.equal(d, X) and torch.allclose(d, X)


@pytest.mark.parametrize(
    "compare",
    [
        lambda a, b: a > b,
        lambda a, b: a <= b,
        lambda a, b: a == b,
        lambda a, b: a != b,
        torch.ge,
        torch.isclose,
        lambda a, b: torch.logical_and(a, b),
        lambda a, b: a.argmax(1),
        lambda a, b: torch.argsort(a),
        lambda a, b: a.isnan(),
        lambda a, b: a // 2.0,
    ],
)
def test_comparisons_are_plain(compare):
    out = compare(make(), X * 0.5)
    assert type(out) is Tensor and torch.equal(out, compare(X, X * 0.5))


def test_iteration_and_unpacking_stay_dual():
    d = make()
    rows = list(d)
    assert len(rows) == 2 and all(torch.equal(r.tangent, d.tangent[:, i]) for i, r in enumerate(rows))
    first, second = d
    assert torch.equal((first + second).tangent, d.tangent.sum(1))
    assert torch.equal(reversed(d).tangent, d.tangent.flip(1))
    assert torch.equal(torch.stack(list(d.unbind(1)), 1).tangent, d.tangent)


@pytest.mark.parametrize(
    "create",
    [
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.full_like(x, 2.0),
        lambda x: x.new_zeros(2),
        lambda x: x.new_ones(2, 2),
        lambda x: x.new_empty((3,)),
        lambda x: x.new_full((2,), 1.5),
        lambda x: x.new_tensor([1.0, 2.0]),
    ],
)
def test_creation_from_a_dual_is_dual(create):
    d = make()
    out = create(d)
    assert isinstance(out, dn.DualTensor) and out.num_tangents == 2 and out.level == d.level
    assert not out.tangent.any()
    assert (out + 0 * d.sum()).tangent.shape == (2, *out.shape)


def test_creation_of_integers_is_plain():
    assert type(torch.zeros_like(make(), dtype=torch.long)) is Tensor
    assert type(make().long()) is Tensor and type(make().bool()) is Tensor


def test_conversion_keeps_the_tangent():
    d = make()
    for out in (d.float(), d.to(torch.float32), d.to(torch.zeros(1)), d.type(torch.float32), d.type_as(torch.zeros(1))):
        assert out.dtype == torch.float32 and torch.equal(out.tangent, d.tangent.float())
    assert d.double() is d and d.to("cpu") is d and d.contiguous() is d and (+d) is d
    assert X.float().to(d).dtype == torch.float64
    assert d.type() == "torch.DoubleTensor"


@pytest.mark.parametrize(
    ("leave", "cure"),
    [
        (lambda d: d.numpy(), "primal"),
        (lambda d: np.asarray(d), "primal"),
        (lambda d: np.sin(d), "primal"),
        (lambda d: d.__dlpack__(), "primal"),
        (lambda d: torch.from_dlpack(d), "primal"),
        (lambda d: d.untyped_storage(), "primal"),
        (lambda d: d.share_memory_(), "primal"),
        (lambda d: d.__cuda_array_interface__, "primal"),
        (lambda d: d.new_tensor(d), "clone"),
        (lambda d: torch.full_like(d, d[0, 0]), "expand"),
        (lambda d: d.new_full((2,), d[0, 0]), "expand"),
        (lambda d: pickle.dumps(d), "primal"),
        (lambda d: copy.copy(d), "primal"),
        (lambda d: copy.deepcopy(d), "primal"),
        (lambda d: d.sum().backward(), "tangent"),
        (lambda d: Tensor.backward(d), "tangent"),
        (lambda d: torch.autograd.backward(d.sum()), "torch.autograd.backward"),
        (lambda d: torch.autograd.grad(d.sum(), d), "torch.autograd.grad"),
        (lambda d: setattr(d, "data", X), "data"),
        (lambda d: setattr(d, "grad", X), "grad"),
        (lambda d: torch.vmap(torch.sin)(d), "dualnn"),
    ],
)
def test_leaving_the_duals_raises_with_the_cure(leave, cure):
    with pytest.raises(UnsupportedOpError, match=cure):
        leave(make())


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_copying_into_a_new_tensor_raises():
    for copied in (torch.tensor, torch.DoubleTensor, X.new_tensor):
        with pytest.raises(UnsupportedOpError, match="clone"):
            copied(make())


def test_as_tensor_keeps_the_dual():
    d = make()
    assert torch.as_tensor(d) is d and torch.asarray(d) is d


def test_a_dual_is_no_parameter():
    with pytest.raises(RuntimeError):  # torch's own error
        torch.nn.Parameter(make())
    with pytest.raises(TypeError):
        torch.nn.Linear(2, 2).weight = make()


@pytest.mark.parametrize(
    ("primal", "tangent", "message"),
    [
        (X, torch.zeros(2, 3, 2, dtype=torch.float64), "does not fit"),
        (X, torch.zeros(3, dtype=torch.float64), "does not fit"),
        (X, torch.zeros(1, 1, 2, 3, dtype=torch.float64), "does not fit"),
        (X, torch.zeros(2, 3), "float32.*tangent.to"),
        (X, torch.zeros(2, 3, dtype=torch.long), "int64"),
        (X.long(), X.long(), "int64.*float"),
        (X, torch.zeros(2, 3, dtype=torch.float64, device="meta"), "meta"),
        (X, 1.0, "float: 1.0"),
        ([1.0], X, "list"),
    ],
)
def test_parts_that_do_not_fit(primal, tangent, message):
    with pytest.raises(DualShapeError, match=message):
        dn.dual(primal, tangent)


@pytest.mark.parametrize(
    "combine",
    [torch.add, torch.mul, torch.matmul, lambda a, b: torch.stack([a, b]), lambda a, b: torch.where(a > 0, a, b)],
)
@pytest.mark.parametrize("nums", [(1, 2), (2, 3), (0, 1)])
def test_disagreeing_k(combine, nums):
    square = torch.eye(2, dtype=torch.float64)
    a, b = (dn.dual(square, square.expand(n, 2, 2)) for n in nums)
    with pytest.raises(DualShapeError, match="tangents|directions"):
        combine(a, b)


@pytest.mark.parametrize("op", [torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.atan2, torch.maximum])
def test_plain_and_dual_operands_on_either_side(op):
    a, b = X.abs() + 0.5, X.flip(1).abs() + 0.7
    t = rand(1)(2, 2, 3)
    moved = (t * 1e-6)[0]
    left, right = op(dn.dual(a, t), b), op(a, dn.dual(b, t))
    torch.testing.assert_close(left.tangent[0], (op(a + moved, b) - op(a - moved, b)) / 2e-6, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(right.tangent[0], (op(a, b + moved) - op(a, b - moved)) / 2e-6, rtol=1e-6, atol=1e-6)
    assert torch.equal(left.primal, op(a, b)) and torch.equal(right.primal, op(a, b))


@pytest.mark.parametrize(
    ("expression", "slope"),
    [
        (lambda x: 2 + x, lambda x: 1.0),
        (lambda x: x + 2, lambda x: 1.0),
        (lambda x: 2 - x, lambda x: -1.0),
        (lambda x: x - 2, lambda x: 1.0),
        (lambda x: 3 * x, lambda x: 3.0),
        (lambda x: x * 3, lambda x: 3.0),
        (lambda x: 2 / x, lambda x: -2 / x**2),
        (lambda x: x / 4, lambda x: 0.25),
        (lambda x: 2.0**x, lambda x: math.log(2) * 2**x),
        (lambda x: x**3, lambda x: 3 * x**2),
        (lambda x: x**-1, lambda x: -1 / x**2),
        (lambda x: -x, lambda x: -1.0),
        (lambda x: abs(x), lambda x: x.sign()),
        (lambda x: x % 0.75, lambda x: 1.0),
        (lambda x: np.float64(2.0) * x, lambda x: 2.0),
        (lambda x: torch.add(x, 1, alpha=2), lambda x: 1.0),
        (lambda x: torch.sub(X, x, alpha=2), lambda x: -2.0),
        (lambda x: torch.rsub(x, 1), lambda x: -1.0),
    ],
)
def test_python_numbers_on_both_sides(expression, slope):
    d = make()
    out = expression(d)
    assert torch.equal(out.primal, expression(X))
    torch.testing.assert_close(out.tangent, d.tangent * slope(X))


def test_matmul_operators():
    d, w = make(), rand(5)(3, 2)
    torch.testing.assert_close((d @ w).tangent, d.tangent @ w)
    torch.testing.assert_close((w @ d).tangent, w @ d.tangent)


def test_detach_is_a_constant():
    d = make()
    for cut in (d.detach(), torch.detach(d), d.data):
        assert type(cut) is Tensor and torch.equal(cut, X)
    assert torch.equal((d * d.detach()).tangent, d.tangent * X)


def test_no_grad_does_not_drop_the_tangent():
    with torch.no_grad():
        assert torch.equal(make().mul(2).tangent, 2 * make().tangent)


def test_operands_of_another_dtype_promote():
    single = dn.dual(X.float(), X.float())
    assert (single * X).dtype == torch.float64 and (single * X).tangent.dtype == torch.float64
    torch.testing.assert_close((single + torch.arange(3)).tangent, single.tangent)


def test_broadcasting_broadcasts_tangents():
    row = dn.dual(X[0], X[:1])
    out = row + X.unsqueeze(0).expand(4, 2, 3)
    assert out.shape == (4, 2, 3) and out.tangent.shape == (1, 4, 2, 3)
    assert torch.equal(out.tangent, X[0].expand(1, 4, 2, 3))
    for part in torch.broadcast_tensors(row, X):
        assert part.shape == (2, 3)


def test_samples_default_to_differentiating_everything():
    assert Sample((X,)).constant == () and issubclass(UnsupportedOpError, DualnnError)


def test_every_named_error_is_a_dualnn_error():
    for name in ("DualShapeError", "UnsupportedOpError", "TangentLostError", "StructureError", "UnknownNameError"):
        assert issubclass(getattr(dn.engine, name), DualnnError)
