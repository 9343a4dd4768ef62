"""What every activation on rows must pass, on the samples and oracles that it brings."""

import copy
import pickle
import warnings
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor, nn

import dualnn as dn
from dualnn import activations
from dualnn.activations.base import Activation
from dualnn.activations.rows import RowSample
from dualnn.engine.errors import DualInputError, DualShapeError
from tests.activations.oracles import DIGITS

NAMES = [name for name in activations.available() if not activations.get_class(name).elementwise]
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
EVERY_SAMPLE = pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, id=f"{name}({','.join(f'{k}={v}' for k, v in sample.options.items())})")
        for name in NAMES
        for sample in activations.get_class(name).row_samples()
    ],
)


def build(name: str, sample: RowSample) -> tuple[Activation, Tensor]:
    return activations.get(name, **sample.options).double(), torch.tensor(sample.points, dtype=torch.float64)


def along(sample: RowSample, act: Activation, x: Tensor, v: Tensor, dp: float, order: int) -> Tensor:
    """The derivative of the oracle along (v, dp) in input and parameters, by mpmath, row by row."""
    fn = (sample.primitive or sample.reference) if order else sample.reference
    natural = [p.item() for p in act.natural()]
    rows = []
    with mp.workdps(DIGITS):
        for row, direction in zip(x.tolist(), v.tolist(), strict=True):

            def entry(i: int, row: list = row, direction: list = direction) -> Callable:
                at = [mp.mpf(r) for r in row]
                return lambda t: fn(
                    [r + t * d for r, d in zip(at, direction, strict=True)], *(mp.mpf(p) + t * dp for p in natural)
                )[i]

            rows.append([float(mp.diff(entry(i), 0, order) if order else entry(i)(0)) for i in range(len(row))])
    return torch.tensor(rows, dtype=x.dtype)


def call(act: Activation) -> Callable[..., Tensor]:
    """The function of x and the natural parameters."""
    return lambda x, *p: act.rows(x.movedim(act.dim, -1), *p).movedim(-1, act.dim)


def arguments(act: Activation, x: Tensor) -> tuple[Tensor, ...]:
    return (x.clone(), *(p.detach().reshape(()) for p in act.natural()))


@EVERY_SAMPLE
def test_value_equals_the_reference(name: str, sample: RowSample) -> None:
    act, x = build(name, sample)
    torch.testing.assert_close(act(x).detach(), along(sample, act, x, x, 0.0, 0), rtol=1e-12, atol=1e-13)


@EVERY_SAMPLE
@pytest.mark.parametrize("dp", [0.0, 1.0])
def test_derivatives_equal_mpmath_in_every_mode(name: str, sample: RowSample, dp: float) -> None:
    act, x = build(name, sample)
    args, fn = arguments(act, x), call(act)
    if dp and len(args) == 1:
        return  # no parameters: dp = 0 has seen all there is
    v = torch.tensor([[0.7, -1.0, 0.4, 0.3]], dtype=x.dtype).expand_as(x)
    seeds = (v, *(torch.full_like(p, dp) for p in args[1:]))
    first, second = (along(sample, act, x, v, dp, order) for order in (1, 2))

    torch.testing.assert_close(dn.jvp(fn, args, seeds)[1], first, rtol=1e-10, atol=1e-12)
    nested = dn.jvp(lambda *a: dn.jvp(fn, a, seeds)[1], args, seeds)[1]
    torch.testing.assert_close(nested, second, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.jvp(fn, args, seeds)[1], first, rtol=1e-10, atol=1e-12)

    # Reverse mode, on a random functional of y; twice; and reverse over forward.
    w = torch.randn_like(x)
    leaves = tuple(a.clone().requires_grad_() for a in args)
    gradients = torch.autograd.grad((w * fn(*leaves)).sum(), leaves, create_graph=True)
    slope = sum((g * s).sum() for g, s in zip(gradients, seeds, strict=True))
    torch.testing.assert_close(slope.detach(), (w * first).sum(), rtol=1e-10, atol=1e-12)
    if slope.requires_grad:
        again = torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)
        curvature = sum((g * s).sum() for g, s in zip(again, seeds, strict=True))
        torch.testing.assert_close(curvature, (w * second).sum(), rtol=1e-9, atol=1e-11)
    forward = dn.jvp(fn, leaves, seeds)[1]
    if forward.requires_grad:
        over = torch.autograd.grad((w * forward).sum(), leaves, allow_unused=True, materialize_grads=True)
        curvature = sum((g * s).sum() for g, s in zip(over, seeds, strict=True))
        torch.testing.assert_close(curvature, (w * second).sum(), rtol=1e-9, atol=1e-11)


@EVERY_SAMPLE
def test_torch_func(name: str, sample: RowSample) -> None:
    act, x = build(name, sample)
    jacobian = torch.stack([dn.jacobian(act, row).detach() for row in x])
    torch.testing.assert_close(torch.func.vmap(act)(x), act(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(act))(x), jacobian, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(act))(x), jacobian, rtol=1e-12, atol=1e-13)


@EVERY_SAMPLE
def test_parameter_gradient_reaches_the_raw_parameter(name: str, sample: RowSample) -> None:
    act, x = build(name, sample)
    w = torch.randn_like(x)
    for parameter in act.parameters():
        (gradient,) = torch.autograd.grad((w * act(x)).sum(), parameter)
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += h
                values.append((w * act(x)).sum())
                parameter -= h
        assert gradient.item() == pytest.approx(((values[0] - values[1]) / 2e-5).item(), rel=1e-6, abs=1e-8)


@EVERY_SAMPLE
def test_low_precision(name: str, sample: RowSample) -> None:
    act, x = build(name, sample)
    single = copy.deepcopy(act).float()
    expected = copy.deepcopy(single).double()(x.float().double())
    torch.testing.assert_close(single(x.float()).double(), expected, rtol=2e-5, atol=2e-6)
    for dtype in (torch.bfloat16, torch.float16):
        points = x.to(dtype)
        torch.testing.assert_close(single(points), single(points.float()).to(dtype), rtol=0, atol=0)
        leaf = points.clone().requires_grad_()
        y = copy.deepcopy(act).to(dtype)(leaf)
        (y * torch.arange(4)).sum().backward()
        assert y.dtype == leaf.grad.dtype == dtype and bool(leaf.grad.isfinite().all())


@EVERY_SAMPLE
def test_copies_keep_value_and_type(name: str, sample: RowSample) -> None:
    act, x = build(name, sample)
    with torch.no_grad():
        for parameter in act.parameters():
            parameter += 0.1
    fresh = activations.get(name, **sample.options).double()
    fresh.load_state_dict(act.state_dict())
    for other in (fresh, copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert type(other) is type(act) and repr(other) == repr(act)
        torch.testing.assert_close(other(x), act(x), rtol=0, atol=0)


@EVERY_NAME
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_dimension(name: str, dim: int) -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    act, last = activations.get(name, dim=dim), activations.get(name)
    y = act.double()(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, last.double()(x.movedim(dim, -1)).movedim(-1, dim), rtol=0, atol=1e-15)


@EVERY_NAME
@pytest.mark.parametrize(("shape", "dim"), [((), -1), ((3,), 1), ((3,), -2), ((2, 0), 1)])
def test_a_missing_dimension_is_named(name: str, shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(DualShapeError, match=f"{name}: the input needs a dimension {dim}"):
        activations.get(name, dim=dim)(torch.zeros(shape))


@EVERY_NAME
def test_dim_is_checked(name: str) -> None:
    with pytest.raises(DualInputError, match="dim must be an integer"):
        activations.get(name, dim=1.0)


@EVERY_NAME
def test_empty_batch(name: str) -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    y = activations.get(name)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)


@EVERY_NAME
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(DualInputError, match=str(dtype)):
        activations.get(name)(torch.ones(3, dtype=dtype))


@EVERY_NAME
def test_nan_spoils_its_row_only(name: str) -> None:
    act = activations.get(name).double()
    x = torch.tensor([[0.3, 0.1, 0.5], [0.2, float("nan"), 0.7], [1.0, -2.0, 0.4]], dtype=torch.float64)
    x.requires_grad_()
    y = act(x)
    (y * torch.arange(3)).sum().backward()
    assert y.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    torch.testing.assert_close(y[::2], act(x[::2]), rtol=0, atol=0)
    assert x.grad[::2].isfinite().all()


@EVERY_NAME
def test_trains_in_a_plain_loop(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 6), activations.get(name), nn.Linear(6, 1))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x = torch.randn(64, 2)
    y = torch.sin(x[:, :1]) * 0.5 + 0.3 * x[:, 1:] ** 2
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for key, value in model.state_dict().items():
        assert not torch.equal(value, before[key]), f"{key} did not move"


@pytest.mark.slow
@EVERY_NAME
def test_compiled_model_is_right(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), activations.get(name), nn.Linear(4, 1)).double()
    compiled = torch.compile(copy.deepcopy(model))
    x = torch.randn(5, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own warnings differ from version to version
        out = compiled(x)
        out.sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(out, model(x))
    for mine, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad)
