"""In-place operations on duals: right, or a named error; nothing silently wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dualnn as dn
from dualnn.engine import UnsupportedOpError
from tests.engine.oracles import five_point, rand


def check(fn, *shapes, low=-2.0):
    """A function with in-place code in it against differences; its arguments are left alone."""
    draw = rand(4)
    xs = [draw(*s, low=low) for s in shapes]
    ts = [torch.stack([draw(*s), draw(*s)]) for s in shapes]
    before = [x.clone() for x in xs]
    out, pushed = dn.jvp(lambda *a: fn(*[x * 1.0 for x in a]), tuple(xs), tuple(ts))
    assert all(torch.equal(a, b) for a, b in zip(xs, before, strict=True))
    assert torch.equal(out, fn(*[x.clone() for x in xs]))
    for k in range(2):
        oracle = five_point(lambda h, k=k: [fn(*[x + h * t[k] for x, t in zip(xs, ts, strict=True)])])[0]
        torch.testing.assert_close(pushed[k], oracle, rtol=1e-6, atol=1e-7)


def chain(*steps):
    def fn(x):
        for step in steps:
            out = step(x)
            assert out is None or out is x
        return x

    return fn


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.relu_(x),
        lambda x: F.leaky_relu(x, 0.1, inplace=True),
        lambda x: F.elu_(x),
        lambda x: x.sigmoid_(),
        lambda x: x.tanh_().exp_(),
        lambda x: x.add_(2.0).mul_(x),
        lambda x: x.sub_(x * 0.5, alpha=2),
        lambda x: x.div_(2 + x * x),
        lambda x: x.pow_(2),
        lambda x: x.clamp_(-1.0, 1.0),
        lambda x: x.clamp_min_(0.1),
        lambda x: x.neg_(),
        lambda x: x.abs_().sqrt_(),
        lambda x: x.zero_(),
        lambda x: x.fill_(3.0),
        lambda x: x.fill_(x.sum()),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.copy_(torch.ones(3, dtype=torch.float64)),
        lambda x: x.masked_fill_(x > 0, 0.5),
        lambda x: x.lerp_(x.flip(0), 0.3),
        lambda x: x.addcmul_(x, x, value=0.5),
        lambda x: x.scatter_(0, torch.tensor([[0, 1, 1]]), x[1:] * 2),
        lambda x: x.scatter_add_(0, torch.tensor([[0, 1, 1]]), x[1:] * 2),
    ],
)
def test_methods(step):
    check(chain(step), (2, 3))


def test_operators():
    def fn(x, y):
        z = x
        z += y
        z *= x
        z -= 2 * y
        z /= 3 + y * y
        z **= 2
        assert z is x
        return x

    check(fn, (2, 3), (2, 3))
    check(fn, (2, 3), (3,))


ROWS, COLS = torch.tensor([0, 2]), torch.tensor([1, 3])
INDICES = [
    0,
    -1,
    (1, 2),
    slice(0, 2),
    slice(None, None, 2),
    (slice(None), 1),
    (..., -1),
    ROWS,
    [0, 2],
    (ROWS, COLS),
    (slice(None), COLS),
    torch.tensor([True, False, True]),
    torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.5,
    (None, 1),
    (1, None, slice(1, 3)),
    (),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_setitem(index):
    shape = torch.zeros(3, 4)[index].shape

    def from_dual(x, y):
        x[index] = y
        return x

    def from_number(x, y):
        x[index] = 2.5
        return x * y.sum()

    def broadcast(x, y):
        x[index] = y.sum()
        return x

    def plain_source(x, y):
        x[index] = torch.ones(shape, dtype=torch.float64)
        return x

    def into_new(x, y):
        out = torch.zeros_like(x)
        out[index] = y * y
        return out * x

    for fn in (from_dual, from_number, broadcast, plain_source, into_new):
        check(fn, (3, 4), tuple(shape))


def test_nonadjacent_advanced_indices():
    def fn(x, y):
        x[ROWS, :, COLS] = y
        x[0, :, ROWS] = y * 2
        return x[ROWS, :, COLS] * x[:, None, 1, COLS].sum()

    check(fn, (3, 2, 4), (2, 2))


def test_a_loop_that_fills_an_output():
    def fn(x):
        out = x.new_zeros(4)
        out[0] = x[0]
        for i in range(1, 4):
            out[i] = out[i - 1].clone() * x[i % 2] + torch.sin(x[0])
        return out

    check(fn, (2,))


def test_the_value_handed_to_dual_is_never_overwritten():
    x, t = torch.ones(3), torch.ones(1, 3)
    d = dn.dual(x, t)
    d += 1
    d[0] = 7.0
    d.mul_(d)
    assert torch.equal(x, torch.ones(3)) and torch.equal(t, torch.ones(1, 3))
    assert torch.equal(d.primal, torch.tensor([49.0, 4.0, 4.0]))
    assert torch.equal(d.tangent[0], torch.tensor([0.0, 4.0, 4.0]))


def test_an_operand_mutated_after_the_op():
    """An earlier result must not change when an operand is overwritten afterwards (optimizer steps, `.data`)."""
    w = torch.tensor([2.0, 3.0])
    x = dn.dual(torch.tensor([1.0, 1.0]), torch.ones(2))
    y = x * w
    z = w * torch.exp(x)
    results = y.tangent.clone(), z.tangent.clone()
    torch.optim.SGD([w.requires_grad_()], lr=1.0)
    w.data.fill_(100.0)
    torch._foreach_add_([w.detach()], 1.0)
    assert torch.equal(y.tangent, results[0]) and torch.equal(z.tangent, results[1])


def test_a_seed_mutated_after_the_op():
    seed = torch.ones(1, 2)
    x = dn.dual(torch.tensor([1.0, 2.0]), seed)
    y = torch.sin(x)
    before = y.tangent.clone()
    seed.fill_(5.0)
    assert torch.equal(y.tangent, before)


def plain_destinations():
    i = torch.tensor([0, 1])
    return {
        "+=": lambda p, d: p.__iadd__(d),
        "-=": lambda p, d: p.__isub__(d),
        "*=": lambda p, d: p.__imul__(d),
        "/=": lambda p, d: p.__itruediv__(d),
        "add_": lambda p, d: p.add_(d),
        "copy_": lambda p, d: p.copy_(d),
        "fill_": lambda p, d: p.fill_(d[0]),
        "setitem": lambda p, d: p.__setitem__(0, d[0]),
        "setitem mask": lambda p, d: p.__setitem__(p > 0, d),
        "masked_fill_": lambda p, d: p.masked_fill_(p > 0, d[0]),
        "scatter_": lambda p, d: p.scatter_(0, i, d),
        "index_add_": lambda p, d: p.index_add_(0, i, d),
        "index_copy_": lambda p, d: p.index_copy_(0, i, d),
        "index_put_": lambda p, d: p.index_put_((i,), d),
        "masked_scatter_": lambda p, d: p.masked_scatter_(p > 0, d),
        "addcmul_": lambda p, d: p.addcmul_(d, d),
        "lerp_": lambda p, d: p.lerp_(d, 0.5),
        "clamp_": lambda p, d: p.clamp_(min=d),
        "foreach": lambda p, d: torch._foreach_add_([p], [d]),
        "set_": lambda p, d: p.set_(d),
        "out=": lambda p, d: torch.mul(d, d, out=p),
        "out= cat": lambda p, d: torch.cat([d], out=p),
        "out= stack": lambda p, d: torch.stack([d[0], d[1]], out=p),
        "out= matmul": lambda p, d: torch.matmul(torch.eye(2), d, out=p),
        "out= sum": lambda p, d: torch.sum(d, 0, out=p),
        "out= max": lambda p, d: torch.maximum(d, d, out=p),
        "out= fallback": lambda p, d: torch.cumprod(d, 0, out=p),
        "sum out dual": lambda p, d: torch.sum(p, 0, out=d),
        "out dual": lambda p, d: torch.add(p, p, out=d),
    }


@pytest.mark.parametrize("name", plain_destinations())
def test_writing_a_dual_into_a_plain_tensor_raises(name):
    plain, d = torch.ones(2), dn.dual(torch.tensor([1.0, 2.0]), torch.ones(2))
    with pytest.raises((UnsupportedOpError, TypeError)) as caught:
        plain_destinations()[name](plain, d)
    assert torch.equal(plain, torch.ones(2)) and torch.equal(d.primal, torch.tensor([1.0, 2.0]))
    assert "dual" in str(caught.value).lower()


def test_the_error_for_a_plain_destination_says_how_to_make_one():
    with pytest.raises(UnsupportedOpError, match="zeros_like"):
        torch.zeros(2)[0] = dn.dual(torch.tensor(1.0), torch.tensor(1.0))


BASE = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
VIEW_CASES = {
    "view then write view": lambda x: (v := x.view(6), v.add_(1.0), x.clone())[-1],
    "view then write base": lambda x: (v := x[0], x.mul_(2.0), v * 1.0)[-1],
    "view of a view": lambda x: (v := x.view(3, 2), w := v[0], v.mul_(3.0), w * x[0, :2])[-1],
    "unbind": lambda x: (u := x.unbind(0), u[0].mul_(2.0), x * 1.0)[-1],
    "chunk": lambda x: (u := x.chunk(2), u[0].mul_(2.0), x * 1.0)[-1],
    "select iadd": lambda x: (x.__getitem__(0).add_(1.0), x * 1.0)[-1],
    "transpose": lambda x: (v := x.t(), v.mul_(2.0), x * 1.0)[-1],
    "expand": lambda x: (v := x[0].expand(2, 3), x.mul_(2.0), v * 1.0)[-1],
    "reshape alias": lambda x: (v := x.reshape(-1), v.mul_(2.0), x * 1.0)[-1],
    "reshape copy": lambda x: (v := x.t().reshape(-1), v.mul_(2.0), x * 1.0)[-1],
    "contiguous is itself": lambda x: (v := x.contiguous(), v.mul_(2.0), x * 1.0)[-1],
    "contiguous copy": lambda x: (v := x.t().contiguous(), v.mul_(2.0), x * 1.0)[-1],
    "same dtype": lambda x: (v := x.double(), v.mul_(2.0), x * 1.0)[-1],
    "to itself": lambda x: (v := x.to("cpu"), v.mul_(2.0), x * 1.0)[-1],
    "positive": lambda x: (v := +x, v.mul_(2.0), x * 1.0)[-1],
    "flatten of a vector": lambda x: (w := x.view(6), v := w.flatten(), v.mul_(2.0), w * 1.0)[-1],
    "eval dropout": lambda x: (v := F.dropout(x, 0.5, training=False), v.mul_(2.0), x * 1.0)[-1],
    "split": lambda x: (u := x.split(1), u[1].mul_(2.0), x * 1.0)[-1],
    "narrow": lambda x: (v := x.narrow(1, 0, 2), v.zero_(), x * 1.0)[-1],
    "diagonal": lambda x: (v := x.diagonal(), v.zero_(), x * 1.0)[-1],
    "squeeze": lambda x: (v := x[:1].squeeze(0), v.zero_(), x * 1.0)[-1],
    "view_as": lambda x: (v := x.view_as(torch.zeros(6)), v.zero_(), x * 1.0)[-1],
    "setitem under a view": lambda x: (v := x[0], x.__setitem__((0, 0), 9.0), v * 1.0)[-1],
    "setitem through a view": lambda x: (v := x[0], v.__setitem__(0, 9.0), x * 1.0)[-1],
    "unfold": lambda x: (v := x.unfold(1, 2, 1), x.mul_(2.0), v * 1.0)[-1],
    "T": lambda x: (v := x.mT, v.mul_(2.0), x * 1.0)[-1],
    "atleast": lambda x: (v := torch.atleast_2d(x[0]), v.mul_(2.0), x * 1.0)[-1],
    "advanced indexing copies": lambda x: (v := x[torch.tensor([0, 1])], v.mul_(2.0), x * v)[-1],
    "mask copies": lambda x: (v := x[BASE > 2], v.mul_(2.0), x[BASE > 2] * v)[-1],
}


@pytest.mark.parametrize("name", VIEW_CASES)
def test_writes_near_views(name):
    fn = VIEW_CASES[name]
    oracle = five_point(lambda h: [fn(BASE + h * BASE)])[0]
    out, pushed = dn.jvp(lambda x: fn(x * 1.0), (BASE,), (BASE,))
    assert torch.equal(out, fn(BASE * 1.0))
    torch.testing.assert_close(pushed, oracle, rtol=1e-7, atol=1e-8)


def test_writing_is_allowed_once_the_view_is_gone():
    def fn(x):
        assert float(x[0].sum()) != 1e9  # a view that lives for one expression
        x.add_(1.0)
        x[1] = x[0] * 2
        return x * x

    check(fn, (2, 3))


def test_a_write_of_a_higher_level_raises():
    one = torch.tensor(1.0)

    def outer(x):
        buffer = torch.zeros_like(x)

        def inner(y):
            buffer[()] = y * x
            return y

        dn.jvp(inner, (one,), (one,))
        return buffer

    with pytest.raises(UnsupportedOpError, match="level"):
        dn.jvp(outer, (one,), (one,))


def test_a_write_of_a_lower_level_is_kept():
    one = torch.tensor(1.0)

    def outer(x):
        def inner(y):
            buffer = torch.zeros_like(y)
            buffer.add_(x * x)
            return buffer * y

        return dn.jvp(inner, (one,), (one,))[1]

    assert float(dn.jvp(outer, (torch.tensor(3.0),), (one,))[1]) == 6.0


def test_dtype_of_the_destination_wins():
    x = dn.dual(torch.zeros(2), torch.zeros(1, 2))
    x.add_(dn.dual(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)))
    assert x.dtype == torch.float32 and x.tangent.dtype == torch.float32 and torch.equal(x.tangent, torch.ones(1, 2))


def test_a_result_that_does_not_fit_raises():
    x = dn.dual(torch.zeros(2), torch.zeros(2))
    with pytest.raises(UnsupportedOpError, match="shape"):
        x.add_(torch.ones(3, 2))


def test_in_place_ops_without_a_rule_raise_with_their_name():
    x = dn.dual(torch.ones(2), torch.ones(2))
    calls = {"resize_": (3,), "apply_": (float,), "map_": (torch.ones(2), max), "set_": (torch.ones(2),)}
    for name, args in calls.items():
        with pytest.raises(UnsupportedOpError, match=name):
            getattr(x, name)(*args)
    assert torch.equal(x.primal, torch.ones(2)) and torch.equal(x.tangent, torch.ones(1, 2))


@pytest.mark.parametrize("name", ["normal_", "uniform_", "exponential_", "random_", "bernoulli_"])
def test_noise_in_place_forgets_the_tangent_and_draws_as_torch_does(name):
    x = dn.dual(torch.ones(4), torch.ones(4))
    torch.manual_seed(3)
    plain = getattr(torch.ones(4), name)()
    torch.manual_seed(3)
    assert getattr(x, name)() is x
    assert torch.equal(x.primal, plain) and not x.tangent.any()


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_custom_functions_raise_while_a_derivative_is_computed():
    x = torch.tensor([0.4, 1.7])
    with pytest.raises(UnsupportedOpError, match="_Straight"):
        dn.jvp(lambda y: _Straight.apply(y), (x,), (x,))
    assert torch.equal(_Straight.apply(x), x.round())  # and are themselves again afterwards
    assert "dualnn" not in str(torch.autograd.Function.apply.__module__)
    leaf = x.clone().requires_grad_()
    _, pushed = dn.jvp(lambda y: y * _Straight.apply(x), (leaf,), (x,))  # plain arguments pass
    torch.testing.assert_close(pushed, x * x.round())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch's checkpoint
def test_checkpoints_are_right_or_raise():
    x = torch.tensor([0.4, 1.7])
    for reentrant in (False, True):
        out = dn.jvp(lambda y, r=reentrant: checkpoint(torch.sin, y, use_reentrant=r), (x,), (x,))
        torch.testing.assert_close(out[1], x * torch.cos(x))
    leaf = x.clone().requires_grad_()
    _, pushed = dn.jvp(lambda y: checkpoint(torch.sin, y, use_reentrant=False), (leaf,), (x,))
    torch.testing.assert_close(torch.autograd.grad(pushed.sum(), leaf)[0], -x * torch.sin(x))
    with pytest.raises(UnsupportedOpError, match="use_reentrant=False"):
        dn.jvp(lambda y: checkpoint(torch.sin, y, use_reentrant=True), (leaf,), (x,))


def test_module_hooks():
    layer = nn.Linear(2, 2).double()
    seen = []
    layer.register_forward_hook(lambda m, i, o: seen.append(type(o)))
    layer.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    layer.register_full_backward_hook(lambda m, i, o: None)
    x = torch.ones(1, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dn.jvp(layer, (x,), (x,))[1], 2 * x @ layer.weight.T)
    assert issubclass(seen[0], dn.DualTensor)
    leaf = x.clone().requires_grad_()
    with pytest.raises(UnsupportedOpError):  # the hook's own function would cut the reverse graph
        dn.jvp(layer, (leaf,), (x,))


def test_reading_a_tangent_under_no_grad_does_not_cut_the_graph():
    w = torch.tensor([0.3, 0.5], requires_grad=True)
    y = torch.sin(dn.dual(w, torch.ones(2)))
    with torch.no_grad():
        y.tangent.sum()
    y.tangent.sum().backward()
    torch.testing.assert_close(w.grad, -torch.sin(w.detach()))


def test_an_op_under_no_grad_is_not_recorded():
    w = torch.tensor([0.3, 0.5], requires_grad=True)
    with torch.no_grad():
        y = torch.sin(dn.dual(w, torch.ones(2)))
    assert not y.tangent.requires_grad and not y.primal.requires_grad


def test_copies_of_a_module_that_holds_a_dual_raise():
    module = nn.Module()
    module.state = dn.dual(torch.ones(1), torch.ones(1))
    with pytest.raises(UnsupportedOpError):
        copy.deepcopy(module)


def test_views_report_their_values():
    d = dn.dual(BASE.clone(), BASE)
    v = d[0]
    assert isinstance(v, Tensor) and torch.equal(v.tangent[0], BASE[0])
