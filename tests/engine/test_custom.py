"""custom_dual: one definition, every mode, to third order; wrong and incomplete definitions are refused."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, func

import dualnn as dn
from dualnn.engine.custom import CustomDual
from dualnn.engine.errors import DualInputError, DualShapeError, StructureError, UnsupportedOpError
from dualnn.engine.gradcheck import FIRST, SECOND, GradcheckError

# torch's forward AD loads decompositions with the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")

ALL = (*FIRST, *SECOND)
EYE = torch.eye(3, dtype=torch.float64)


def through_numpy(fn):
    """A value that autograd cannot follow."""
    return lambda *args: torch.as_tensor(fn(*(a.numpy() if isinstance(a, Tensor) else a for a in args)))


@dn.custom_dual(partials=lambda y, a, b: (torch.sin(b), a * torch.cos(b)))
def sine(a: Tensor, b: Tensor) -> Tensor:
    """A times sin b."""
    return torch.as_tensor(a.numpy() * np.sin(b.numpy()))


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.as_tensor(a.numpy() @ b.numpy())


def matmul_push(p, t, y):
    return t[0] @ p[1] + p[0] @ t[1]


MATMUL = {
    "transposed": dn.custom_dual(product, push=matmul_push),
    "vjp": dn.custom_dual(product, push=matmul_push, vjp=lambda p, g, y: (g @ p[1].mT, p[0].mT @ g)),
    "batched": dn.custom_dual(product, push=matmul_push, batched=True),
}
INVERSE = {
    "transposed": dn.custom_dual(torch.inverse, push=lambda p, t, y: -y @ t[0] @ y, samples=[EYE * 2 + 0.3]),
    "vjp": dn.custom_dual(
        torch.inverse,
        push=lambda p, t, y: -y @ t[0] @ y,
        vjp=lambda p, g, y: -y.mT @ g @ y.mT,
        samples=[EYE * 2 + 0.3],
    ),
    "batched": dn.custom_dual(torch.inverse, push=lambda p, t, y: -y @ t[0] @ y, batched=True, samples=[EYE * 2 + 0.3]),
}


def invertible(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, 3, dtype=torch.float64) + 4 * EYE


@pytest.mark.parametrize("shapes", [((), ()), ((2, 3), (3,)), ((2, 1), (1, 3)), ((0, 3), (3,))])
def test_an_elementwise_function_in_every_mode(shapes) -> None:
    args = tuple(torch.rand(s, dtype=torch.float64) for s in shapes)
    leaves = [a.clone().requires_grad_() for a in args]
    truth = [a.clone().requires_grad_() for a in args]
    sine(*leaves).sum().backward()
    (truth[0] * truth[1].sin()).sum().backward()
    for mine, theirs in zip(leaves, truth, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    if all(a.numel() for a in args):
        dn.gradcheck(sine, args, modes=ALL)


@pytest.mark.parametrize("rule", MATMUL.values(), ids=MATMUL)
def test_a_general_function_in_every_mode(rule) -> None:
    args = (torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    report = dn.gradcheck(rule, args, modes=ALL)
    assert all(v.status == "right" for v in report.verdicts), str(report)
    tangents = tuple(torch.randn(5, *a.shape, dtype=torch.float64) for a in args)
    ours, theirs = dn.jvp(rule, args, tangents), dn.jvp(torch.matmul, args, tangents)
    torch.testing.assert_close(ours, theirs)
    for only in (0, 1):  # the other argument is a constant
        _, one = dn.jvp(
            lambda x, only=only: rule(*(x if i == only else a for i, a in enumerate(args))),
            (args[only],),
            (tangents[only],),
        )
        other = torch.einsum("kij,jl->kil" if only == 0 else "kjl,ij->kil", tangents[only], args[1 - only])
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inverse", INVERSE.values(), ids=INVERSE)
def test_three_orders_under_torch_func_and_duals(inverse) -> None:
    weights, a = torch.randn(3, 3, dtype=torch.float64), invertible(4)

    def derivatives(f):
        def total(x: Tensor) -> Tensor:
            return (f(x) * weights).sum()

        first = func.grad(total)
        second = func.grad(lambda x: (first(x) * weights).sum())
        third = func.grad(lambda x: (second(x) * weights).sum())
        forward = func.jvp(second, (a[0],), (weights,))[1]
        return [
            *(func.vmap(g)(a) for g in (total, first, second, third)),
            func.hessian(total)(a[0]),
            func.jacrev(func.jacrev(total))(a[0]),
            func.jacfwd(f)(a[0]),
            forward,
        ]

    for ours, theirs in zip(derivatives(inverse), derivatives(torch.linalg.inv), strict=True):
        torch.testing.assert_close(ours, theirs)

    def along(f):
        return lambda x: dn.jvp(f, (x,), (weights,))[1]

    # d^k/dt^k inverse(A + t W) = (-1)^k k! (A^-1 W)^k A^-1
    inv, step = torch.linalg.inv(a[0]), torch.linalg.inv(a[0]) @ weights
    torch.testing.assert_close(along(along(along(inverse)))(a[0]), -6 * step @ step @ step @ inv)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (1, 0), (0, 2)])
@pytest.mark.parametrize("rule", MATMUL.values(), ids=MATMUL)
def test_vmap_over_any_argument(rule, dims) -> None:
    args = []
    for d, shape in zip(dims, ((2, 3), (3, 4)), strict=True):
        x = torch.randn(*shape, dtype=torch.float64)
        args.append(x if d is None else torch.stack([x, 2 * x, -x, x + 1, x * x], d))
    loss = [lambda a, b, f=f: (f(a, b) ** 2).sum() for f in (rule, torch.matmul)]
    for transform in (lambda f: f, lambda f: func.grad(f, (0, 1))):
        ours, theirs = (func.vmap(transform(f), in_dims=dims)(*args) for f in loss)
        torch.testing.assert_close(ours, theirs)


def test_several_outputs_and_an_integer_one() -> None:
    moments = dn.custom_dual(
        lambda x: (x.sum(), x.square().sum(), x.argmax()),
        push=lambda p, t, y: (t[0].sum(), 2 * (p[0] * t[0]).sum(), None),
    )
    x = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    total, squares, place = moments(x)
    (squares + 5 * total).backward()
    assert int(place) == 1 and x.grad.tolist() == [7.0, 11.0, 9.0]
    out, dout = dn.jvp(moments, (x.detach(),), (torch.ones(3, dtype=torch.float64),))
    assert (float(dout[0]), float(dout[1]), dout[2]) == (3.0, 12.0, None)


def test_constants_keywords_and_defaults() -> None:
    power = dn.custom_dual(lambda x, n=2: x**n, partials=lambda y, x, n: n * x ** (n - 1), samples=[(torch.rand(3), 3)])
    x = torch.tensor([2.0], requires_grad=True)
    (power(x) + power(x, n=3) + power(x=x, n=1)).backward()
    assert float(x.grad) == 4 + 12 + 1
    scaled = dn.custom_dual(lambda x, k: x * k, push=lambda p, t, y: t[0] * p[1], samples=[(torch.rand(3), 2)])
    x.grad = None
    scaled(x, torch.tensor(3)).backward()  # an integer tensor is a constant
    assert float(x.grad) == 3


def test_a_result_that_is_its_argument() -> None:
    same = dn.custom_dual(lambda x: x, partials=lambda y, x: 1.0)
    view = dn.custom_dual(lambda x: x[0], push=lambda p, t, y: t[0][0])
    for f, expected in ((same, [[1.0] * 3] * 3), (view, [[1.0] * 3, [0.0] * 3, [0.0] * 3])):
        x = torch.ones(3, 3, requires_grad=True)
        y = f(x)
        assert y.data_ptr() != x.data_ptr()
        y.sum().backward()
        assert x.grad.tolist() == expected


def test_samples_of_a_signal_stay_apart() -> None:
    from dualnn.engine.dual_tensor import make
    from dualnn.engine.levels import user_level
    from dualnn.engine.tangents import PerSample

    x = make(torch.rand(3), PerSample(torch.rand(4, 3), 2), user_level())
    double = dn.custom_dual(lambda x: 2 * x, push=lambda p, t, y: 2 * t[0])
    assert isinstance(double(x)._tan, PerSample) and double(x)._tan.batch == 2


ONCE = {
    "elementwise": dn.custom_dual(torch.sin, order=1, partials=lambda y, x: through_numpy(np.cos)(x.detach())),
    "general": dn.custom_dual(
        torch.sin, order=1, push=lambda p, t, y: t[0] * through_numpy(np.cos)(p[0].detach()), samples=[torch.rand(3)]
    ),
    "vjp": dn.custom_dual(
        torch.sin,
        order=1,
        push=lambda p, t, y: t[0] * through_numpy(np.cos)(p[0].detach()),
        vjp=lambda p, g, y: g * through_numpy(np.cos)(p[0].detach()),
        samples=[torch.rand(3)],
    ),
}


@pytest.mark.parametrize("f", ONCE.values(), ids=ONCE)
def test_a_derivative_in_numpy_works_once_and_then_raises(f) -> None:
    x = torch.rand(3, dtype=torch.float64)
    total = lambda x: f(x).sum()  # noqa: E731
    for first in (
        func.grad(total)(x),
        func.vmap(func.grad(total))(x),
        func.jacrev(f)(x).diag(),
        func.jacfwd(f)(x).diag(),
    ):
        torch.testing.assert_close(first, x.cos())
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    torch.testing.assert_close(g, x.cos())
    one = torch.ones_like(x)
    for second in (
        lambda: g.sum().backward(),
        lambda: func.grad(lambda x: func.grad(total)(x).sum())(x),
        lambda: func.hessian(total)(x),
        lambda: dn.jvp(lambda x: dn.jvp(f, (x,), (one,))[1], (x,), (one,)),
    ):
        with pytest.raises(UnsupportedOpError, match="the derivative of sin has no derivative of its own.*order=1"):
            second()


@pytest.mark.parametrize("how", ["partials", "push"])
@pytest.mark.parametrize(
    ("slope", "message"),
    [
        (lambda x: 2 * x.cos(), r"forward\s+wrong"),
        (lambda x: x.cos() + 1e-3 * (x > 0.5), r"reverse\s+wrong"),
        (lambda x: x.detach().cos(), r"(?s)forward\s+right.*forward over forward\s+wrong.*got 0"),
    ],
)
def test_a_wrong_derivative_is_refused_on_definition(how: str, slope, message: str) -> None:
    rule = {"partials": lambda y, x: slope(x), "push": lambda p, t, y: slope(p[0]) * t[0]}[how]
    samples = [torch.tensor([0.2, 0.7])]
    with pytest.raises(GradcheckError, match=message):
        dn.custom_dual(torch.sin, samples=samples, **{how: rule})
    assert isinstance(dn.custom_dual(torch.sin, samples=samples, check=False, **{how: rule}), CustomDual)


def test_a_wrong_vjp_or_batched_claim_is_refused() -> None:
    with pytest.raises(GradcheckError, match=r"(?s)forward\s+right.*reverse\s+wrong"):
        dn.custom_dual(
            torch.matmul, push=matmul_push, vjp=lambda p, g, y: (g @ p[1], p[0].mT @ g), samples=[(EYE + 1, EYE - 2)]
        )
    with pytest.raises(GradcheckError, match="the directions lead"):  # sums over K
        dn.custom_dual(lambda x: x.sum(0), push=lambda p, t, y: t[0].sum(0), batched=True, samples=[torch.rand(3, 3)])


def test_numpy_partials_need_order_1() -> None:
    with pytest.raises(GradcheckError, match="order=1"):
        dn.custom_dual(
            torch.sin, partials=lambda y, x: torch.as_tensor(np.cos(x.numpy())), samples=[torch.rand(3)], order=2
        )


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (torch.sin, {}, "one of partials= .* and push="),
        (torch.sin, {"partials": torch.cos, "push": torch.cos}, "one of partials= .* and push="),
        (torch.sin, {"partials": torch.cos, "vjp": torch.cos}, "vjp= goes with push="),
        (torch.sin, {"partials": torch.cos, "order": 3}, "order must be 1 or 2"),
        (3, {"partials": torch.cos}, "wraps a function, got 3"),
        (lambda *xs: xs[0], {"partials": lambda y, *xs: 1.0}, "any number of arguments.*samples="),
        (lambda x, *, k: x, {"partials": lambda y, x: 1.0}, "keyword-only parameters \\(k\\)"),
        (lambda x: x + torch.nan, {"partials": lambda y, x: 1.0}, "not finite there.*check=False"),
        (lambda x, n: x.reshape(n.numel(), 7), {"push": lambda p, t, y: t[0]}, "it raised RuntimeError.*samples="),
        (torch.sin, {"push": lambda p, t, y: t[0]}, "it has no signature.*samples="),
    ],
)  # fmt: skip
def test_incomplete_definitions_are_named(value, options, message: str) -> None:
    with pytest.raises(DualInputError, match=message):
        dn.custom_dual(value, **options)


def mutating(x: Tensor) -> Tensor:
    return x.mul_(2)


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (mutating, {"partials": lambda y, x: 2.0}, DualInputError, "modified its argument 0 in place"),
        (mutating, {"push": lambda p, t, y: 2 * t[0]}, DualInputError, "modified its argument 0 in place"),
        (lambda x: x.sum(), {"partials": lambda y, x: 1.0}, StructureError, r"must return shape \(2, 3\), got \(\)"),
        (lambda x: x * 1, {"partials": lambda y, x: (1.0, 2.0)}, StructureError, "2 derivatives for 1 floating"),
        (lambda x: x * 1, {"partials": lambda y, x: torch.ones(7)}, DualShapeError, r"does not broadcast to \(2, 3\)"),
        (lambda x: x * 1, {"push": lambda p, t, y: t[0].sum()}, DualShapeError, r"shape \(\), expected \(2, 3\)"),
        (lambda x: x * 1, {"push": lambda p, t, y: None}, DualShapeError, "got NoneType"),
        (lambda x: x * 1, {"push": lambda p, t, y: t[0], "vjp": lambda p, g, y: g.sum()}, DualShapeError, "vjp rule"),
        (lambda x: 3, {"push": lambda p, t, y: t[0]}, DualInputError, "tuple of tensors, got int"),
        (lambda x: [x], {"partials": lambda y, x: 1.0}, StructureError, "got list"),
    ],
)
def test_wrong_rules_are_named_when_called(value, options, error, message: str) -> None:
    f = dn.custom_dual(value, check=False, **options)
    x = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(error, match=message):
        f(x * 1).sum().backward()
        dn.jvp(f, (torch.rand(2, 3),), (torch.rand(2, 3),))


def test_tensors_in_a_list_and_complex_ones_are_refused() -> None:
    f = dn.custom_dual(lambda x, y: x, partials=lambda out, x, y: 1.0, check=False)
    with pytest.raises(DualInputError, match="argument 1 is a list of tensors"):
        f(torch.rand(2), [torch.rand(2)])
    with pytest.raises(DualInputError, match="complex"):
        f(torch.rand(2), torch.rand(2, dtype=torch.complex64, requires_grad=True))


def test_nan_goes_through() -> None:
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    y = ONCE["general"](x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False]


def test_it_is_the_function_to_python() -> None:
    assert sine.__name__ == "sine" and sine.__doc__ == "A times sin b."
    assert pickle.loads(pickle.dumps(sine)) is sine and copy.deepcopy(sine) is sine
    assert repr(sine) == "<custom_dual sine, elementwise, order=2>"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it at every graph break
def test_inside_a_compiled_model() -> None:
    linear = torch.nn.Linear(3, 3).double()
    x = torch.rand(2, 3, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return MATMUL["vjp"](linear(x), EYE).square().sum()

    compiled = torch.compile(model, backend="eager")
    ours, theirs = (torch.autograd.grad(f(x), linear.weight) for f in (compiled, model))
    torch.testing.assert_close(ours, theirs)


def test_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    dn.custom_dual(lambda x: x * 2, partials=lambda y, x: 2.0)
    assert torch.equal(before, torch.get_rng_state())
