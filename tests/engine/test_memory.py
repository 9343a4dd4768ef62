"""Memory of dual programs, in live bytes: flat in the number of steps and in depth, nothing is taped."""

import pytest
import torch
from torch import nn

import dualnn as dn
from dualnn.training.meters import LiveBytes

K, N = 4, 256
UNIT = 4 * N  # one float32 value


def run(steps):
    """Live bytes at the peak, and at the end of a damped iteration on duals."""

    def iterate(x):
        y = x
        for _ in range(steps):
            y = y - (y + torch.tanh(y) - x) / 4
        return y

    x = torch.linspace(-1, 1, N)
    with LiveBytes() as live:
        out, pushed = dn.jvp(iterate, (x,), (torch.ones(K, N),))
    assert torch.isfinite(pushed).all()
    return live.peak, live.current


def test_a_loop_is_flat_in_live_bytes():
    run(2)
    few, many = run(10), run(10_000)
    assert many == few
    assert many[0] < 8 * (1 + K) * UNIT  # the value and its directions, a few times over


@pytest.mark.slow
def test_a_loop_of_a_million_steps_is_flat_in_live_bytes():
    def steps(count):
        x = torch.linspace(-1, 1, 8)
        with LiveBytes() as live:  # two kernels a step: the meter, not the engine, takes the time
            y = dn.dual(x, torch.ones(K, 8))
            for _ in range(count):
                y = y * -1.0
        return live.peak, live.current

    steps(2)
    assert steps(1_000_000) == steps(10)


def test_reverse_mode_is_not_flat():
    """The meter sees what a tape keeps: the flatness above is not its blindness."""

    def tape(steps):
        x = torch.linspace(-1, 1, N).requires_grad_()
        with LiveBytes() as live:
            y = x
            for _ in range(steps):
                y = y - (y + torch.tanh(y) - x) / 4
        return live.peak

    assert tape(100) > 100 * UNIT


@pytest.mark.parametrize("what", ["inputs", "weights"])
def test_a_deep_network_holds_the_tangents_of_one_layer(what):
    """With directions in the input, or in the first layer's weights: what a layer has used is gone."""
    batch, width = 32, 64
    unit = 4 * batch * width

    def peak(depth):
        torch.manual_seed(0)
        net = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())])
        net.requires_grad_(False)
        x = torch.randn(batch, width)

        def from_weight(w):
            return torch.func.functional_call(net, {"0.weight": w}, x)

        fn, at = (net, x) if what == "inputs" else (from_weight, net[0].weight)
        directions = torch.randn(K, *at.shape)
        with LiveBytes() as live:
            dn.jvp(fn, (at,), (directions,))
        return live.peak

    peak(1)
    shallow, deep = peak(2), peak(64)
    assert deep == shallow
    assert deep < 5 * (1 + K) * unit


def test_the_directions_of_all_weights_cost_their_own_memory_only():
    """Tangents of every parameter exist from the start (they are the question); activations' still come and go."""
    batch, width = 32, 64

    def extra(depth):
        net = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.Tanh())])
        net.requires_grad_(False)
        names, weights = zip(*net.named_parameters(), strict=True)
        directions = tuple(torch.randn(K, *w.shape) for w in weights)
        x = torch.randn(batch, width)
        with LiveBytes() as live:
            dn.jvp(
                lambda *ws: torch.func.functional_call(net, dict(zip(names, ws, strict=True)), x), weights, directions
            )
        return live.peak

    extra(1)
    assert extra(64) == extra(2)


def test_second_order_is_flat_too():
    def peak(steps):
        def iterate(x):
            y = x
            for _ in range(steps):
                y = y - (y + torch.tanh(y) - x) / 4
            return y.sum()

        with LiveBytes() as live:
            dn.laplacian(iterate, torch.linspace(-1, 1, 8))
        return live.peak

    peak(2)
    assert peak(300) == peak(10)
