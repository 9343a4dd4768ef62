"""Layers that can stand in for a module where there is no derivative to follow: tried on the replay, then printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dualnn.diagnosis.replay import Replay
from dualnn.layers import BlackBox, Smoothed, Surrogate

SAMPLES = 100
SIGMA = 0.5
STEPS = ("gt", "ge", "lt", "le", "heaviside", "bucketize")


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A layer that worked, as code, and what it costs."""

    code: str
    cost: str


class _ThroughNumpy:
    """A module of one tensor as a function of arrays."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.module(torch.from_numpy(x)).detach().numpy()


def black_box(replay: Replay, path: str, right: Callable[[], bool]) -> StandIn | None:
    """Differences, for a module of one tensor without parameters; None where they do not hold."""
    if not _single(replay, path):
        return None
    width = replay.leaves[0].base.shape[-1] if replay.leaves[0].base.dim() else 1
    for structure, calls in (("elementwise", 2), ("block", 2 * width)):
        if _works(replay, lambda m, s=structure: BlackBox(_ThroughNumpy(m), s), right):  # type: ignore[misc]
            code = f"lambda a, act={_get(path)}: act(torch.from_numpy(a)).detach().numpy()"
            return StandIn(
                _set(path, f"dn.layers.BlackBox({code}, {structure!r})"),
                f"central differences, right to about 1e-10: {calls} forward passes of this module in each backward",
            )
    return None


def surrogate(replay: Replay, path: str, op: str) -> StandIn | None:
    """The derivative of a smooth stand-in, for an elementwise module of one tensor without parameters."""
    if not _single(replay, path):
        return None
    name = "tanh" if op in ("sign", "sgn") else "sigmoid" if op in STEPS else "identity"
    if not _apart(replay) or not _works(replay, lambda m: Surrogate(m, name), lambda: _flows(replay)):
        return None
    return StandIn(
        _set(path, f"dn.layers.Surrogate({_get(path)}, {name!r})"),
        f"as fast as before; biased: the gradient is that of {name!r}, exchange it for a primitive that fits",
    )


def smoothed(replay: Replay, path: str) -> StandIn | None:
    """Gaussian smoothing, for a module of one tensor without parameters whose last dimension mixes."""
    if not _single(replay, path) or not replay.leaves[0].base.dim():
        return None
    if not _works(replay, lambda m: Smoothed(m, sigma=SIGMA, samples=SAMPLES), lambda: _flows(replay)):
        return None
    n = replay.leaves[0].base.shape[-1]
    return StandIn(
        _set(path, f"dn.layers.Smoothed({_get(path)}, sigma={SIGMA}, samples={SAMPLES})"),
        f"{2 * SAMPLES} forward passes of this module; the gradient of its average over noise of size {SIGMA}, with a "
        f"relative variance of about (n + 1) / samples = {(n + 1) / SAMPLES:.2g}",
    )


def _single(replay: Replay, path: str) -> bool:
    return bool(path) and len(replay.leaves) == 1 == len(replay.call.leaves) and replay.leaves[0].parameter is None


def _works(replay: Replay, make: Callable[[nn.Module], nn.Module], right: Callable[[], bool]) -> bool:
    """Whether a stand-in runs in the module's place with the gradient that it should have."""
    own = replay.module.__dict__.get("forward") or type(replay.module).forward.__get__(replay.module)
    try:
        layer = make(_Alone(own))
        with replay.patched(layer.forward):
            return right()
    except Exception:
        return False  # not of this structure, or it cannot run in numpy: another remedy


class _Alone(nn.Module):
    """A forward as a module."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


def _apart(replay: Replay) -> bool:
    """Whether entries leave one another alone: those beside moved ones keep their values."""
    x, here = replay.leaves[0].base, replay.values({})
    if len(here) != 1 or here[0].shape != x.shape:
        return False
    moved = (torch.arange(x.numel()) % 2 == 0).reshape(x.shape).to(x.device)
    for seed in (1, 2, 3):
        there = replay.values({0: torch.where(moved, 3 * replay.direction(0, seed), 0)})
        if not torch.equal(there[0][~moved], here[0][~moved]):
            return False
    return True


def _flows(replay: Replay) -> bool:
    grads: Sequence[Tensor | None] = list(replay.reverse([0]).values())
    return all(g is not None and bool(torch.isfinite(g).all()) and bool(g.count_nonzero()) for g in grads)


def _get(path: str) -> str:
    return f"model.get_submodule({path!r})"


def _set(path: str, code: str) -> str:
    return f"model.set_submodule({path!r}, {code})"
