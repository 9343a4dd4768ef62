"""Views of duals: a write to a view changes its base and every other view of it, as in torch, and nothing else."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dualnn as dn
from dualnn.engine import StructureError, UnsupportedOpError
from dualnn.engine.dual_tensor import DualTensor, dual, make
from dualnn.engine.layout import Layout
from dualnn.engine.registry import SPECS
from dualnn.engine.tangents import LowRank, PerSample, Separate, Zero
from dualnn.engine.views import StaleDual
from tests.engine.oracles import five_point, rand, separated

X = rand(5)(3, 4)
V = torch.stack([rand(6)(3, 4), rand(7)(3, 4)])


def check(fn, x=X, t=V):
    """Value against the plain run; K tangents, forward over forward and reverse over forward against differences."""
    out, pushed = dn.jvp(lambda a: fn(a * 1.0), (x,), (t,))
    torch.testing.assert_close(out, fn(x * 1.0), rtol=1e-13, atol=1e-13)
    for k in range(len(t)):
        oracle = five_point(lambda h, k=k: [fn((x + h * t[k]) * 1.0)])[0]
        torch.testing.assert_close(pushed[k], oracle, rtol=1e-7, atol=1e-8)
    u, v = t[0], t[-1]
    weights = rand(8)(*out.shape)

    def slope(a):
        return (weights * dn.jvp(lambda b: fn(b * 1.0), (a,), (u,))[1]).sum()

    # Ours, checked above, and not torch.func.jvp: that is wrong for x.mul_(x) (torch 2.14).
    oracle = five_point(lambda h: [slope(x + h * v)], step=1e-2)[0]
    torch.testing.assert_close(dn.jvp(slope, (x,), (v,))[1], oracle, rtol=1e-6, atol=1e-7)
    leaf = x.clone().requires_grad_()
    total = slope(leaf)
    grad = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    torch.testing.assert_close((grad * v).sum(), oracle, rtol=1e-6, atol=1e-7)


def rows(x):
    for row in (out := x * x).unbind():
        row.add_(row.sum())
    return out


def iadd(x):
    x[0] += x[1] * x[2]
    x[:, 1] *= 3.0
    x[1:, 2:] -= x[0, 0]
    return x * x


def elements(x):
    for i in range(3):
        for j in range(4):
            x[i, j] *= x[(i + 1) % 3, j].sin()
    return x


def masked(x):
    x[X > 0] += x.sum()
    x[torch.tensor([0, 2])] *= x[1]
    return x


def flat_entry(x):
    x.view(-1)[5] = x[0, 0] * x[1, 1]
    x.view(-1)[7:9].mul_(x[2, 2])
    return x * 2


def view_of_a_view(x):
    v = x.view(4, 3)
    w = v[1:].t()[0]
    u = w[1:]
    u.mul_(x.sum())
    v.add_(w.sum())
    return torch.cat([x.reshape(-1), v.reshape(-1), w, u])


def base_then_views(x):
    a, b = x[0], x.t()
    x.mul_(x)
    early = a * b.sum()
    x[0] = 2.0
    return torch.cat([early, a, b.reshape(-1)])


def results_before_the_write_stay(x):
    v = x[1]
    y, z = v * x[0], x * 1.0
    kept = x.clone()
    v.mul_(y.sum())
    return torch.cat([y, z.reshape(-1), kept.reshape(-1), v])


def a_reshape_that_copies(x):
    v = x.t().reshape(-1)
    v.mul_(2.0)
    w = x.reshape(-1)
    w.mul_(x.sum())
    return torch.cat([v, w, x.reshape(-1)])


def chunks(x):
    a, b = x.chunk(2, 1)
    a.mul_(b)
    c, d = x.split([1, 2])
    d.add_(c)
    e = x.tensor_split(3)
    e[2].copy_(e[0])
    return x * b.sum()


def outlives_its_base(x):
    y = x * x
    a, b = y[:2], y[1:]
    del y
    a.mul_(b.sum())
    return torch.cat([a, b])


def diagonals(x):
    x.diagonal().zero_()
    x.T.add_(x.sum())
    x[:, :3].mT.tril_()
    x.narrow(0, 1, 2).mul_(2.0)
    x.select(1, 3).fill_(x[0, 1])
    return x * x


def windows(x):
    x.unfold(1, 2, 2).mul_(x.sum())  # windows apart
    seen = x.unfold(1, 2, 1)  # windows that overlap can be read
    x[0].add_(x[1])
    return seen * seen


def expanded(x):
    e = x[0].expand(5, 4)
    x[0].mul_(x[1])
    f = x.unsqueeze(1).expand(3, 2, 4)[:, 0]
    f.add_(f.sum())  # no entry twice any more
    return torch.cat([e, f])


def strided(x):
    x.as_strided((2, 2), (4, 2), 1).mul_(x.sum())
    return x * 1.0


def setitem_through_a_view(x):
    v = x[1:]
    v[0, 1:3] = x[0, :2] * v[1, 0]
    v[:, 0] = 3.0
    x[2] = v[0]
    return torch.cat([x, v])


def shape_in_place(x):
    y = x * 1.0
    v = y[0]
    y.t_()
    y.mul_(y.sum())
    w = y[0]
    w.unsqueeze_(0)
    w.add_(v[0] * 1.0)
    w.squeeze_()
    return torch.cat([y.reshape(-1), v, w, y.transpose_(0, 1)[0]])


def square_transposed(x):
    y = (x @ x.t()).sin()
    v = y[0]
    y.t_()
    y[1].mul_(v * 1.0)
    return torch.cat([y.reshape(-1), v])


def modules_in_place(x):
    h = F.relu(x.view(2, 6)[:, 1:], inplace=True)
    F.dropout(x, 0.5, training=False, inplace=True).mul_(h.sum())
    return x * h.sum()


def strides_of_the_destination(x):
    y = x.t() * 1.0  # laid out in columns
    y.copy_(torch.ones(4, 3, dtype=torch.float64).cumsum(0) * x.sum())
    z = y.reshape(-1)  # copies, in torch, since copy_ does not change the destination's strides
    z.mul_(2.0)
    return torch.cat([y.reshape(-1), z])


def a_write_that_drops_the_tangent(x):
    v = x[0]
    x.zero_()
    v[1] = 4.0
    x[1].copy_(torch.ones(4, dtype=torch.float64))
    return x * 3 + v


def into_zeros(x):
    out = torch.zeros_like(x)
    for row, new in zip(out.unbind(), x.unbind(), strict=True):
        row.add_(new * new)
    out.view(-1)[3] += x.sum()
    return out * x


PROGRAMS = [
    rows,
    iadd,
    elements,
    masked,
    flat_entry,
    view_of_a_view,
    base_then_views,
    results_before_the_write_stay,
    a_reshape_that_copies,
    chunks,
    outlives_its_base,
    diagonals,
    windows,
    expanded,
    strided,
    setitem_through_a_view,
    shape_in_place,
    square_transposed,
    modules_in_place,
    strides_of_the_destination,
    a_write_that_drops_the_tangent,
    into_zeros,
]


@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_programs(fn):
    check(fn)


def complex_parts(x):
    z = torch.complex(x, x * x)
    v = z[0]
    z.real.mul_(x.sum())
    z.imag[1:].add_(z.real[:2])
    z.mul_(z)
    v.mul_(1j)
    w = torch.view_as_real(z)
    w[2, 1, 0] = 5.0
    return w * v.real.sum()


def conjugated(x):
    z = torch.complex(x, x * x)
    c = z.conj()
    c[0].mul_(1j)
    i = c.imag
    i[1].mul_(3.0)
    return torch.cat([z.real, z.imag, i, c.real])


def as_complex(x):
    z = torch.view_as_complex(x.view(3, 2, 2))
    z.mul_(z)
    x[0] *= 2.0
    return torch.cat([x, torch.view_as_real(z).view(3, 4)])


@pytest.mark.parametrize("fn", [complex_parts, conjugated, as_complex], ids=lambda fn: fn.__name__)
def test_complex_programs(fn):
    check(fn)


def program(seed: int, reshape: bool):
    """A random function of views, in-place writes and arithmetic; its choices look at shapes only."""

    def fn(x):
        draw = random.Random(seed)
        pool = [x * 1.0, torch.sin(x).t()]
        for _ in range(draw.randint(4, 14)):
            y = pool[draw.randrange(len(pool))]
            kind = draw.random()
            if kind < 0.45:
                pool.append(look(y, draw))
            elif kind < 0.85:
                change(y, pool[draw.randrange(len(pool))], draw, reshape)
            elif kind < 0.95:
                pool.append(torch.sin(y) + 0.5 * y)
            elif len(pool) > 2:
                del pool[draw.randrange(len(pool))]
        return torch.cat([y.reshape(-1) for y in pool])

    return fn


def look(y: Tensor, draw: random.Random) -> Tensor:
    """A random view (or, for some reshapes, a copy)."""
    if y.dim() == 0:
        return y.view(1)
    d = draw.randrange(y.dim())
    n = y.shape[d]
    views = [
        lambda: y.select(d, draw.randrange(n)),
        lambda: y[draw.randrange(len(y))],
        lambda: y[..., :: draw.randint(1, 2)],
        lambda: y.narrow(d, draw.randrange(n), 1),
        lambda: y.reshape(-1),
        lambda: y.flatten(),
        lambda: y.movedim(d, 0),
        lambda: y.transpose(0, -1),
        lambda: y.permute(*reversed(range(y.dim()))),
        lambda: y.unsqueeze(d),
        lambda: y.squeeze(),
        lambda: y.unbind(d)[draw.randrange(n)],
        lambda: y.chunk(2, d)[0],
        lambda: y.split(2, d)[-1],
        lambda: y.unfold(d, min(2, n), 2),
        lambda: y.diagonal(dim1=0, dim2=-1) if y.dim() > 1 else y,
        lambda: y.unflatten(d, (n, 1)),
        lambda: y.unflatten(d, (-1, 1)).mT,
        lambda: y.view_as(y),
        lambda: y[None, ..., 0],
    ]
    return views[draw.randrange(len(views))]()


def change(y: Tensor, z: Tensor, draw: random.Random, reshape: bool) -> None:
    """A random write into ``y``; the other operand is read before."""
    other = z.sum() * 0.3
    n = len(y) if y.dim() else 0
    writes = [
        lambda: y.mul_(0.7),
        lambda: y.tanh_(),
        lambda: y.add_(other),
        lambda: y.mul_(torch.cos(y)),
        lambda: y.copy_(other.expand(y.shape)),
        lambda: y.masked_fill_(torch.arange(y.numel()).view(y.shape) % 3 == 0, 0.2),
        lambda: y.fill_(0.5),
        lambda: y.__setitem__((..., slice(0, 1)), other) if n else y.copy_(other),
        lambda: y.__setitem__(n // 2, 1.5) if n else y.zero_(),
        lambda: step(y, draw.randrange(n), other) if n else y.neg_(),
        lambda: y if not reshape else y.t_() if y.dim() == 2 else y.squeeze_(),
        lambda: y.view_as(y).sub_(other.sin()),
        lambda: y.__setitem__(torch.arange(y.numel()).view(y.shape) % 2 == 0, other) if n else y.exp_(),
    ]
    writes[draw.randrange(len(writes))]()


def step(y: Tensor, i: int, other: Tensor) -> None:
    y[i] += other


@pytest.mark.parametrize("block", range(10))
def test_random_programs(block):
    """Three hundred programs: values, and two tangents against differences and torch.func.jvp."""
    for seed in range(30 * block, 30 * block + 30):
        fn, message = program(seed, reshape=seed % 2 == 0), f"program {seed}"
        out, pushed = dn.jvp(fn, (X,), (V,))
        torch.testing.assert_close(out, fn(X), rtol=1e-12, atol=1e-13, msg=message)
        for k in range(2):
            oracle = five_point(lambda h, k=k, fn=fn: [fn(X + h * V[k])])[0]
            torch.testing.assert_close(pushed[k], oracle, rtol=1e-7, atol=1e-8, msg=message)
            if seed % 2:  # torch's forward mode fails at t_() and its kin, for some programs
                value, oracle = torch.func.jvp(fn, (X,), (V[k],))
                torch.testing.assert_close(pushed[k], oracle, rtol=1e-10, atol=1e-12, msg=message)
        empty, none = dn.jvp(fn, (X,), (V[:0],))
        assert torch.equal(empty, out) and none.shape == (0, *out.shape)


@pytest.mark.parametrize("block", range(4))
def test_random_programs_to_second_order(block):
    """Forward over forward and reverse over forward against differences of the first order."""
    u, v = V
    for seed in range(1000 + 10 * block, 1010 + 10 * block):
        fn, message = program(seed, reshape=True), f"program {seed}"
        weights = rand(seed)(*fn(X).shape)

        def slope(x, fn=fn, weights=weights):
            return (weights * dn.jvp(fn, (x,), (u,))[1]).sum()

        oracle = five_point(lambda h, slope=slope: [slope(X + h * v)], step=1e-2)[0]
        torch.testing.assert_close(dn.jvp(slope, (X,), (v,))[1], oracle, rtol=1e-6, atol=1e-7, msg=message)
        leaf = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(slope(leaf), leaf)
        torch.testing.assert_close((grad * v).sum(), oracle, rtol=1e-6, atol=1e-7, msg=message)


# What is untouched, and what raises


def test_the_tensors_a_dual_was_made_of_are_never_overwritten():
    p, t = X.clone(), V.clone()
    d = dual(p, t)
    seen = d.primal, d.detach(), d[1].tangent
    before = [s.clone() for s in seen]
    d[0] += 1.0
    d.view(-1)[5:].zero_()
    assert torch.equal(p, X) and torch.equal(t, V)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


def test_a_source_overwritten_after_a_copy():
    d, source = dual(X.clone(), V), torch.ones(3, 4, dtype=torch.float64)
    d.copy_(source)
    source.fill_(7.0)
    assert torch.equal(d.primal, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("write", [lambda v: v.mul_(2), lambda v: v.zero_(), lambda v: v.__setitem__((0, 0), 1.0)])
@pytest.mark.parametrize(
    "view",
    [lambda x: x[0].expand(3, 4), lambda x: x.unfold(1, 2, 1), lambda x: x.as_strided((3, 3), (1, 1))],
)
def test_a_write_to_an_entry_shown_twice_raises(view, write):
    x = dual(X.clone(), V)
    with pytest.raises(UnsupportedOpError, match="several places"):
        write(view(x))
    base = dual(X[0].expand(3, 4), V)
    row = base[0]
    with pytest.raises(UnsupportedOpError, match="several places"):
        row.mul_(2)
    assert torch.equal(x.primal, X) and torch.equal(row.primal, X[0])


def test_a_view_beyond_its_dual_raises():
    p = torch.zeros(10)
    d = dual(p[:4], torch.ones(1, 4))
    beyond = torch.as_strided(d, (2,), (1,), 5)
    with pytest.raises(UnsupportedOpError, match="outside"):
        beyond.add_(1.0)


def test_inside_torch_func_a_write_near_views_raises():
    def fn(x):
        d = dual(x, torch.ones_like(x))
        v = d[0]
        d.mul_(2.0)
        return v.primal

    with pytest.raises(UnsupportedOpError, match=r"torch\.func"):
        torch.func.vmap(fn)(X)

    def alone(x):
        d = dual(x, torch.ones_like(x))
        d.mul_(d)
        d[0] = 1.0
        return d.tangent[0]

    expected = 2 * X
    expected[:, 0] = 0.0
    torch.testing.assert_close(torch.func.vmap(alone)(X), expected)


def test_views_of_a_captured_buffer_of_an_outer_level():
    def outer(x):
        buffer = torch.zeros_like(x)
        row = buffer[0]

        def inner(y):
            row[0] = y.sum()
            return y

        dn.jvp(inner, (x.detach(),), (x.detach(),))
        return buffer

    with pytest.raises(UnsupportedOpError, match="level"):
        dn.jvp(outer, (X,), (X,))


def test_a_view_of_a_plain_destination_raises():
    p, d = torch.zeros(3, 4), dual(X, V)
    with pytest.raises(UnsupportedOpError, match="zeros_like"):
        p[0].add_(d[0])
    with pytest.raises(UnsupportedOpError, match="out"):
        torch.add(d[0], d[1], out=p[0])
    assert not p.any()


# Representations of the tangent


def test_zero_destinations_and_sources():
    base = make(torch.zeros(3, 4, dtype=torch.float64), Zero(2), 1)
    row, last = base[0], base[2]
    row.add_(1.0)
    assert base._tan.is_zero and row._tan.is_zero and torch.equal(base.primal[0], row.primal)
    row.mul_(dual(X[0], V[:, 0]))
    assert torch.equal(base.tangent[:, 0], V[:, 0]) and not base.tangent[:, 1:].any() and not last.tangent.any()


@pytest.mark.parametrize("kind", ["separate", "low rank"])
def test_structured_tangents_become_dense(kind):
    if kind == "separate":
        tan = Separate(2, {1: X[0]}, X.shape)
    else:
        tan = LowRank(2, lambda: (V[:, :1, :3], V[:, 1:2]), X.shape)
    x, oracle = make(X.clone(), tan, 1), dual(X.clone(), tan.dense())
    for d in (x, oracle):
        v = d[1:]
        v[0].mul_(d[0])
    assert torch.equal(x.tangent, oracle.tangent) and torch.equal(x.primal, oracle.primal)


def test_samples_stay_apart():
    data = rand(9)(4, 3)  # two directions of two samples
    x = make(X[0, :3].clone(), PerSample(data, 2), 1)
    v = x[1:]
    v.mul_(2.0)
    x[0] = 1.0
    x[2] = x[1]
    assert isinstance(x._tan, PerSample) and isinstance(v._tan, PerSample)
    expected = torch.stack([torch.zeros(4, dtype=torch.float64), 2 * data[:, 1], 2 * data[:, 1]], 1)
    assert torch.equal(x.tangent, expected) and torch.equal(v.tangent, expected[:, 1:])
    with pytest.raises(StructureError, match="samples mix"):
        v[0] = dual(torch.ones((), dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    with pytest.raises(StructureError, match="samples mix"):
        v.copy_(dual(torch.ones(2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)))


# Reverse graphs


def test_a_write_under_no_grad_keeps_the_reverse_graph_as_in_torch():
    """Torch gives such a write new numbers and the old graph: an update that autograd does not see."""
    w, t = X.clone().requires_grad_(), V[0]

    def run(x):
        y = x * x
        row = y[0]
        with torch.no_grad():
            row.mul_(3.0)
            y[1] = 5.0
        return y * y

    plain, out = run(w), run(dual(w, t))
    assert torch.equal(out.primal, plain)
    weights = rand(3)(3, 4)
    torch.testing.assert_close(
        torch.autograd.grad((weights * out.primal).sum(), w, retain_graph=True)[0],
        torch.autograd.grad((weights * plain).sum(), w)[0],
    )
    # The tangent is a tensor of its own: its numbers follow the write, its graph stays that of before.
    factor = torch.ones(3, 4, dtype=torch.float64)
    factor[0], factor[1] = 3.0, 0.0
    numbers = torch.stack([9 * X[0] ** 4, X[1] * 0 + 25, X[2] ** 4])
    torch.testing.assert_close(out.primal.detach(), numbers)
    y, dy = run_values(X), factor * 2 * X * t
    torch.testing.assert_close(out.tangent[0].detach(), 2 * y * dy)
    found = torch.autograd.grad((weights * out.tangent).sum(), w)[0]
    # d(2 y dy) with d y = 2 x dx and d(dy) = 2 t dx, as if nothing had been written
    torch.testing.assert_close(found, weights * (2 * dy * 2 * X + 2 * y * 2 * t))


def run_values(x):
    y = x * x
    y[0] *= 3.0
    y[1] = 5.0
    return y


def test_a_whole_write_under_no_grad_keeps_the_reverse_graph():
    w = X.clone().requires_grad_()
    y = dual(w, V) * 2.0
    with torch.no_grad():
        y.zero_()
    assert y.primal.requires_grad and not y.primal.any() and not y.tangent.any()
    torch.testing.assert_close(torch.autograd.grad(y.primal.sum(), w)[0], torch.full_like(X, 2.0))


def test_a_dual_without_a_graph_gets_none_under_no_grad():
    w = X.clone().requires_grad_()
    y = dual(X.clone(), V)
    row = y[0]
    with torch.no_grad():
        y.add_(w)
    assert not y.primal.requires_grad and not row.primal.requires_grad and torch.equal(row.primal, (2 * X)[0])


def test_a_view_read_under_no_grad_after_a_write_keeps_its_graph():
    w = X.clone().requires_grad_()
    y = dual(w, V) * 1.0
    row = y[0]
    y.mul_(w)
    with torch.no_grad():
        row.primal.sum()
    torch.testing.assert_close(torch.autograd.grad(row.primal.sum(), w)[0][0], 2 * X[0])


def test_a_value_recorded_before_the_write_can_still_be_differentiated():
    w = X.clone().requires_grad_()
    y = dual(w, V) * 1.0
    row = y[0]
    squared = row * row
    row.zero_()
    torch.testing.assert_close(torch.autograd.grad(squared.primal.sum(), w)[0][0], 2 * X[0])


# Bookkeeping


def test_views_that_are_gone_are_forgotten():
    x = dual(X.clone(), V)
    for _ in range(1000):
        assert float(x[0, 0]) == float(X[0, 0])
    assert len(x._memory.members) < 30


def test_a_stale_view_is_an_ordinary_dual_to_the_eye():
    x = dual(X.clone(), V)
    row, other = x[0], x[1]
    x.mul_(2.0)
    assert type(row) is StaleDual and isinstance(row, DualTensor) and row.shape == (4,)
    assert type(row) is DualTensor and type(other) is StaleDual
    with pytest.raises(AttributeError, match="no_such"):
        other.no_such  # noqa: B018
    assert other.dtype == torch.float64 and torch.equal(torch.stack([row, other]).primal, 2 * X[:2])
    lone = x[2]
    del x, row, other
    lone.mul_(2.0)
    assert lone._memory is None  # nobody else looks: the memory is let go


def test_layouts():
    x = torch.zeros(3, 4)
    assert Layout.of(x).covers(12) and Layout.of(x[None]).covers(12) and not Layout.of(x.t()).covers(12)
    assert not Layout.of(x[1:]).covers(12) and not Layout.of(x[:2]).covers(12)
    assert not Layout.of(x.as_strided((2, 3), (3, 2))).overlaps_itself()  # 0 2 4, 3 5 7: interleaved
    assert Layout.of(x.as_strided((2, 3), (2, 2))).overlaps_itself()
    assert Layout.of(x.t()).extent() == 12 and Layout.of(x[:, 0]).extent() == 9


@pytest.mark.parametrize("name", SPECS)
def test_every_op_that_returns_a_view_says_so(name):
    """An op whose plain result shows its argument's storage must return a dual that is known to show it."""
    for sample in SPECS[name].samples(rand()):
        inputs, call, _ = separated(sample)
        if len(inputs) == 0 or inputs[0].numel() == 0:
            continue
        plain = call(SPECS[name].op, *inputs)
        duals = [dual(x, x.unsqueeze(0)) for x in inputs]
        pushed = call(SPECS[name].op, *duals)
        for p, y in zip(plain, pushed, strict=True):
            for x, d in zip(inputs, duals, strict=True):
                if torch._C._is_alias_of(p, x) and p.numel():
                    assert y is d or y._memory is d._memory is not None, name
