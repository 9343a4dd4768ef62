"""Functions that autograd cannot follow, with a twin that it can; module-level, so that they pickle."""

import torch
from torch import Tensor, nn


def cube_root(a: Tensor) -> Tensor:
    """Newton under no_grad, in place, with a stop that depends on the data."""
    with torch.no_grad():
        x = torch.ones_like(a)
        while True:
            step = (x**3 - a) / (3 * x**2)
            x -= step
            if float(step.abs().max()) < 1e-14:
                return x


def cube_root_unrolled(a: Tensor) -> Tensor:
    x = torch.ones_like(a)
    for _ in range(60):
        x = x - (x**3 - a) / (3 * x**2)
    return x


def kepler(mean: Tensor, e: Tensor) -> Tensor:
    """E - e sin E = M, by 10 steps under no_grad."""
    with torch.no_grad():
        y = mean + 0 * e
        for _ in range(10):
            y = y - (y - e * torch.sin(y) - mean) / (1 - e * torch.cos(y))
        return y


def kepler_unrolled(mean: Tensor, e: Tensor) -> Tensor:
    y = mean + 0 * e
    for _ in range(10):
        y = y - (y - e * torch.sin(y) - mean) / (1 - e * torch.cos(y))
    return y


def decay(x: Tensor, *, rate: Tensor, steps: int, reverse: bool = False) -> dict[str, Tensor]:
    """A loop that mixes entries, with keyword arguments; returns a dict."""
    with torch.no_grad():
        for _ in range(steps):
            x = x - rate * (x.flip(0) if reverse else x.roll(1, 0))
        return {"end": x, "total": x.sum()}


class Channels(nn.Module):
    """A loop with one parameter per channel (dimension 1) and a shared one."""

    def __init__(self, channels: int, gradient: bool = False) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.1, 0.9, channels, dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate.reshape(-1, *(1,) * (x.dim() - 2))
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            y = x.clone()
            for _ in range(5):
                y = y - rate * torch.tanh(self.gain * y)
            return y


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tol: float = 1e-10) -> None:
    """Two outputs are equal, and so are their gradients along a random direction."""
    weight = torch.randn(ours.shape, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)
    for a, b in zip(gradients((ours * weight).sum(), inputs), gradients((theirs * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
