"""Every online cell: the online gradient is backpropagation through time's, which independent code confirms."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.engine.errors import DualInputError, DualShapeError, UnknownNameError, UnsupportedOpError
from dualnn.layers import LRU, DiagonalLinear, ElementwiseLSTM, LeakyFire, MinGRU, OnlineCell, OnlineState
from dualnn.training.meters import LiveBytes

F64 = torch.float64
INPUTS, N, B = 3, 4, 2


class Own(OnlineCell):
    """A user's cell: two states that see one another, derivatives by duals."""

    states, gates, rows, own_names = 2, 2, 2, ("r", "q")

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.r, self.q = (nn.Parameter(torch.randn(hidden_size)) for _ in range(2))

    def advance(self, state, drives, own):
        a, b = state
        return 0.5 * torch.tanh(drives[0] + own[0] * b) + 0.3 * a, torch.sin(drives[1] + own[1] * a)


class ByDuals(ElementwiseLSTM):
    """A built-in without its closed forms."""

    along, pull = OnlineCell.along, OnlineCell.pull


class Complex(DiagonalLinear):
    """A built-in by the way of all other cells, which is for complex states too."""

    ahead, back = OnlineCell.ahead, OnlineCell.back

    def linearise(self, before, after, drives, own):
        return [[self._rate(own)[0].expand(len(before[0]), 1, -1)]], [before[0], drives[0]]

    def pull(self, kept, vector, own):
        (before, drive), (rate, scale) = kept, self._rate(own)
        moved = (vector[0] * before).sum(0) * rate
        mine = [moved * -own[0].exp(), moved * 1j * own[1].exp(), (vector[0] * drive).sum(0) * scale]
        return (vector[0] * scale).unsqueeze(2), torch.stack(mine, 1)

    def packed(self, drives):
        return torch.view_as_real(drives.squeeze(-2).resolve_conj()).flatten(-2)

    def output_adjoint(self, grad, state):
        return (torch.view_as_complex(grad.contiguous().unflatten(-1, (-1, 2))),)


CELLS = {c.__name__: c for c in (DiagonalLinear, MinGRU, ElementwiseLSTM, LeakyFire, Own, ByDuals, Complex)}
WINDOWS = [1, 5, 17, 40]


def made(name, dtype=F64):
    cell = CELLS[name](INPUTS, N).to(dtype)
    with torch.no_grad():
        for p in cell.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return cell


def stream(steps=40, dtype=F64):
    return torch.randn(steps, B, INPUTS, dtype=dtype)


def through_time(cell, x, weight):
    """Gradients as autograd records the loop, or as `by_hand` writes it."""
    return torch.autograd.grad((cell(x)[0] * weight).sum(), list(cell.parameters()))


def online(cell, x, weight, window):
    """Gradients accumulated over windows, and the outputs."""
    cell.zero_grad()
    state, seen = None, []
    for begin in range(0, len(x), window):
        y, state = cell.window(x[begin : begin + window], state)
        (y * weight[begin : begin + window]).sum().backward()
        seen.append(y.detach())
    return [p.grad for p in cell.parameters()], torch.cat(seen)


def relative(ours, theirs):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", CELLS)
def test_the_online_gradient_is_that_of_backpropagation_through_time(name, window):
    cell, x = made(name), stream()
    weight = torch.randn_like(cell(x)[0])
    grads, y = online(cell, x, weight, window)
    torch.testing.assert_close(y, cell(x)[0].detach(), rtol=1e-12, atol=1e-12)
    assert relative(grads, through_time(cell, x, weight)) < 1e-12


@pytest.mark.parametrize("name", CELLS)
def test_in_float32(name):
    cell, x = made(name, torch.float32), stream(200, torch.float32)
    weight = torch.randn_like(cell(x)[0])
    exact = copy.deepcopy(cell).double()
    grads, y = online(cell, x, weight, 16)
    if name == "LeakyFire" and not torch.equal(y.double(), exact(x.double())[0]):
        pytest.skip("a spike fell the other way in float64")
    ours, theirs, truth = (
        torch.cat([g.flatten().double() for g in gs])
        for gs in (grads, through_time(cell, x, weight), through_time(exact, x.double(), weight.double()))
    )
    assert float((ours - theirs).norm() / truth.norm()) < 1e-6
    # The phase of a complex rate is rounded as it is in the recorded loop: neither is nearer to float64.
    assert float((ours - truth).norm() / truth.norm()) < 1.5 * float((theirs - truth).norm() / truth.norm()) + 5e-7


def by_hand(name, cell, x):
    """The cell's equations, written once more; ``nn.LSTM`` itself where it can be made to do the same."""
    u = x @ cell.weight.T + cell.bias
    if name == "ElementwiseLSTM":
        lstm = nn.LSTM(INPUTS, N, dtype=F64)
        order = [0, 1, 3, 2]  # torch has i, f, g, o
        with torch.no_grad():
            lstm.weight_ih_l0.copy_(torch.cat([cell.weight.chunk(4)[k] for k in order]))
            lstm.bias_ih_l0.copy_(torch.cat([cell.bias.chunk(4)[k] for k in order]))
            lstm.bias_hh_l0.zero_()
            lstm.weight_hh_l0.copy_(torch.cat([torch.diag(cell.own[k]) for k in order]))
        return lstm(x)[0]
    h = torch.zeros(B, N, dtype=torch.complex128 if name == "DiagonalLinear" else F64)
    seen = []
    for t in range(len(x)):
        if name == "MinGRU":
            z = torch.sigmoid(u[t, :, :N])
            h = (1 - z) * h + z * u[t, :, N:]
            seen.append(h)
        elif name == "DiagonalLinear":
            rate = torch.polar(torch.exp(-torch.exp(cell.nu)), torch.exp(cell.theta))
            h = rate * h + torch.exp(cell.gamma) * torch.complex(u[t, :, ::2], u[t, :, 1::2])
            seen.append(torch.stack([h.real, h.imag], -1).flatten(1))
        else:
            h = torch.sigmoid(cell.leak) * h + u[t] - (h > 1).to(F64)
            seen.append((h > 1).to(F64))
    return torch.stack(seen)


@pytest.mark.parametrize("name", ["DiagonalLinear", "MinGRU", "ElementwiseLSTM", "LeakyFire"])
def test_values_are_those_of_the_equations(name):
    cell, x = made(name), 2 * stream()
    y = cell(x)[0].detach()
    torch.testing.assert_close(y, by_hand(name, cell, x).detach(), rtol=1e-12, atol=1e-12)
    assert y.abs().sum() > 0


@pytest.mark.parametrize("name", ["DiagonalLinear", "MinGRU", "ElementwiseLSTM", "Own"])
def test_the_online_gradient_by_finite_differences(name):
    cell, x = made(name), stream(30)
    weight = torch.randn_like(cell(x)[0])
    grads, _ = online(cell, x, weight, 7)
    h = 1e-5
    for p, g in zip(cell.parameters(), grads, strict=True):
        v = torch.randn_like(p)
        values = []
        for s in (h, -h):
            with torch.no_grad():
                p.add_(v, alpha=s)
                values.append(float((cell(x)[0] * weight).sum()))
                p.sub_(v, alpha=s)
        assert float((g * v).sum()) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-6)


def test_the_spiking_cells_gradient_is_its_surrogates():
    """Where the hard step is replaced by its primitive's slope, by hand."""
    cell, x = made("LeakyFire"), 2 * stream(20)
    weight = torch.randn(20, B, N, dtype=F64)
    grads, y = online(cell, x, weight, 6)
    assert 0 < float(y.mean()) < 1
    a, u = torch.sigmoid(cell.leak.detach()), (x @ cell.weight.T + cell.bias).detach()
    v, by_leak, by_bias = torch.zeros(B, N, dtype=F64), torch.zeros(B, N, dtype=F64), torch.zeros(B, N, dtype=F64)
    leak, bias = torch.zeros(N, dtype=F64), torch.zeros(N, dtype=F64)

    def slope(v):
        return 0.5 / (1 + (torch.pi / 2 * (v - 1)) ** 2)

    for t in range(20):
        keep = a - slope(v)
        by_leak, by_bias = keep * by_leak + a * (1 - a) * v, keep * by_bias + 1
        v = a * v + u[t] - (v > 1).to(F64)
        leak += (weight[t] * slope(v) * by_leak).sum(0)
        bias += (weight[t] * slope(v) * by_bias).sum(0)
    names = [k for k, _ in cell.named_parameters()]
    torch.testing.assert_close(grads[names.index("leak")], leak)
    torch.testing.assert_close(grads[names.index("bias")], bias)
    assert "biased gradient" in repr(cell)


@pytest.mark.parametrize("name", CELLS)
def test_sensitivities_of_the_past_stay_those_of_their_time(name):
    """With parameters that change at every step the traces are the tangents of the loop that used them."""
    cell, x = made(name), stream(12)
    changes = [{k: 0.1 * torch.randn_like(p) for k, p in cell.named_parameters()} for _ in range(12)]
    direction = {k: torch.randn_like(p) for k, p in cell.named_parameters()}
    twin = copy.deepcopy(cell)
    weights = {k: p.detach().clone() for k, p in twin.named_parameters()}
    values, state = twin.start(B, traces=False).values, None
    tangents = [torch.zeros_like(v) for v in values]
    for t in range(12):

        def step(direction_scale, *values, t=t):
            moved = {k: w + direction_scale * direction[k] for k, w in weights.items()}
            y, now = torch.func.functional_call(twin, moved, (x[t : t + 1], values))
            return y, *now

        one = torch.zeros((), dtype=F64)
        (y, *values), (dy, *tangents) = torch.func.jvp(step, (one, *values), (torch.ones_like(one), *tangents))
        ours, state = cell.step(x[t], state)
        weight = torch.randn_like(ours)
        cell.zero_grad()
        (ours * weight).sum().backward()
        found = sum((p.grad * direction[k]).sum() for k, p in cell.named_parameters())
        torch.testing.assert_close(found, (dy[0] * weight).sum(), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for k, p in cell.named_parameters():
                p.add_(changes[t][k])
                weights[k] = weights[k] + changes[t][k]


@pytest.mark.parametrize("name", CELLS)
def test_memory_does_not_depend_on_the_length(name):
    cell, peaks = made(name), []
    for steps in (40, 400):
        x = stream(steps)
        cell.zero_grad()
        with LiveBytes() as meter:
            state = None
            for t in range(0, steps, 8):
                y, state = cell.window(x[t : t + 8], state)
                y.square().sum().backward()
        peaks.append(meter.peak)
    assert peaks[1] == peaks[0]


@pytest.mark.parametrize("name", ["DiagonalLinear", "ElementwiseLSTM"])
def test_duals_and_functions_of_torch_go_through_the_recorded_mode(name):
    cell, x, v = made(name), stream(6), stream(6)
    _, ours = dn.jvp(lambda x: cell(x)[0], (x,), (v,))
    _, theirs = torch.func.jvp(lambda x: cell(x)[0], (x,), (v,))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(UnsupportedOpError, match="call the cell itself"):
        dn.jvp(lambda x: cell.window(x)[0], (x,), (v,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ElementwiseLSTM", "LeakyFire"])
def test_fused_steps_change_nothing(name):
    cell, x = made(name), stream(21)
    weight = torch.randn_like(cell(x)[0])
    cell.fuse(4)
    grads, y = online(cell, x, weight, 9)
    torch.testing.assert_close(y, cell(x)[0].detach())
    assert relative(grads, through_time(cell, x, weight)) < 1e-10 and cell.compiled.programs == 1
    assert copy.deepcopy(cell).compiled is None
    cell.fuse(0)
    assert cell.compiled is None
    with pytest.raises(DualInputError, match="chunk must be >= 0, got -1"):
        cell.fuse(-1)


def test_the_inputs_gradient_is_that_of_the_window():
    cell, x = made("MinGRU"), stream(12).requires_grad_()
    whole = torch.autograd.grad(cell(x)[0].sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(cell.window(x)[0].sum(), x)[0], whole)
    state, seen = None, []
    for t in range(0, 12, 4):
        y, state = cell.window(x[t : t + 4], state)
        seen.append(torch.autograd.grad(y.sum(), x)[0][t : t + 4])
    values, cut = cell.start(B, traces=False).values, []
    for t in range(0, 12, 4):
        y, values = cell(x[t : t + 4], values)
        cut.append(torch.autograd.grad(y.sum(), x)[0][t : t + 4])
        values = [v.detach() for v in values]
    torch.testing.assert_close(torch.cat(seen), torch.cat(cut))
    assert not torch.allclose(torch.cat(seen), whole, rtol=1e-2)


def test_of_a_stack_the_last_cell_is_exact_and_longer_windows_lose_less_of_the_first():
    torch.manual_seed(2)
    first, last, head = MinGRU(INPUTS, 8).double(), MinGRU(8, 8).double(), nn.Linear(8, 1).double()
    x = stream(64)
    parts = {"first": first, "last": last, "head": head}
    loss = head(last(first(x)[0])[0]).square().sum()
    exact = {k: torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for k, m in parts.items()}
    cosines = []
    for window in (1, 8, 64):
        for m in parts.values():
            m.zero_grad()
        below = above = None
        for t in range(0, 64, window):
            h, below = first.window(x[t : t + window], below)
            h, above = last.window(h, above)
            head(h).square().sum().backward()
        for k in ("last", "head"):
            assert relative([p.grad for p in parts[k].parameters()], exact[k]) < 1e-11
        a, b = (torch.cat([g.flatten() for g in gs]) for gs in ([p.grad for p in first.parameters()], exact["first"]))
        cosines.append(float(a @ b / a.norm() / b.norm()))
    assert 0.3 < cosines[0] < cosines[1] < cosines[2] and cosines[2] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", ["DiagonalLinear", "MinGRU", "ElementwiseLSTM", "LeakyFire"])
def test_copies_and_state_dicts(name, clone):
    cell, x = made(name), stream(10)
    y, state = cell.window(x)
    twin, resumed = clone(cell), clone(state)
    assert torch.equal(twin.step(x[0], resumed)[0], cell.step(x[0], state)[0])
    other = CELLS[name](INPUTS, N).double()
    other.load_state_dict(cell.state_dict())
    assert torch.equal(other(x)[0], cell(x)[0])


def test_a_readout_on_top_trains_online():
    torch.manual_seed(0)
    model, state = LRU(2, 16, 1).double(), None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(600, 1, 2, dtype=F64)
    losses = []
    for t in range(5, 600):
        y, state = model.step(x[t], state)
        loss = (y - x[t - 5, :, :1]).square().mean()  # what came in five steps ago
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert float(losses[-100:].mean()) < 0.5 * float(losses[:100].mean())
    y, now = model(x[:20])
    torch.testing.assert_close(model.window(x[:20], model.start(1, traces=False))[0], y.detach())


@pytest.mark.parametrize("name", CELLS)
def test_samples_begin_anew_and_nan_stays_in_its_sample(name):
    cell, x = made(name), stream(6)
    x[2, 0] = torch.nan
    y, state = cell.window(x)
    assert bool(state.values[0][0].isnan().all()) and not bool(state.values[0][1].isnan().any())
    fresh = state.reset(torch.tensor([True, False]))
    y, _ = cell.window(stream(6), fresh)
    cell.zero_grad()
    y.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in cell.parameters())
    with pytest.raises(DualInputError, match="booleans"):
        state.reset(torch.tensor([1, 0]))
    with pytest.raises(DualShapeError, match=r"shape \(2,\)"):
        state.reset(torch.tensor([True]))


@pytest.mark.parametrize("name", CELLS)
def test_empty_batches_and_inference_without_traces(name):
    cell = made(name)
    y, state = cell.window(stream(5)[:, :0])
    y.sum().backward()
    assert y.shape[1] == 0 and all(not p.grad.any() for p in cell.parameters())
    x = stream(5)
    y, state = cell.window(x, cell.start(B, traces=False))
    assert not y.requires_grad and state.weight is None
    torch.testing.assert_close(y, cell(x)[0].detach())
    assert cell.window(x)[1].without_traces().nbytes == state.nbytes


@pytest.mark.parametrize("name", ["DiagonalLinear", "MinGRU"])
def test_autocast_leaves_the_traces_their_precision(name):
    cell, x = made(name, torch.float32), stream(5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = cell.window(x)
    assert state.weight.dtype == cell.state_dtype and torch.equal(y, cell.window(x)[0])


def test_misuse_is_named():
    cell, x = made("MinGRU"), stream(4)
    _, state = cell.window(x)
    with pytest.raises(DualShapeError, match="not of this cell, or of another batch"):
        cell.window(x[:, :1], state)
    with pytest.raises(DualShapeError, match="not of this cell"):
        made("ElementwiseLSTM").window(x, state)
    with pytest.raises(DualInputError, match="state must come from start, step or window, got tuple"):
        cell.window(x, (x,))
    with pytest.raises(DualInputError, match="int64: convert"):
        cell.window(torch.ones(2, B, INPUTS, dtype=torch.int64))
    with pytest.raises(DualInputError, match="at least one step"):
        cell.window(x[:0])
    with pytest.raises(DualInputError, match="got list"):
        cell.step([1.0])
    with pytest.raises(DualShapeError, match="see window"):
        cell.step(x)
    with pytest.raises(DualShapeError, match=r"\(T, B, 3\)"):
        cell.window(x[..., :2])
    with pytest.raises(DualShapeError, match="float32"):
        cell.window(x.float())
    with pytest.raises(DualInputError, match="hidden_size must be an integer >= 1, got 0"):
        MinGRU(3, 0)
    with pytest.raises(DualInputError, match="r_min < r_max < 1"):
        DiagonalLinear(3, 4, r_max=1.0)
    with pytest.raises(DualInputError, match="max_phase"):
        DiagonalLinear(3, 4, max_phase=0.0)
    with pytest.raises(DualInputError, match="leak must lie between 0 and 1"):
        LeakyFire(3, 4, leak=1.0)
    with pytest.raises(DualInputError, match="threshold must be positive"):
        LeakyFire(3, 4, threshold=0.0)
    with pytest.raises(UnknownNameError, match="did you mean 'atan'"):
        LeakyFire(3, 4, primitive="attan")


def test_backward_after_the_optimizer_has_moved_the_weights_is_refused():
    cell, x = made("MinGRU"), stream(4)
    y, _ = cell.window(x)
    with torch.no_grad():
        cell.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_online_are_refused():
    cell, x = made("MinGRU"), stream(4)
    (first,) = torch.autograd.grad(cell.window(x)[0].square().sum(), cell.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_state_knows_its_size():
    state = MinGRU(INPUTS, N).start(B)
    assert isinstance(state, OnlineState) and state.weight.shape == (B, INPUTS + 1, 1, 2, N)
    assert state.nbytes == 4 * (B * N + B * 2 * N * (INPUTS + 1))


def living():
    """Bytes of all tensors that the garbage collector knows, each storage once; what a node saved is not among them."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiagonalLinear", "MinGRU", "ElementwiseLSTM", "LeakyFire"])
def test_a_million_steps_in_the_memory_of_a_thousand(name):
    torch.manual_seed(0)
    cell, state, seen = CELLS[name](1, 4), None, {}
    windows = 1_000_000 // 500
    for k in range(windows):
        x = torch.randn(500, 1, 1)
        with LiveBytes() if k in (2, windows - 1) else contextlib.nullcontext() as meter:
            y, state = cell.window(x, state)
            y.square().mean().backward()
        if meter is not None:
            seen[k] = meter.peak, living()
    assert all(bool(torch.isfinite(p.grad).all()) for p in cell.parameters())
    assert len(set(seen.values())) == 1 and len(seen) == 2, seen
