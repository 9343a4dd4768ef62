"""BlackBox: numpy code in a network; its derivative against closed forms, autograd and dual tensors."""

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor, func, nn

import dualnn as dn
from dualnn.engine.errors import DualInputError, StructureError, UnknownNameError, UnsupportedOpError
from dualnn.engine.gradcheck import FIRST, SECOND
from dualnn.layers import BlackBox

# torch's forward AD loads decompositions with the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


def mixing(x: np.ndarray) -> np.ndarray:
    return np.stack([x.prod(-1), np.sin(x).sum(-1)], -1)


def mixing_torch(x: Tensor) -> Tensor:
    return torch.stack([x.prod(-1), x.sin().sum(-1)], -1)


def pair(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.tanh(x * p)


def matrix(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.sin(x @ p.reshape(3, 2))


def matrix_torch(x: Tensor, p: Tensor) -> Tensor:
    return torch.sin(x @ p.reshape(3, 2))


# (structure, numpy, torch, shapes of the arguments)
CASES = {
    "elementwise": ("elementwise", np.sin, torch.sin, [(4, 3)]),
    "elementwise scalar": ("elementwise", np.sin, torch.sin, [()]),
    "elementwise broadcast": ("elementwise", pair, lambda x, p: torch.tanh(x * p), [(4, 3), (3,)]),
    "block": ("block", mixing, mixing_torch, [(4, 3)]),
    "block of one": ("block", mixing, mixing_torch, [(3,)]),
    "block of a grid": ("block", mixing, mixing_torch, [(2, 4, 3)]),
    "block to numbers": ("block", lambda x: x.prod(-1), lambda x: x.prod(-1), [(4, 3)]),
    "block to matrices": (
        "block",
        lambda x: x[..., :, None] * x[..., None, :],
        lambda x: x[..., :, None] * x[..., None, :],
        [(4, 3)],
    ),
    "block shared": (
        "block",
        lambda x, p: np.sin((x * p[:3]).sum(-1)) * p[3],
        lambda x, p: torch.sin((x * p[:3]).sum(-1)) * p[3],
        [(4, 3), (4,)],
    ),
    "block to vectors, shared": ("block", matrix, matrix_torch, [(4, 3), (6,)]),
    "dense": ("dense", lambda x: np.fft.irfft(x), lambda x: torch.fft.irfft(x + 0j), [(5,)]),
    "dense of two": ("dense", lambda a, b: np.sin(a @ b), lambda a, b: torch.sin(a @ b), [(2, 3), (3, 2)]),
    "dense to a number": ("dense", lambda a: (a**3).sum(), lambda a: (a**3).sum(), [(2, 3)]),
    "empty batch": ("block", mixing, mixing_torch, [(0, 3)]),
    "empty": ("elementwise", np.sin, torch.sin, [(0,)]),
    "empty dense": ("dense", lambda x: np.sin(x), torch.sin, [(0,)]),
    "no features": ("block", lambda x: x.sum(-1), lambda x: x.sum(-1), [(4, 0)]),
}  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arguments(shapes, dtype=torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.rand(s, dtype=dtype) + 0.5 for s in shapes)


@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_value_and_gradient(case, dtype: torch.dtype) -> None:
    structure, fn, truth, shapes = case
    box = BlackBox(fn, structure)
    args = arguments(shapes, dtype)
    wide = tuple(a.double() for a in args)
    y, exact = box(*args), truth(*wide)
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 3e-7, "atol": 3e-7}
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, **tolerance)
    w = torch.randn_like(exact)
    ours, theirs = ([a.clone().requires_grad_() for a in some] for some in (args, wide))
    (box(*ours) * w.to(dtype)).sum().backward()
    (truth(*theirs) * w).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, **tolerance)


@EVERY_CASE
def test_forward_mode_agrees_with_reverse(case) -> None:
    structure, fn, truth, shapes = case
    args = arguments(shapes)
    tangents = tuple(torch.randn(3, *a.shape, dtype=torch.float64) for a in args)
    ours, theirs = dn.jvp(BlackBox(fn, structure), args, tangents), dn.jvp(truth, args, tangents)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@EVERY_CASE
def test_torch_func(case) -> None:
    structure, fn, truth, shapes = case
    if any(0 in s for s in shapes):
        pytest.skip("torch.func itself refuses some empty tensors")
    args = arguments([(5, *s) for s in shapes])
    one = tuple(a[0] for a in args)
    numbers = tuple(range(len(shapes)))
    box = BlackBox(fn, structure)
    for transform in (
        lambda f: func.vmap(f)(*args),
        lambda f: func.vmap(func.grad(lambda *a, f=f: f(*a).square().sum(), numbers))(*args),
        lambda f: func.vmap(f, in_dims=(0, *(None,) * (len(shapes) - 1)))(args[0], *one[1:]),
        lambda f: func.jacrev(f, numbers)(*one),
        lambda f: func.jvp(f, one, one),
    ):
        torch.testing.assert_close(transform(box), transform(truth), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", [c for k, c in CASES.items() if "empty" not in k and "no features" not in k])
def test_gradcheck_to_first_order(case) -> None:
    structure, fn, _, shapes = case
    report = dn.gradcheck(BlackBox(fn, structure), arguments(shapes), order=1)
    assert all(v.status == "right" for v in report.verdicts), str(report)


def test_scipy_inside_a_network_trains_what_is_before_it() -> None:
    net = nn.Sequential(nn.Linear(4, 3), BlackBox(scipy.special.gammaln, "elementwise"), nn.Linear(3, 1)).double()
    x = torch.rand(8, 4, dtype=torch.float64) + 1
    nn.init.constant_(net[0].weight, 0.5)
    nn.init.constant_(net[0].bias, 1.0)
    truth = nn.Sequential(net[0], _Lgamma(), net[2])
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (net, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class _Lgamma(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x)


def test_float32_data_are_differenced_in_float64() -> None:
    seen = set()

    def fn(x: np.ndarray) -> np.ndarray:
        seen.add(x.dtype)
        return np.exp(x)

    x = torch.linspace(-3, 3, 50, requires_grad=True)
    BlackBox(fn, "elementwise")(x).sum().backward()
    assert seen == {np.dtype("float64")}
    assert float((x.grad.double() / x.detach().double().exp() - 1).abs().max()) < 6.1e-8  # float32's own rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 1.0], dtype=dtype, requires_grad=True)
    y = BlackBox(np.exp, "elementwise")(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, x.detach().exp())


@pytest.mark.parametrize(("structure", "calls"), [("elementwise", 2), ("block", 6), ("dense", 24)])
def test_the_batch_shares_the_calls(structure: str, calls: int) -> None:
    count = 0

    def fn(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return np.sin(x)

    box, x = BlackBox(fn, structure), torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    box(x)  # the first call probes
    count = 0
    y = box(x)
    assert count == 1
    y.sum().backward()
    assert count == 1 + calls


def test_only_arguments_that_need_a_gradient_are_moved() -> None:
    moved = set()

    def fn(x: np.ndarray, p: np.ndarray) -> np.ndarray:
        moved.update(k for k, (a, b) in enumerate(((x, data), (p, parameters))) if not np.array_equal(a, b.detach()))
        return x @ p

    data, parameters = torch.rand(4, 100, dtype=torch.float64), torch.rand(100, dtype=torch.float64, requires_grad=True)
    box = BlackBox(fn)
    y = box(data, parameters)
    moved.clear()
    y.sum().backward()
    assert moved == {1}
    torch.testing.assert_close(parameters.grad, data.sum(0), rtol=1e-8, atol=1e-8)


JACOBIANS = {
    "elementwise": ("elementwise", np.sin, np.cos, [(4, 3)]),
    "two": ("elementwise", np.multiply, lambda x, p: (p + 0 * x, x + 0 * p), [(4, 3), (3,)]),
    "block": ("block", lambda x: x**2, lambda x: 2 * x[..., None] * np.eye(3), [(4, 3)]),
    "dense": ("dense", lambda a, b: a @ b, lambda a, b: (
        np.einsum("ik,jl->ijkl", np.eye(2), b.T), np.einsum("ik,jl->ijkl", a, np.eye(2))), [(2, 3), (3, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("case", JACOBIANS.values(), ids=JACOBIANS)
def test_a_jacobian_in_numpy(case) -> None:
    structure, fn, jacobian, shapes = case
    args = arguments(shapes)
    box, count = BlackBox(fn, structure, jacobian=jacobian), BlackBox(fn, structure)
    report = dn.gradcheck(box, args, order=1, rtol=1e-9)
    assert all(v.status == "right" for v in report.verdicts), str(report)
    ours, theirs = ([a.clone().requires_grad_() for a in args] for _ in range(2))
    box(*ours).sin().sum().backward()
    count(*theirs).sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)


def test_a_wrong_jacobian_is_found_by_gradcheck() -> None:
    box = BlackBox(np.sin, "elementwise", jacobian=np.sin)
    report = dn.gradcheck(box, torch.tensor([0.3]), order=1, raise_exception=False)
    assert {v.status for v in report.verdicts} == {"wrong"}


@pytest.mark.parametrize("structure", ["elementwise", "block", "dense"])
def test_a_second_derivative_is_a_named_error(structure: str) -> None:
    box, x = BlackBox(np.sin, structure), torch.rand(3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(box(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(g, x.cos(), rtol=1e-8, atol=1e-8)
    one = torch.ones_like(x)
    for second in (
        lambda: g.sum().backward(),
        lambda: func.hessian(lambda x: box(x).sum())(x),
        lambda: dn.jvp(lambda x: dn.jvp(box, (x,), (one,))[1], (x,), (one,)),
    ):
        with pytest.raises(UnsupportedOpError, match=r"Jacobian of BlackBox\(sin\) has no derivative.*as a diff"):
            second()


def test_a_jacobian_that_is_a_module_gives_second_derivatives() -> None:
    box = BlackBox(np.sin, "elementwise", jacobian=BlackBox(np.cos, "elementwise"))
    report = dn.gradcheck(box, torch.rand(2, 3), modes=(*FIRST, *SECOND))
    assert all(v.status == "right" for v in report.verdicts), str(report)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.diag_embed(x.cos())

    block = BlackBox(np.sin, jacobian=Outer())
    report = dn.gradcheck(block, torch.rand(2, 3), modes=(*FIRST, *SECOND))
    assert all(v.status == "right" for v in report.verdicts), str(report)


def test_a_function_that_works_in_place_gets_copies() -> None:
    def fn(x: np.ndarray) -> np.ndarray:
        x *= x
        return x

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    box = BlackBox(fn, "elementwise")
    y = box(x)
    y.sum().backward()
    assert x.tolist() == [1.0, 2.0] and y.tolist() == [1.0, 4.0]
    torch.testing.assert_close(x.grad, torch.tensor([2.0, 4.0]))


def test_constants() -> None:
    box = BlackBox(lambda x, n, k, scale=1.0: scale * x**n * k, "elementwise")
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    box(x, 2, torch.tensor([2]), scale=0.5).backward()  # an integer tensor is a constant
    torch.testing.assert_close(x.grad, torch.tensor([6.0], dtype=torch.float64))


def random(x: np.ndarray) -> np.ndarray:
    return x + np.random.default_rng().normal(size=x.shape)


@pytest.mark.parametrize(
    ("fn", "structure", "error", "message"),
    [
        (np.cumsum, "elementwise", StructureError, r"must return shape \(4, 3\), got \(12,\)"),
        (lambda x: np.cumsum(x, -1), "elementwise", StructureError, "moving half of the entries moved"),
        (lambda x: np.cumsum(x, 0), "block", StructureError, "moving half of the samples moved.*'dense'"),
        (lambda x: x - x.mean(), "block", StructureError, "moving half of the samples moved"),
        (lambda x: np.zeros(3), "block", StructureError, r"starts with \(4,\), one row for each sample, got \(3,\)"),
        (lambda x: x.sum(), "block", StructureError, r"got \(\)"),
        (lambda x: [x, [1.0]], "dense", StructureError, "no array of numbers"),
        (np.argmax, "dense", DualInputError, "returned int64 instead of floats.*Smoothed or layers.Surrogate"),
        (lambda x: None, "dense", DualInputError, "returned object instead of floats"),
        (lambda x: x > 0, "elementwise", DualInputError, "returned bool"),
        (random, "elementwise", DualInputError, "not deterministic"),
    ],
)
def test_wrong_functions_are_named(fn, structure: str, error, message: str) -> None:
    with pytest.raises(error, match=message):
        BlackBox(fn, structure)(torch.rand(4, 3))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.tensor([1, 2]),), "got torch.int64: use x.float"),
        ((3,), "got int"),
        ((), "got nothing"),
        ((torch.ones(2, dtype=torch.complex64),), "argument 0 is complex"),
        ((torch.tensor([[1.0, math.nan], [math.inf, 2.0]]),), r"2 numbers of 4 that are not fin.*first at \(0, 1\)"),
        ((torch.tensor(1.0),), "an argument has none"),
    ],
)  # fmt: skip
def test_bad_input_is_named(args, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        BlackBox(lambda x: x)(*args)


def test_more_bad_input_is_named() -> None:
    with pytest.raises(StructureError, match="samples do not broadcast"):
        BlackBox(lambda x, y: x)(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(DualInputError, match="scale= is a keyword"):
        BlackBox(lambda x, scale: x)(torch.ones(2), scale=torch.ones(2))
    with pytest.raises(UnknownNameError, match="did you mean 'block'"):
        BlackBox(np.sin, "blocks")
    with pytest.raises(DualInputError, match="wraps a function, got 3"):
        BlackBox(3)
    with pytest.raises(DualInputError, match="step is relative"):
        BlackBox(np.sin, step=2.0)
    with pytest.raises(DualInputError, match="probe_every"):
        BlackBox(np.sin, probe_every=0)


def test_differences_that_leave_the_domain_are_named() -> None:
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(DualInputError, match="1 of 2 differences"),
    ):
        BlackBox(lambda x: np.sqrt(np.where(x < 0, np.nan, x)), "elementwise")(x).sum().backward()


def test_wrong_jacobians_are_named() -> None:
    x = torch.rand(4, 3, requires_grad=True)
    with pytest.raises(StructureError, match=r"has shape \(4, 2\), expected \(4, …, 3\)"):
        BlackBox(lambda x: x**2, jacobian=lambda x: 2 * x[..., :2])(x).sum().backward()
    with pytest.raises(StructureError, match="returned 2 arrays for 1"):
        BlackBox(np.sin, "elementwise", jacobian=lambda x: (x, x))(x).sum().backward()


def test_the_probe_comes_back() -> None:
    state = {"mix": False}

    def fn(x: np.ndarray) -> np.ndarray:
        return x - x.mean() if state["mix"] else x * 1.0

    box, x = BlackBox(fn, "elementwise", probe_every=3), torch.rand(8)
    for _ in range(3):
        box(x)
    state["mix"] = True
    with pytest.raises(StructureError, match="moving half"):
        box(x)


def test_copies_pickles_and_has_no_state() -> None:
    box = BlackBox(np.sin, "elementwise")
    for other in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        torch.testing.assert_close(other(torch.ones(2)), torch.ones(2).sin())
    assert not box.state_dict()
    assert repr(box) == "BlackBox(sin, structure='elementwise', differences)"


def test_checkpointing_gives_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    box, x = BlackBox(mixing), torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(box(x).sum(), x)
    saved = torch.autograd.grad(checkpoint(box, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(plain, saved, rtol=0, atol=0)
