"""Small training problems, and the properties that every estimator of a gradient must have on them."""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.layers import Dual, FixedPoint
from dualnn.signals import Backprop, signal_loss


class Problem(NamedTuple):
    """A module and a training step on it, in float64."""

    module: nn.Module
    step: Callable[[], Tensor]


class Tied(nn.Module):
    """One weight in two modules, and one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))))


class Tokens(nn.Module):
    """An embedding, a parameter of the module itself beside its children, and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.place = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(x) + self.place)).mean(1))


class Pair(nn.Module):
    """Two outputs of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(x * self.weight)
        return h * h, torch.exp(h)


class Add(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 0.6, 0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.4 * torch.tanh(self.inner(z) + x)


def _convnet(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(2), nn.Linear(2, 2),
    )  # fmt: skip


def _between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2))


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(3, 2),
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "cnn": lambda: _convnet(nn.GroupNorm(1, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)),
    "tied": Tied,
    "tokens": Tokens,
    "pair": lambda: nn.Sequential(nn.Linear(3, 3), Pair(), Add(), nn.Linear(3, 2)),
    "dual": lambda: _between(Dual(Scaled(), structure="elementwise")),
    "fixed_point": lambda: _between(FixedPoint(Cell(), tol=1e-14)),
    "batchnorm": lambda: _convnet(nn.BatchNorm2d(2)),
}
MIXING = ("batchnorm",)  # samples influence one another: no derivative per sample
NAMES = tuple(_MODULES)


def problem(name: str, batch: int = 4) -> Problem:
    """Build a problem; the same one for the same seed of torch."""
    module = _MODULES[name]().double()
    x = torch.randn(batch, 1, 4, 4) if name in ("cnn", "batchnorm") else torch.randn(batch, 3)
    x = torch.randint(0, 5, (batch, 4)) if name == "tokens" else x.double()
    target = torch.randint(0, 2, (batch,))
    return Problem(module, lambda: F.cross_entropy(module(x), target))


def gradient(found: Problem, signal, key: int = 0, seed: int = 1) -> list[Tensor]:
    """The gradient that a signal writes for every parameter; the step's own randomness follows from ``seed``."""
    torch.manual_seed(seed)
    found.module.zero_grad()
    signal_loss(found.step, found.module, signal, key).backward()
    grads = [p.grad for p in found.module.parameters()]
    found.module.zero_grad()
    return grads


def joined(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


def assert_exact(found: Problem, signal, tol: float = 1e-10) -> None:
    """The gradient is autograd's."""
    for g, truth in zip(gradient(found, signal), gradient(found, Backprop()), strict=True):
        torch.testing.assert_close(g, truth, rtol=tol, atol=tol)


def assert_unbiased(found: Problem, signal, keys: int = 400) -> None:
    """The mean over keys lies within 4 standard errors of autograd's gradient, entry by entry."""
    truth = joined(gradient(found, Backprop()))
    draws = torch.stack([joined(gradient(found, signal, key)) for key in range(keys)])
    error = (draws.mean(0) - truth).abs()
    standard = draws.std(0) / keys**0.5
    assert bool((error <= 4 * standard + 1e-12).all()), f"{(error / standard).max()} standard errors"
    assert float(draws.std(0).max()) > 0.01 * float(truth.abs().max())  # an estimate it is


def relative_errors(found: Problem, signal, keys: int) -> Tensor:
    """|estimate - gradient|^2 / |gradient|^2 for every key."""
    truth = joined(gradient(found, Backprop()))
    return torch.stack([(joined(gradient(found, signal, k)) - truth).square().sum() for k in range(keys)]) / truth.dot(
        truth
    )


def assert_mean(values: Tensor, expected: float) -> None:
    """The mean of independent values lies within 4 standard errors of what is expected."""
    standard = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) <= 4 * standard + 1e-12, (float(values.mean()), expected, standard)


def random_states() -> tuple:
    """Every global random state, comparable."""
    kind, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (kind, words.tolist(), *rest)
