"""What every registered activation must pass, on the samples and oracles that it brings."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dualnn as dn
from dualnn import activations
from dualnn.activations.base import Activation, Sample, apply
from dualnn.activations.flow import Flow
from dualnn.engine.errors import DualInputError
from tests.activations.oracles import ELEMENTWISE, EVERY_NAME, EVERY_SAMPLE, build, mp_derivative, smooth_difference


def local_arguments(act: Activation, x: Tensor) -> tuple[Tensor, ...]:
    """x and the natural parameters, one copy for every entry of x: their partials are then elementwise too."""
    return (x, *(p.detach().reshape(()).expand_as(x).clone() for p in act.natural()))


def partials(act: Activation, args: tuple[Tensor, ...]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """First and second elementwise partial derivatives of the local function, by (double) backward."""
    args = tuple(t.requires_grad_() for t in args)
    first = torch.autograd.grad(apply(act.local, *args).sum(), args, create_graph=True)
    second = []
    for d in first:
        if d.requires_grad:
            row = torch.autograd.grad(d.sum(), args, allow_unused=True, materialize_grads=True, retain_graph=True)
        else:
            row = tuple(torch.zeros_like(t) for t in args)
        second.append([t.detach() for t in row])
    return [d.detach() for d in first], second


def evaluate_surrogate(act: Activation, sample: Sample, x: Tensor) -> Tensor:
    """What the derivatives belong to: the activation itself, or its primitive."""
    if sample.primitive is None:
        return act(x)
    natural = [p.item() for p in act.natural()]
    none = [0] * (1 + len(natural))
    return torch.tensor([mp_derivative(sample.primitive, (v, *natural), none) for v in x.tolist()], dtype=x.dtype)


def gradient_or_zero(value: Tensor, of: Tensor, **options: bool) -> Tensor:
    """The gradient; zeros where a constant derivative has no graph of its own."""
    if not value.requires_grad:
        return torch.zeros_like(of)
    return torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True, **options)[0]


@EVERY_SAMPLE
def test_value_equals_the_reference(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    natural = [p.item() for p in act.natural()]
    expected = [mp_derivative(sample.reference, (v, *natural), [0] * (1 + len(natural))) for v in x.tolist()]
    torch.testing.assert_close(act(x).detach(), torch.tensor(expected, dtype=x.dtype), rtol=1e-12, atol=1e-15)


@EVERY_SAMPLE
def test_first_and_second_partials_equal_mpmath(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    args = local_arguments(act, x)
    first, second = partials(act, args)
    fn = sample.primitive or sample.reference
    n = len(args)
    for p in range(len(x)):
        at = [t[p].item() for t in args]
        for i in range(n):
            orders = [int(i == j) for j in range(n)]
            expected = mp_derivative(fn, at, orders)
            assert first[i][p].item() == pytest.approx(expected, rel=1e-10, abs=1e-13), (at, orders)
            for j in range(i, n):
                mixed = [a + int(j == k) for k, a in enumerate(orders)]
                expected = mp_derivative(fn, at, mixed)
                for found in (second[i][j], second[j][i]):
                    assert found[p].item() == pytest.approx(expected, rel=1e-9, abs=1e-12), (at, mixed)


@EVERY_SAMPLE
def test_input_derivatives_equal_finite_differences(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(act(leaf).sum(), leaf)

    def gradient(h: float) -> Tensor:
        moved = (x + h * scale).requires_grad_()
        return torch.autograd.grad(act(moved).sum(), moved)[0]

    scale = x.abs().clamp(1e-3, 1.0)  # steps shrink with x: "direct" arguments end at 0
    expected = smooth_difference(lambda h: evaluate_surrogate(act, sample, x + h * scale).detach(), sample.step) / scale
    torch.testing.assert_close(first, expected, rtol=1e-7, atol=1e-8)

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(act(leaf).sum(), leaf, create_graph=True)
    kept = first * torch.ones_like(leaf, requires_grad=True)  # a constant slope has no graph of its own
    (second,) = torch.autograd.grad(kept.sum(), leaf, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(second, smooth_difference(gradient, sample.step) / scale, rtol=1e-6, atol=1e-7)


@EVERY_SAMPLE
def test_parameter_derivatives_equal_finite_differences(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    weights = torch.linspace(-1, 1, len(x), dtype=x.dtype)
    parameters = list(act.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad((act(x) * weights).sum(), parameters, create_graph=True)

    for i, parameter in enumerate(parameters):

        def moved(h: float, fn, parameter: nn.Parameter = parameter) -> Tensor:
            with torch.no_grad():
                parameter += h
            try:
                return fn().detach()
            finally:
                with torch.no_grad():
                    parameter -= h

        first = gradients()[i]
        value = partial(evaluate_surrogate, act, sample, x)
        expected = smooth_difference(lambda h: moved(h, lambda: (value() * weights).sum()), sample.step)  # noqa: B023
        torch.testing.assert_close(first.sum(), expected, rtol=1e-7, atol=1e-8)
        for j, other in enumerate(parameters):
            second = gradient_or_zero(gradients()[i].sum(), other)
            expected = smooth_difference(lambda h: moved(h, lambda: gradients()[j].sum()), sample.step)  # noqa: B023
            torch.testing.assert_close(second.sum(), expected, rtol=1e-6, atol=1e-7)


@EVERY_SAMPLE
def test_forward_mode_equals_reverse_mode(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    args = local_arguments(act, x)
    first, second = partials(act, args)
    args = tuple(t.detach() for t in args)
    directions = tuple(torch.randn(3, *t.shape, dtype=t.dtype) for t in args)

    def fn(*a: Tensor) -> Tensor:
        return apply(act.local, *a)

    out, tangent = dn.jvp(fn, args, directions)
    torch.testing.assert_close(out, fn(*args))
    expected = sum(d * v for d, v in zip(first, directions, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-14)

    # a dual of a dual: d/dt of the first derivative along v
    v = tuple(t[0] for t in directions)
    _, nested = dn.jvp(lambda *a: dn.jvp(fn, a, v)[1], args, v)
    n = range(len(args))
    expected = sum(second[i][j] * v[i] * v[j] for i in n for j in n)
    torch.testing.assert_close(nested, expected, rtol=1e-10, atol=1e-12)


@EVERY_SAMPLE
def test_module_takes_duals(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    v = torch.randn(2, *x.shape, dtype=x.dtype)
    out = act(dn.dual(x, v))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(leaf).sum(), leaf)
    torch.testing.assert_close(out.primal, act(x))
    torch.testing.assert_close(out.tangent, slope * v, rtol=1e-12, atol=1e-14)
    # reverse over dual: the gradient of the tangent with respect to the parameters
    for parameter in act.parameters():
        over_dual = gradient_or_zero(act(dn.dual(x, v)).tangent.sum(), parameter, retain_graph=True)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(act(leaf).sum(), leaf, create_graph=True)
        double = gradient_or_zero((slope * v).sum(), parameter)
        torch.testing.assert_close(over_dual, double, rtol=1e-10, atol=1e-12)


@EVERY_SAMPLE
def test_module_takes_dual_parameters(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    for key, parameter in act.named_parameters():
        (gradient,) = torch.autograd.grad(act(x).sum(), parameter)
        v = torch.randn(2, *parameter.shape, dtype=x.dtype)
        act._parameters[key] = dn.dual(parameter.detach(), v)
        try:
            out = act(x)
        finally:
            act._parameters[key] = parameter
        torch.testing.assert_close(out.tangent.sum(-1), (gradient * v).flatten(1).sum(-1), rtol=1e-10, atol=1e-12)


# The first torch.func.jvp of a process makes torch script its own decompositions.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@EVERY_SAMPLE
def test_torch_func(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(act(leaf).sum(), leaf, create_graph=True)
    curvature = partials(act, local_arguments(act, x))[1][0][0]
    slope = slope.detach()
    torch.testing.assert_close(torch.func.grad(lambda t: act(t).sum())(x), slope)
    torch.testing.assert_close(torch.func.vmap(act)(x), act(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(act))(x), slope)
    torch.testing.assert_close(torch.func.jvp(act, (x,), (2 * torch.ones_like(x),))[1], 2 * slope)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(torch.func.grad(act)))(x), curvature)


@EVERY_SAMPLE
def test_low_precision(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    expected = act(x)
    single = act.to(torch.float32)
    rounded = x.float()
    assert single(rounded).dtype == torch.float32
    torch.testing.assert_close(single(rounded).double(), act.double()(rounded.double()), rtol=2e-5, atol=1e-6)
    assert expected.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        points = x[x.abs() < 1e3].to(dtype)  # float16 ends at 65,504
        if sample.options.get("argument") == "direct":
            points = points.abs()  # -0.36 rounds to below -1/e
        # float32 parameters, as under bf16-mixed: computed in float32, rounded once
        torch.testing.assert_close(act.float()(points), act(points.float()).to(dtype), rtol=0, atol=0)
        half = copy.deepcopy(act).to(dtype)
        leaf = points.clone().requires_grad_()
        half(leaf).sum().backward()
        assert leaf.grad.dtype == dtype and bool(leaf.grad.isfinite().all())


@EVERY_SAMPLE
def test_copies_keep_value_and_type(name: str, sample: Sample) -> None:
    act, x = build(name, sample)
    with torch.no_grad():
        for parameter in act.parameters():
            parameter += 0.1
    fresh = activations.get(name, **sample.options).double()
    fresh.load_state_dict(act.state_dict())
    for other in (fresh, copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert type(other) is type(act) and repr(other) == repr(act)
        torch.testing.assert_close(other(x), act(x), rtol=0, atol=0)
        for mine, theirs in zip(act.parameters(), other.parameters(), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()


@EVERY_NAME
def test_empty_batch(name: str) -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    y = activations.get(name)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)


@EVERY_NAME
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4, 5)])
def test_any_shape_and_layout(name: str, shape: tuple[int, ...]) -> None:
    act = activations.get(name).double()
    x = torch.rand(shape, dtype=torch.float64)
    assert act(x).shape == shape
    torch.testing.assert_close(act(x).flatten(), act(x.flatten()))
    torch.testing.assert_close(act(x.mT if x.ndim > 1 else x), act(x).mT if x.ndim > 1 else act(x))


@EVERY_NAME
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(DualInputError, match=str(dtype)):
        activations.get(name)(torch.ones(3, dtype=dtype))


@EVERY_NAME
def test_nan_stays_where_it_is(name: str) -> None:
    act = activations.get(name).double()
    x = torch.tensor([0.3, float("nan"), 0.7], dtype=torch.float64, requires_grad=True)
    y = act(x)
    y.sum().backward()
    assert y.isnan().tolist() == [False, True, False]
    # Vector and scalar code of torch differ by a rounding, which an integrator carries on.
    torch.testing.assert_close(y[::2], act(x[::2]), rtol=1e-14 if isinstance(act, Flow) else 0, atol=0)
    assert x.grad[::2].isfinite().all()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if issubclass(activations.get_class(n), Flow) else n for n in ELEMENTWISE],
)  # a flow integrates an equation at every step; test_flow trains them for fewer steps
@pytest.mark.parametrize("channels", [1, 3])
def test_trains_in_a_plain_loop(name: str, channels: int) -> None:
    options = {"num_channels": channels} if list(activations.get(name).parameters()) else {}
    model = nn.Sequential(nn.Linear(2, 3), activations.get(name, **options), nn.Linear(3, 1))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x = torch.randn(64, 2)
    y = torch.sin(x[:, :1]) * 0.5 + 0.3 * x[:, 1:] ** 2
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for key, value in model.state_dict().items():
        assert not torch.equal(value, before[key]), f"{key} did not move"


@EVERY_NAME
def test_loads_by_class_name(name: str) -> None:
    cls = activations.get_class(name)
    assert getattr(dn.activations, cls.__name__) is cls and cls.name == name


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
