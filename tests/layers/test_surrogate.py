"""Surrogate: the value of the hard function, and the exact derivative of the primitive it names, in every mode."""

import copy
import math
import pickle

import mpmath
import pytest
import torch
from torch import Tensor, func

import dualnn as dn
from dualnn.engine.errors import DualInputError, DualnnError, StructureError, UnknownNameError
from dualnn.engine.gradcheck import FIRST, SECOND
from dualnn.layers import Surrogate
from dualnn.layers.surrogate import PRIMITIVES, Primitive, register_primitive

# torch's forward AD loads decompositions with the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")

EVERY_NAME = pytest.mark.parametrize("name", PRIMITIVES)
POINTS = torch.tensor([-3.1, -0.9, -0.31, 0.02, 0.4, 0.77, 1.3], dtype=torch.float64)

# an implementation of the primitives independent of torch
ORACLE = {
    "sigmoid": lambda u: 1 / (1 + mpmath.exp(-u)),
    "tanh": mpmath.tanh,
    "atan": lambda u: mpmath.mpf(1) / 2 + mpmath.atan(mpmath.pi * u / 2) / mpmath.pi,
    "erf": mpmath.ncdf,
    "triangle": lambda u: mpmath.mpf(1) / 2 + u - u * abs(u) / 2 if abs(u) < 1 else mpmath.mpf(u > 0),
    "fast_sigmoid": lambda u: u / (1 + abs(u)),
    "identity": lambda u: u,
    "identity-clip": lambda u: max(min(u, 1), -1),
}


def step(x: Tensor) -> Tensor:
    return x > 0


def test_every_primitive_has_an_oracle() -> None:
    assert set(ORACLE) == set(PRIMITIVES)


@EVERY_NAME
@pytest.mark.parametrize("sharpness", [1.0, 2.4])
def test_the_value_is_hard_and_the_derivatives_are_the_primitives(name: str, sharpness: float) -> None:
    layer = Surrogate(step, name, sharpness)
    x = POINTS.clone().requires_grad_()
    y = layer(x)
    assert y.tolist() == (POINTS > 0).double().tolist()
    y.sum().backward()
    for k, u in enumerate(POINTS.tolist()):
        smooth = [float(ORACLE[name](sharpness * u)), float(mpmath.diff(lambda t: ORACLE[name](sharpness * t), u))]
        assert math.isclose(float(layer.smooth(POINTS)[k]), smooth[0], rel_tol=1e-12, abs_tol=1e-15)
        assert math.isclose(float(x.grad[k]), smooth[1], rel_tol=1e-9, abs_tol=1e-12)


@EVERY_NAME
def test_the_slope_is_the_derivative_of_the_primitive(name: str) -> None:
    layer = Surrogate(step, name, 1.7)
    twin = dn.custom_dual(layer.smooth, partials=lambda y, x: layer._slope(y, x), check=False)
    report = dn.gradcheck(twin, POINTS, modes=(*FIRST, *SECOND))
    assert all(v.status == "right" for v in report.verdicts), str(report)


@EVERY_NAME
def test_all_modes_agree_to_second_order(name: str) -> None:
    layer, v = Surrogate(torch.sign, name), torch.randn(7, dtype=torch.float64)
    primitive = PRIMITIVES[name].slope
    slope = primitive(POINTS)
    total = lambda x: layer(x).sum()  # noqa: E731
    for first in (
        func.grad(total)(POINTS),
        func.vmap(func.grad(total))(POINTS),
        func.jacrev(layer)(POINTS).diag(),
        func.jacfwd(layer)(POINTS).diag(),
        dn.jacobian(layer, POINTS).diag(),
        dn.jvp(layer, (POINTS,), (v,))[1] / v,
    ):
        torch.testing.assert_close(first, slope)
    curvature = dn.jvp(primitive, (POINTS,), (v,))[1] * v
    for second in (
        dn.jvp(lambda x: dn.jvp(layer, (x,), (v,))[1], (POINTS,), (v,))[1],
        func.hessian(total)(POINTS).diag() * v * v,
        func.grad(lambda x: (func.grad(total)(x) * v).sum())(POINTS) * v,
    ):
        torch.testing.assert_close(second, curvature)


def test_the_step_primitives_rise_from_0_to_1_and_the_sign_ones_from_minus_1() -> None:
    far = torch.tensor([-1e9, 1e9], dtype=torch.float64)
    for name in ("sigmoid", "atan", "erf", "triangle"):
        torch.testing.assert_close(PRIMITIVES[name].value(far), torch.tensor([0.0, 1.0], dtype=torch.float64))
    for name in ("tanh", "fast_sigmoid", "identity-clip"):
        torch.testing.assert_close(PRIMITIVES[name].value(far), torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_it_says_whose_gradient_it_gives() -> None:
    text = repr(Surrogate(torch.sign, "tanh", 2.0))
    assert text == "Surrogate(sign, primitive='tanh', sharpness=2.0, biased gradient: the primitive's)"


def test_a_primitive_of_your_own() -> None:
    cubic = Primitive("u^3", lambda u: u**3, lambda u: 3 * u * u)
    x = torch.tensor([2.0], requires_grad=True)
    layer = Surrogate(torch.sign, cubic)
    layer(x).backward()
    assert float(x.grad) == 12 and "u^3" in repr(layer)
    with pytest.raises(DualnnError, match="'tanh' is already registered"):
        register_primitive("tanh", cubic)


def test_an_unknown_primitive_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sigmoid'.*fast_sigmoid"):
        Surrogate(torch.sign, "sigmoyd")


@pytest.mark.parametrize(
    ("fn", "x", "error", "message"),
    [
        (torch.sign, torch.tensor([1, 2]), DualInputError, "got torch.int64"),
        (torch.sign, 3.0, DualInputError, "got float"),
        (torch.sign, torch.ones(2, dtype=torch.complex64), DualInputError, "got torch.complex64"),
        (torch.argmax, torch.ones(3), StructureError, r"input's shape \(3,\), got \(\)"),
        (lambda x: 1, torch.ones(3), StructureError, "got int"),
        (lambda x: x.sign_(), torch.ones(3), DualInputError, "modified its argument 0 in place"),
    ],
)
def test_bad_input_is_named(fn, x, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Surrogate(fn, "tanh")(x)


def test_bad_options_are_named() -> None:
    with pytest.raises(DualInputError, match="wraps a function"):
        Surrogate("sign", "tanh")
    for sharpness in (0.0, -1.0, math.inf):
        with pytest.raises(DualInputError, match="sharpness must be positive"):
            Surrogate(torch.sign, "tanh", sharpness)


@EVERY_NAME
def test_nan_stays_nan_and_empty_stays_empty(name: str) -> None:
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    y = Surrogate(step, name)(x)
    assert y.isnan().tolist() == [True, False]
    assert Surrogate(step, name)(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5], dtype=dtype, requires_grad=True)
    y = Surrogate(step, "atan")(x)
    y.backward()
    assert y.dtype == x.grad.dtype == dtype


def test_copies_and_pickles() -> None:
    layer = Surrogate(torch.sign, "erf")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(torch.tensor([2.0])).tolist() == [1.0]
