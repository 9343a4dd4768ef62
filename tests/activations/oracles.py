"""Oracles of the activations' tests."""

from collections.abc import Callable, Sequence

import mpmath as mp
import pytest
import torch
from torch import Tensor

from dualnn import activations
from dualnn.activations.base import Activation, Sample

DIGITS = 30

ELEMENTWISE = [name for name in activations.available() if activations.get_class(name).elementwise]

EVERY_SAMPLE = pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, id=f"{name}({','.join(f'{k}={v}' for k, v in sample.options.items())})")
        for name in ELEMENTWISE
        for sample in activations.get_class(name).samples()
    ],
)
EVERY_NAME = pytest.mark.parametrize("name", ELEMENTWISE)


def build(name: str, sample: Sample, dtype: torch.dtype = torch.float64) -> tuple[Activation, Tensor]:
    """The activation and its test points."""
    return activations.get(name, **sample.options).to(dtype), torch.tensor(sample.points, dtype=dtype)


def mp_derivative(fn: Callable, at: Sequence[float], orders: Sequence[int]) -> float:
    """A partial derivative by mpmath: central differences at many more digits than a float has."""
    with mp.workdps(DIGITS):
        point = tuple(mp.mpf(v) for v in at)
        if not any(orders):
            return float(fn(*point))
        if len(point) == 1:
            return float(mp.diff(fn, point[0], orders[0]))
        return float(mp.diff(fn, point, tuple(orders)))


def central_difference(fn: Callable[[float], Tensor], h: float) -> Tensor:
    """First derivative of fn at 0, by 5 points."""
    return (fn(-2 * h) - 8 * fn(-h) + 8 * fn(h) - fn(2 * h)) / (12 * h)


def smooth_difference(fn: Callable[[float], Tensor], h: float) -> Tensor:
    """The same with the half-step check: where the two steps disagree the oracle itself is no good."""
    fine, coarse = central_difference(fn, h / 2), central_difference(fn, h)
    torch.testing.assert_close(fine, coarse, rtol=1e-5, atol=1e-6, msg="finite difference: not smooth at this step")
    return fine
