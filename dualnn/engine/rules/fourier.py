"""Fourier transforms: linear, so each is itself applied to the directions."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.generic import last, lasts, pushforward
from dualnn.engine.registry import Sample

REAL = ("irfft", "hfft")


def _one_axis(name: str) -> None:
    op = getattr(torch.fft, name)

    def push(t: Tensor, x: Tensor, y: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Tensor:
        return op(t, n, last(dim, x), norm)

    # Complex results: the conformance suite tests them.
    samples = [((2, 5),), ((4, 3), 6, 0, "ortho")]
    made = (lambda r: [Sample((r(*s), *a)) for s, *a in samples]) if name in REAL else None
    pushforward(f"fft.{name}", made, functions=[op])(push)


def _several_axes(name: str, default: tuple[int, ...] | None) -> None:
    op = getattr(torch.fft, name)

    def push(t: Tensor, x: Tensor, y: Tensor, s: Any = None, dim: Any = default, norm: str | None = None) -> Tensor:
        if dim is None and s is not None:
            dim = tuple(range(-len(s), 0))
        return op(t, s, lasts(dim, x), norm)

    pushforward(f"fft.{name}", None, functions=[op])(push)


for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    _one_axis(_name)
    _several_axes(_name + "2", (-2, -1))
    _several_axes(_name + "n", None)
for _name in ("fftshift", "ifftshift"):
    _op = getattr(torch.fft, _name)
    pushforward(f"fft.{_name}", lambda r: [Sample((r(3, 4),)), Sample((r(3, 4), 0))], functions=[_op])(
        lambda t, x, y, dim=None, op=_op: op(t, lasts(dim, x))
    )
