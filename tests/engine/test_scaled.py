"""Scaled tangents: the same numbers as dense ones, in every trap that postponing a product opens."""

import math
import threading

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import dualnn as dn
from dualnn.engine import scaled, tangents
from dualnn.engine.errors import DualInputError
from dualnn.engine.scaled import RANGES, Scaled, _Tests, scaled_tangents
from dualnn.engine.tangents import Dense
from tests.engine.oracles import rand

K, N = 3, 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tensors meet what only large ones meet otherwise."""
    monkeypatch.setattr(tangents, "LARGE", 1)
    monkeypatch.setattr(scaled, "DIRECTIONS", 1)


def waits(y):
    return isinstance(y._tan, Scaled) and y._tan._parts[1:] != (None, 1.0)


def seeds(*shape, dtype=torch.float64, seed=1):
    return rand(seed)(*shape).to(dtype), rand(seed + 50)(K, *shape).to(dtype)


def both(fn, x, t):
    """Directions of fn with scaled tangents and without."""
    on = dn.jvp(fn, (x,), (t,))[1]
    with scaled_tangents(False):
        off = dn.jvp(fn, (x,), (t,))[1]
    return on, off


def waiting(x, t, *factors):
    """A dual whose directions wait for the product with factors, and what they are."""
    y = dn.dual(x, t) * 1.5  # the directions of a caller are multiplied at once
    expected = t * 1.5
    for f in factors:
        y, expected = y * f, expected * f
    assert waits(y)
    return y, expected


# --- what waits


def test_a_chain_waits_and_a_mixing_operation_does_not():
    x, t = seeds(N)
    seen = []

    def chain(y):
        for _ in range(3):
            y = torch.sin(y) * x + 1.0
            seen.append(waits(y))
        seen.append(waits(y.cumsum(0)))
        return y

    on, off = both(chain, x, t)
    torch.testing.assert_close(on, off, rtol=1e-13, atol=1e-14)
    assert seen == [True, True, True, False] + 4 * [False]


def test_sums_of_one_base_wait():
    x, t = seeds(N)
    seen = []

    def residual(y):
        y = y + 0.3 * torch.tanh(0.9 * y)
        seen.append(waits(y))
        y = y * torch.sigmoid(y) - y
        seen.append(waits(y))
        return y

    on, off = both(residual, x, t)
    torch.testing.assert_close(on, off, rtol=1e-13, atol=1e-14)
    assert seen == [True, True, False, False]


def test_a_sum_of_two_bases_is_formed():
    x, t = seeds(N)
    a, da = waiting(x, t, x)
    b, db = waiting(x, 2 - t, x + 1)
    y = a + b
    assert not waits(y)
    z = torch.sin(y)  # the sum is a base of its own
    assert waits(z)
    torch.testing.assert_close(y.tangent, da + db)
    torch.testing.assert_close(z.tangent, (da + db) * torch.cos(y.primal))


def test_what_is_small_stays_dense(monkeypatch):
    monkeypatch.undo()
    x, t = torch.linspace(-1, 1, 16), torch.ones(8, 16)
    seen = []
    dn.jvp(lambda y: seen.append(type(torch.sin(torch.sin(y))._tan)) or y, (x,), (t,))
    few = torch.ones(scaled.DIRECTIONS - 1, tangents.LARGE)
    dn.jvp(lambda y: seen.append(type(torch.sin(torch.sin(y))._tan)) or y, (torch.zeros(tangents.LARGE),), (few,))
    assert seen == [Dense, Dense]


def test_the_switch_is_of_one_thread_and_is_restored():
    x, t = seeds(N)
    with pytest.raises(KeyError), scaled_tangents(False):
        seen = []
        other = threading.Thread(target=lambda: seen.append(waits(dn.dual(x, t) * x * x)))
        other.start()
        other.join()
        assert seen == [True] and not waits(dn.dual(x, t) * x * x)
        with scaled_tangents(True):
            y = dn.dual(x, t) * x * x
            assert waits(y)
        assert not waits(y * x)  # switched off, what waits is formed by the next operation
        raise KeyError
    assert waits(dn.dual(x, t) * x * x)


# --- programs

UNARY = [
    torch.sin, torch.tanh, torch.relu, torch.sigmoid, torch.abs, torch.neg, torch.square, torch.exp,
    nn.functional.gelu, nn.functional.silu, nn.functional.softplus, nn.functional.hardtanh,
    lambda y: torch.sqrt(1 + y * y), lambda y: 1 / (2 + y * y), lambda y: y * 0.7 - 0.1, lambda y: 3 - y,
    lambda y: torch.where(y > 0.2, y, -0.5 * y), lambda y: y.clone(), lambda y: y.flip(0), lambda y: y - y.mean(),
    lambda y: y.reshape(-1, 1).expand(-1, 2).sum(1), lambda y: y.view(1, -1)[0], lambda y: y.cumsum(0) / 3,
    lambda y: 0.0 * y, lambda y: y.clamp(-0.5, 0.9), lambda y: torch.log(y.abs() + 0.5), lambda y: y**2,
    lambda y: nn.functional.leaky_relu(y, 0.1), lambda y: y + y.detach(), lambda y: torch.lerp(y, y * y, 0.25),
]  # fmt: skip
BINARY = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.atan2, lambda a, b: a / (1.5 + b * b),
    lambda a, b: torch.addcmul(a, b, b, value=0.3), lambda a, b: a.clone().mul_(b),
    lambda a, b: a.clone().add_(b, alpha=2), lambda a, b: torch.stack([a, b]).sum(0),
]  # fmt: skip


def program(seed, length=12):
    """A random program of one vector."""
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=g))

    steps = [(draw(3), draw(1000), draw(1000), draw(1000)) for _ in range(length)]
    w = torch.rand(N, generator=g, dtype=torch.float64) + 0.2

    def run(x):
        values = [x, x * w.to(x.dtype), 0.5 * x]
        for kind, op, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            y = UNARY[op % len(UNARY)](a) if kind < 2 else BINARY[op % len(BINARY)](a, b)
            values.append(y if y.detach().abs().max() < 50 else y / 50)
        return sum(values[3:])

    return run


@pytest.mark.parametrize("seed", range(60))
def test_programs_agree(seed):
    x, t = seeds(N, seed=seed)
    on, off = both(program(seed), x, t)
    torch.testing.assert_close(on, off, rtol=1e-11, atol=1e-11)
    x, t = x.float(), t.float()
    on, off = both(program(seed), x, t)
    torch.testing.assert_close(on, off, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(60, 80))
def test_programs_agree_to_second_order(seed):
    fn = program(seed, 6)
    x, t = seeds(N, seed=seed)
    on, off = both(lambda y: dn.jvp(fn, (y,), (t.flip(0),))[1], x, t)
    torch.testing.assert_close(on, off, rtol=1e-10, atol=1e-10)

    def reverse():
        leaf = x.clone().requires_grad_()
        pushed = dn.jvp(lambda y: fn(y) + y * y, (leaf,), (t,))[1]
        return torch.autograd.grad((pushed * pushed).sum(), leaf)[0]

    def forward_over_reverse(y):  # autograd inside of the function: first order outside
        leaf = torch.ones(N, dtype=y.dtype).requires_grad_()
        return y * torch.autograd.grad(fn(leaf).sum(), leaf, allow_unused=True, materialize_grads=True)[0]

    slopes = reverse()
    on, off = both(forward_over_reverse, x, t)
    torch.testing.assert_close(on, off, rtol=1e-10, atol=1e-10)
    with scaled_tangents(False):
        torch.testing.assert_close(slopes, reverse(), rtol=1e-9, atol=1e-9)


def test_against_a_closed_form():
    x, t = seeds(N)
    slope = 1 - torch.tanh(0.9 * torch.sin(x)) ** 2
    _, pushed = dn.jvp(lambda y: torch.tanh(0.9 * torch.sin(y)) + 2 * y, (x,), (t,))
    torch.testing.assert_close(pushed, t * (slope * 0.9 * torch.cos(x) + 2))


# --- guard 1: somebody writes


def overwrite(name, w):
    if name == "in place":
        w.mul_(3)
    elif name == "data":
        w.data.mul_(3)
    elif name == "numpy":
        w.numpy()[:] = 3
    elif name == "foreach":
        torch._foreach_mul_([w], 3)
    elif name == "out":
        torch.mul(w, 3, out=w)
    else:
        p = nn.Parameter(w)
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.5).step()


WRITES = ["in place", "data", "numpy", "foreach", "out", "optimizer"]


@pytest.mark.parametrize("how", WRITES)
def test_an_operand_is_overwritten_before_the_product_is_formed(how):
    x, t = seeds(N)
    w, v = rand(3)(N), rand(4)(N)
    y, dy = waiting(x, t, w)
    z, dz = waiting(x, t, w, v)
    overwrite(how, w)
    overwrite(how, v)
    torch.testing.assert_close(y.tangent, dy)
    torch.testing.assert_close(z.tangent, dz)


@pytest.mark.parametrize("how", WRITES)
def test_the_directions_of_a_caller_are_overwritten(how):
    x, t = seeds(N)
    before = t.clone()
    d = dn.dual(x, t)
    y = torch.sin(d) * x
    overwrite(how, t)
    torch.testing.assert_close(y.tangent, before * torch.cos(x) * x)
    torch.testing.assert_close((d * x).tangent, t * x)  # operations that come later see what is there then


def test_a_function_that_overwrites_its_own_directions_raises():
    x, t = seeds(N)

    def careless(y):
        z = torch.sin(y)
        t.mul_(2)
        return z

    with pytest.raises(DualInputError, match=r"\(3, 5\) were overwritten.*scaled_tangents"):
        dn.jvp(careless, (x,), (t,))
    with scaled_tangents(False):
        dn.jvp(careless, (x,), (t,))


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("how", WRITES)
def test_what_outlives_the_function_has_directions_of_its_own(how, read):
    x, t = seeds(N)
    kept, before = [], t.clone()

    def leaky(y):
        kept.append(y * x)
        if read:
            assert torch.equal(y.tangent, t)
        kept.extend([y * x * 2, y * 1.0])
        return y * x

    _, pushed = dn.jvp(leaky, (x,), (t,))
    overwrite(how, t)
    pushed.zero_()
    assert waits(kept[0])
    torch.testing.assert_close(kept[0].tangent, before * x)
    torch.testing.assert_close(kept[1].tangent, before * x * 2)


def test_what_outlives_a_function_that_raises():
    x, t = seeds(N)
    kept, before = [], t.clone()

    def failing(y):
        kept.append(y * x)
        raise KeyError

    with pytest.raises(KeyError):
        dn.jvp(failing, (x,), (t,))
    t.zero_()
    torch.testing.assert_close(kept[0].tangent, before * x)


def test_nothing_is_copied_where_nothing_outlives_the_function(monkeypatch):
    x, t = seeds(N)
    copies, kept = [], []
    depart = tangents.Base.depart
    monkeypatch.setattr(tangents.Base, "depart", lambda base: copies.append(base) or depart(base))
    dn.jvp(lambda y: [y * x, y * 2, y], (x,), (t,))
    assert not copies
    dn.jvp(lambda y: kept.append(y * x) or y * 2, (x,), (t,))
    assert len(copies) == 1


def test_results_never_share_memory_with_the_callers_directions():
    x, t = seeds(N)
    for fn in (lambda y: 2 * y - y, lambda y: y * 1.0 + 0 * y, lambda y: (y * x) / 1.0):
        pushed = dn.jvp(fn, (x,), (t,))[1]
        assert pushed.data_ptr() != t.data_ptr()


def test_a_tangent_that_was_read_may_be_written_to():
    x, t = seeds(N)
    y, dy = waiting(x, t, x)
    z = torch.sin(y)
    y.tangent.zero_()  # as with dense tangents: y moves no more, z was computed before
    assert y.tangent.eq(0).all() and (y * x).tangent.eq(0).all()
    torch.testing.assert_close(z.tangent, dy * torch.cos(y.primal))

    y, dy = waiting(x, t, x)
    read = y.tangent
    z = torch.sin(y) * x
    torch.testing.assert_close(z.tangent, dy * torch.cos(y.primal) * x)
    again = torch.cos(y)
    read.zero_()
    torch.testing.assert_close(again.tangent, -dy * torch.sin(y.primal))


@pytest.mark.parametrize("view", [lambda y: y.T, lambda y: y[0], lambda y: y.reshape(-1), lambda y: y.unbind()[1]])
def test_a_view_of_a_base_is_read_and_written_to(view):
    x, t = seeds(2, N)
    y = dn.dual(x, t) * x  # a base of its own
    z = torch.sin(y)
    expected = t * x * torch.cos(y.primal)
    view(y).tangent.zero_()
    torch.testing.assert_close(z.tangent, expected)

    y = dn.dual(x, t) * x
    shown = view(y)
    read = shown.tangent  # now somebody holds the memory: no product with it waits
    z = torch.sin(y)
    read.zero_()
    torch.testing.assert_close(z.tangent, expected)


def test_duals_are_written_to_in_place():
    x, t = seeds(N)

    def fn(y):
        y = y * x
        z = torch.sin(y)
        row = y[1:3]
        y.mul_(2)
        y[0] = z[1]
        row.add_(z[:2])
        z += y
        z.relu_()
        w = torch.zeros_like(z)
        w.copy_(z)
        return y * w + row.sum()

    on, off = both(fn, x, t)
    torch.testing.assert_close(on, off, rtol=1e-13, atol=1e-14)


def test_out_and_plain_destinations_raise_as_ever():
    y, _ = waiting(*seeds(N), rand(3)(N))
    with pytest.raises(dn.UnsupportedOpError):
        torch.sin(y, out=torch.empty(N, dtype=torch.float64))
    with pytest.raises(dn.UnsupportedOpError):
        torch.zeros(N, dtype=torch.float64).copy_(y)


# --- guard 2: the factor's range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("power", [-0.9, -0.5, 0.5, 0.9])
@pytest.mark.parametrize("zero", [False, True])
def test_the_factor_leaves_the_range_where_the_directions_do_not(dtype, power, zero):
    """t = big ** -p, then factors big ** (p / 2) six times, then back again."""
    most = math.log2(torch.finfo(dtype).max)
    up = torch.full((N,), 2.0 ** (power * most / 3), dtype=dtype)
    if zero:
        up[0] = 0.0
    t = torch.full((K, N), 2.0 ** (-power * most), dtype=dtype)

    def chain(y, count):
        for _ in range(count):
            y = y * up
        return y

    for count in (3, 4, 5):
        on, off = both(lambda y, c=count: chain(y, c), torch.ones(N, dtype=dtype), t)
        torch.testing.assert_close(on, off, rtol=10 * torch.finfo(dtype).eps, atol=0)
        assert on[:, 1:].ne(0).all() and on.isfinite().all()


def test_a_factor_that_underflowed_on_the_way_comes_back():
    down, up = torch.full((N,), 1e-25), torch.full((N,), 1e25)
    for t in (torch.full((K, N), 1e12), torch.full((K, N), 1e10)):
        for order in ((down, down, up, up), (up, down, down, up)):

            def chain(y, order=order):
                for f in order:
                    y = y * f
                return y

            on, off = both(chain, torch.ones(N), t)
            torch.testing.assert_close(on, off, rtol=1e-5, atol=0)


def test_directions_underflow_as_the_dense_ones_do():
    """A modest base: 1e-20 ** 2 is denormal, ** 3 is zero, in the factor as in the directions."""
    f, t = torch.full((N,), 1e-20), torch.full((K, N), 3.0)
    for count in (2, 3):
        on, off = both(lambda y, c=count: [y := y * f for _ in range(c)][-1], torch.ones(N), t)
        torch.testing.assert_close(on, off, rtol=0, atol=1e-43)


def test_numbers_leave_the_range():
    x, t = torch.ones(N), torch.full((K, N), 1e-30)
    for numbers in ((1e25, 1e25, 1e-20), (1e-2, 1e-3, 1e-2, 1e30), (0.0, 1e30), (3, 2, 7.5), (True, 2)):
        for first in (1.0, torch.linspace(0.5, 1, N)):
            on, off = both(lambda y, n=numbers, f=first: [y := y * a for a in (f, *n)][-1], x, t)
            torch.testing.assert_close(on, off, rtol=1e-5, atol=0)


def test_a_tiny_operand_and_numbers():
    """The operand alone is in range, and so is its product with the directions; with the number it is not."""
    x, t, tiny = torch.ones(N), torch.full((K, N), 1e30), torch.full((N,), 1.3e-38)
    for fn in (
        lambda y: y * 0.01 * tiny,
        lambda y: y * tiny * 0.01,
        lambda y: (y * tiny + y * tiny) * 0.01,
        lambda y: y * tiny * 0.01 + y * tiny * 0.01,
        lambda y: (y * tiny - y * 0.0) * 0.01,
    ):
        on, off = both(fn, x, t)
        torch.testing.assert_close(on, off, rtol=1e-6, atol=0)
    t = torch.full((K, N), 1e300, dtype=torch.float64)
    on, off = both(lambda y: y * 0.5 * 5e-324, x.double(), t)
    torch.testing.assert_close(on, off, rtol=1e-6, atol=0)


def test_sums_leave_the_range():
    x, t = torch.ones(N), torch.full((K, N), 1e-30)
    big = torch.full((N,), 3e38)
    on, off = both(lambda y: y * big + y * big, x, t)
    torch.testing.assert_close(on, off, rtol=1e-5, atol=0)
    assert on.isfinite().all()

    def doubled(y):
        y = y * torch.full((N,), 1e17)
        for _ in range(80):
            y = y * 0.75 + y * 1.25
        return y

    on, off = both(doubled, x, t)
    torch.testing.assert_close(on, off, rtol=1e-5, atol=0)


def test_a_sum_that_cancels_is_zero():
    x, t = seeds(N)
    for fn in (lambda y: y * x - x * y, lambda y: 2 * y - (y + y), lambda y: torch.sin(y) - torch.sin(y)):
        on, off = both(fn, x, t)
        assert on.eq(0).all() and off.eq(0).all()


@pytest.mark.parametrize("dtype", RANGES)
def test_the_tests_of_magnitudes(dtype):
    kind, tests = RANGES[dtype], _Tests(RANGES[dtype])
    low, high = 2.0**kind.least, 2.0**kind.most
    info = torch.finfo(dtype)
    for value, inside, below in (
        (1.0, True, True), (-1.0, True, True), (low, True, True), (-low, True, True), (low * 0.999, False, True),
        (high * 0.999, True, True), (-high, False, False), (high, False, False), (0.0, False, True),
        (-0.0, False, True), (info.tiny / 4, False, True), (info.max, False, False), (math.inf, False, False),
        (-math.inf, False, False), (math.nan, False, False),
    ):  # fmt: skip
        t = torch.ones(4, dtype=dtype)
        t[2] = value
        assert tests.within(t) == inside, value
        assert tests.bounded(t) == below, value
    assert tests.exponents(torch.tensor([0.0, -0.25, 3.0, -0.0], dtype=dtype)) == (-2, 1)
    assert tests.exponents(torch.tensor([0.5, -7.0], dtype=dtype)) == (-1, 2)


# --- guard 3: modes


def test_it_is_formed_under_another_grad_mode():
    x, t = seeds(N)
    w = rand(3)(N).requires_grad_()
    with torch.no_grad():
        y, expected = waiting(x, t, w)  # done under no_grad: a constant to autograd, whenever it is formed
    assert not y.requires_grad and not y.tangent.requires_grad
    z = dn.dual(x, t) * x * w  # recorded
    assert z.requires_grad
    with torch.no_grad():
        read = z.tangent  # a logger
        torch.testing.assert_close(read, t * x * w)
    (grad,) = torch.autograd.grad(z.tangent.sum(), w)
    torch.testing.assert_close(grad, (t * x).sum(0))

    y, expected = waiting(x, t, x)
    with torch.inference_mode():
        assert torch.equal(y.tangent, expected) or torch.allclose(y.tangent, expected)
    ((y.tangent * w).sum()).backward()  # what inference mode formed was not kept
    torch.testing.assert_close(w.grad, expected.sum(0))


def test_reverse_over_what_waits():
    x, t = seeds(N)
    w = rand(3)(N).requires_grad_()

    def loss():
        y = torch.sin(dn.dual(x, t) * x)  # waits
        y = torch.tanh(y * w)  # no more
        return (y.tangent**2).sum()

    (grad,) = torch.autograd.grad(loss(), w)
    with scaled_tangents(False):
        (expected,) = torch.autograd.grad(loss(), w)
    torch.testing.assert_close(grad, expected)


def test_inside_torch_func():
    x, t = seeds(N)
    y, dy = waiting(x, t, x)

    def slope(a):  # what waits outside is formed inside, for the transform, and not kept
        return ((y * a).tangent ** 2).sum()

    grad = torch.func.grad(slope)(x)
    torch.testing.assert_close(grad, 2 * (dy * x * dy).sum(0))
    rows = torch.vmap(lambda a: (y * a).tangent)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(rows, torch.stack([dy * x, 2 * dy * x]))
    assert waits(y)
    torch.testing.assert_close(y.tangent, dy)

    def pushed(a):
        return dn.jvp(lambda z: torch.sin(z) * a * z, (a,), (t,))[1].sum()

    expected = torch.autograd.functional.jacobian(pushed, x)
    torch.testing.assert_close(torch.func.grad(pushed)(x), expected)


def test_under_tracing():
    x, t = seeds(N)

    def fn(x, t):
        return dn.jvp(lambda y: torch.sin(y) * x * y, (x,), (t,))[1]

    graph = make_fx(fn)(x, t)
    a, b = seeds(N, seed=7)
    torch.testing.assert_close(graph(a, b), fn(a, b))
    y, dy = waiting(x, t, x)
    graph = make_fx(lambda a: (y * a).tangent)(x)
    torch.testing.assert_close(graph(2 * x), dy * 2 * x)
    assert waits(y)


def test_compiled_programs():
    x, t = seeds(N)
    program = dn.compile(lambda y: torch.sin(y) * x + y, backend="eager")
    y = program(waiting(x, t, x)[0])
    expected = torch.sin(waiting(x, t, x)[0]) * x + waiting(x, t, x)[0]
    torch.testing.assert_close(y.tangent, expected.tangent)


def test_autocast():
    x, t = seeds(N, N, dtype=torch.float32)
    w = rand(3)(N, N).float()

    def fn(y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.sin(y) * w
            return torch.tanh(nn.functional.linear(y, w)) * y

    on, off = both(fn, x, t)
    assert on.dtype == off.dtype
    torch.testing.assert_close(on, off, rtol=0.05, atol=0.05)


def test_a_factor_of_another_level():
    x, t = seeds(N)
    inner = dn.dual(x, t)

    def fn(y):
        z = torch.sin(y) * x  # waits
        return z * inner  # a constant to y, but it moves

    out, pushed = dn.jvp(fn, (x,), (t,))
    torch.testing.assert_close(pushed.primal, t * torch.cos(x) * x * x)
    torch.testing.assert_close(pushed.tangent, t[None] * (torch.cos(x) * x) * t[:, None])


def test_a_zero_factor_that_moves():
    """The slope of y^2 at 0 is 0 and moves."""
    x = torch.zeros(N, dtype=torch.float64)
    t = torch.ones(K, N, dtype=torch.float64)
    slope = lambda y: dn.jvp(lambda z: 3 * torch.square(z) * 2, (y,), (t,))[1]  # noqa: E731
    torch.testing.assert_close(dn.jvp(slope, (x,), (t,))[1], torch.full((K, K, N), 12.0, dtype=torch.float64))


# --- guard 4: zero times infinity


@pytest.mark.parametrize("warm", [False, True])
def test_singular_derivatives(warm):
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    for op, at in ((torch.log, 0.0), (torch.sqrt, 0.0), (torch.rsqrt, 0.0), (torch.reciprocal, 0.0), (torch.abs, 0.0),
                   (torch.relu, 0.0), (torch.asin, 1.0), (torch.log1p, -1.0)):  # fmt: skip

        def fn(y, op=op):
            y = op(y * 1.0 + 0.0 * y if warm else y)
            return y * 2.0 * torch.tensor([0.5, 3.0])

        on, off = both(fn, torch.tensor([at, 0.5]), t)
        torch.testing.assert_close(on, off, equal_nan=True)
    out = dn.jvp(torch.log, (torch.zeros(2),), (torch.tensor([[0.0, 1.0]]),))[1]
    assert out.tolist() == [[0.0, math.inf]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_operands_that_are_not_finite(bad):
    w = torch.tensor([1.0, bad, 0.0])
    t = torch.tensor([[1.0, 0.0, 1.0], [0.0, -1.0, 2.0]])
    for fn in (
        lambda y: y * w,
        lambda y: y * 2 * w * 0.5,
        lambda y: torch.relu(y * w) + y,
        lambda y: y * w * torch.tensor([1.0, 0.0, 1.0]),
        lambda y: y * w - y * w,
        lambda y: y * bad,
        lambda y: (y * 2 * bad) * 0.0,
    ):
        on, off = both(fn, torch.ones(3), t)
        torch.testing.assert_close(on, off, equal_nan=True)
    on, off = both(lambda y: torch.sin(y) * w, torch.ones(3), torch.tensor([[bad, 1.0, 0.0]]))
    torch.testing.assert_close(on, off, equal_nan=True)


def test_where_selects():
    x = torch.tensor([0.0, 4.0])
    on, off = both(lambda y: torch.where(y > 0, torch.sqrt(2 * y), 3 * y), x, torch.ones(1, 2))
    torch.testing.assert_close(on, off)
    assert on.isfinite().all()


def test_a_selection_over_one_base_waits():
    x, t = seeds(2, N)
    mask = rand(3)(2, N) > 0
    w = rand(4)(2, N)
    waited = []

    def noted(y):
        waited.append(waits(y))
        return y

    for fn in (
        lambda y: noted(torch.where(mask, y * w, -0.5 * y)),
        lambda y: noted(torch.where(mask, y * w, 1.0)),
        lambda y: noted(torch.where(mask[0], 2.0, y * w * 0.3)) * w,
        lambda y: noted(torch.where(mask, 2 * y, y)) * w,
        lambda y: noted(torch.where(y > 0, y * w, y)),
        lambda y: noted(torch.where(mask, y * torch.inf, y * w)),
        lambda y: noted(torch.where(mask, y * w * 1e-30 * w, (y * 1e-300) * w)) * 1e200,
    ):
        before = len(waited)
        on, off = both(fn, x, t)
        torch.testing.assert_close(on, off, rtol=1e-12, atol=0, equal_nan=True)
        assert waited[before:] in ([True, False], [False, False])
    assert waited[0::2] == [True] * 5 + [False, False]

    def two_bases(y):
        return noted(torch.where(mask, (y * w).cumsum(0) * w, y * w))

    on, off = both(two_bases, x, t)
    torch.testing.assert_close(on, off)
    on, off = both(lambda y: noted(torch.where(mask, y * w, torch.ones(3, 2, N).double())), x, t)  # broadcasts
    torch.testing.assert_close(on, off)
    assert not any(waited[-4:])


# --- shapes and kinds


def test_broadcasting():
    x, t = seeds(2, N)
    col, row, scalar, wide = rand(3)(2, 1), rand(4)(N), rand(5)(), rand(6)(4, 2, N)
    for fn in (
        lambda y: y * col * row,
        lambda y: torch.sin(y) * scalar * col,
        lambda y: y * col * wide,
        lambda y: (y * 2 + col) * wide + y,
        lambda y: torch.sin(y)[0] * (y * col),
        lambda y: y * scalar + y * row - y * col * scalar,
        lambda y: (y * col.expand(2, N)).T * row.unsqueeze(1),
        lambda y: (y * row * (row > 0)) * (col > 0) * torch.tensor(True),
        lambda y: y * row[::2].repeat_interleave(2)[:N] * torch.cat([row, row])[::2],
    ):
        on, off = both(fn, x, t)
        torch.testing.assert_close(on, off, rtol=1e-13, atol=1e-14)


def test_a_factor_of_another_dtype_does_not_wait():
    y, _ = waiting(*seeds(N, dtype=torch.float32), rand(3)(N).float())
    assert waits(y * 2) and not waits(y * rand(4)(N)) and not waits(y * torch.arange(N))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16, torch.float16])
def test_other_kinds_of_numbers_stay_dense(dtype):
    x, t = seeds(N, dtype=dtype)
    y = dn.dual(x, t) * x * x
    assert type(y._tan) is Dense
    on, off = both(lambda y: torch.sin(y) * x * y, x, t)
    torch.testing.assert_close(on, off, rtol=0, atol=0)


def test_conversions():
    x, t = seeds(N, dtype=torch.float32)
    w = rand(3)(N)
    for fn in (
        lambda y: (y * x * 2).double() * w,
        lambda y: (y * x * 2).bfloat16().float() * x,
        lambda y: torch.complex(y * x * 2, y).abs(),
        lambda y: (y * x) * torch.tensor(2.0, dtype=torch.float64),
        lambda y: (y * x) * torch.arange(N),
        lambda y: (y * x) * w,
        lambda y: (y * x * 2) + w,
        lambda y: ((y * x) * 1j).imag,
        lambda y: (y * x) * True,
    ):
        on, off = both(fn, x, t)
        assert on.dtype == off.dtype
        torch.testing.assert_close(on, off, rtol=0.02, atol=1e-4)


def test_detached_it_waits_for_nothing():
    x, t = seeds(N)
    on, off = both(lambda y: (y * x * 2).detach() * y + (y * x).detach(), x, t)
    torch.testing.assert_close(on, off)
    torch.testing.assert_close(on, 2 * x * x * t)


def test_samples_kept_apart():
    """A base meets tangents whose samples are kept apart: it raises, as dense ones do."""
    y, _ = waiting(*seeds(N), rand(3)(N))
    apart = tangents.PerSample(torch.ones(K, N, dtype=torch.float64), K)
    with pytest.raises(dn.StructureError):
        y._tan.plus(apart)
