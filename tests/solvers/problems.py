"""Contractions with known answers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Contraction(NamedTuple):
    """z = fn(z, x): one sample a row; ``solution`` in closed form where there is one."""

    fn: Callable[..., Tensor]
    x: Tensor
    solution: Callable[[Tensor], Tensor] | None = None


_generator = torch.Generator().manual_seed(0)
_W = torch.randn(4, 4, generator=_generator, dtype=torch.float64) / 8
_X = torch.randn(3, 4, generator=_generator, dtype=torch.float64)

PROBLEMS = {
    "linear": Contraction(
        lambda z, x: z @ _W.T.to(z) + x, _X, lambda x: torch.linalg.solve(torch.eye(4).to(x) - _W.to(x), x.T).T
    ),
    "cosine": Contraction(lambda z, x: torch.cos(z) / 2 + x, _X),
    "babylonian": Contraction(lambda z, x: (z + x / z) / 2, _X.abs() + 0.5, torch.sqrt),
    "tanh": Contraction(lambda z, x: torch.tanh(z @ _W.T.to(z) + x), _X),
    "image": Contraction(lambda z, x: 0.3 * torch.sin(z.flip(-1) + x), _X.reshape(3, 2, 2)),
    "slow": Contraction(lambda z, x: 0.95 * z + 0.05 * torch.tanh(x), _X, torch.tanh),
}


def unrolled(problem: Contraction, x: Tensor, steps: int = 400) -> Tensor:
    """Plain iteration on autograd's tape."""
    z = torch.ones_like(x)
    for _ in range(steps):
        z = problem.fn(z, x)
    return z
