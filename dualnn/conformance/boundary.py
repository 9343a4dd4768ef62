"""Samples that PyTorch's database misses: zeros, ties, empty, 0-dim, broadcast, strided, masked and mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.conformance.case import Case, case_of

Call = tuple[Callable, tuple]


def _rand(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


TIES = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
ROWS = torch.tensor([[True, False, True], [False, False, False]])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


CALLS: dict[str, list[Call]] = {
    "zeros": [
        (torch.prod, (torch.tensor([2.0, 0.0, 3.0]).double(),)),
        (torch.prod, (torch.tensor([2.0, 0.0, 0.0]).double(),)),
        (torch.cumprod, (torch.tensor([2.0, 0.0, 3.0]).double(), 0)),
        (lambda x: x**2, (_zeros(3),)),
        (lambda x: torch.pow(x, 3.0), (_zeros(3),)),
        (torch.sinc, (_zeros(3),)),
        (torch.xlogy, (_zeros(3), _rand(3).abs() + 0.1)),
        (torch.where, (torch.tensor([True, False]), _zeros(2), _rand(2))),
        (lambda x: torch.where(x > 0, torch.log(x), x * x), (_zeros(3),)),
        (F.normalize, (_rand(2, 3),)),
        (torch.linalg.det, (_zeros(2, 2),)),
    ],
    "ties": [
        (torch.amax, (TIES, 1)),
        (torch.sort, (TIES,)),
        (torch.cummax, (TIES, 1)),
        (torch.logsumexp, (TIES, 1)),
        (torch.softmax, (TIES, 1)),
        (F.max_pool1d, (TIES.unsqueeze(0), 2)),
    ],
    "repeated_eigenvalues": [
        (lambda a: torch.linalg.eigvalsh(a + a.mT).sum(), (torch.eye(3, dtype=torch.float64),)),
        (lambda a: torch.linalg.inv(a + a.mT), (torch.eye(3, dtype=torch.float64),)),
        (lambda a: torch.linalg.cholesky(a + a.mT), (torch.eye(3, dtype=torch.float64),)),
        (torch.linalg.lu_factor, (torch.eye(3, dtype=torch.float64) + 0.1,)),
        (torch.linalg.qr, (torch.eye(3, dtype=torch.float64) + 0.1,)),
    ],
    "masked_rows": [
        (_attend, (_rand(1, 1, 2, 4), _rand(1, 1, 3, 4), _rand(1, 1, 3, 4), ROWS)),
        (lambda x: torch.softmax(x.masked_fill(~ROWS[:1], -torch.inf), -1), (_rand(2, 3),)),
        (F.cross_entropy, (_rand(3, 4), torch.tensor([1, -100, 0]))),
        (F.nll_loss, (_rand(3, 4), torch.tensor([1, -100, 0]))),
    ],
    "empty": [
        (torch.sum, (_zeros(0, 3), 0)),
        (torch.cumsum, (_zeros(0, 3), 1)),
        (torch.matmul, (_zeros(2, 0), _zeros(0, 3))),
        (lambda a, b: torch.cat([a, b]), (_zeros(0, 3), _rand(2, 3))),
        (F.linear, (_zeros(0, 3), _rand(2, 3))),
        (torch.softmax, (_zeros(0, 3), 1)),
        (torch.linalg.inv, (_zeros(0, 3, 3),)),
    ],
    "zero_dim": [
        *((op, (_rand(), 0)) for op in (torch.cumsum, torch.softmax, torch.log_softmax, torch.logsumexp, torch.sort)),
        *((op, (_rand(), 0)) for op in (torch.sum, torch.amax, torch.cumprod, torch.logcumsumexp)),
        (torch.gather, (_rand(), 0, torch.tensor(0))),
        (torch.index_select, (_rand(), 0, torch.tensor(0))),
        (torch.scatter_add, (_rand(), 0, torch.tensor(0), _rand())),
        (torch.max, (_rand(),)),
        (torch.linalg.vector_norm, (_rand(),)),
        (lambda a, b: torch.stack([a, b]), (_rand(), _rand())),
    ],
    "strided": [
        (lambda x: torch.cumsum(x.T, 0), (_rand(3, 4),)),
        (torch.matmul, (_rand(3, 4).T, _rand(3, 4))),
        (lambda x: x[:, ::2].reshape(-1), (_rand(3, 4),)),
        (F.conv2d, (_rand(1, 6, 6, 2).permute(0, 3, 1, 2), _rand(3, 2, 3, 3))),
        (lambda x: x.unfold(0, 2, 1).prod(-1), (_rand(5),)),
        (F.layer_norm, (_rand(4, 3).T, (4,))),
    ],
    "broadcast": [
        (torch.mul, (_rand(3, 1), _rand(1, 4))),
        (torch.where, (torch.tensor([True, False, True]), _rand(2, 1), _rand())),
        (torch.matmul, (_rand(2, 1, 3, 4), _rand(5, 4, 2))),
        (torch.clamp, (_rand(3, 4), _rand(4) - 2, _rand(3, 1) + 2)),
        (torch.linalg.solve, (_rand(2, 3, 3) + 4 * torch.eye(3).double(), _rand(3, 2))),
        (torch.masked_fill, (_rand(1, 3), ROWS, _rand())),
        (torch.lerp, (_rand(3), _rand(2, 1), 0.3)),
    ],
    "mixed_dtypes": [
        (lambda x: x * torch.arange(3), (_rand(3),)),
        (lambda x: x.mul(2).div(torch.tensor(3)), (_rand(3),)),
        (lambda x: torch.complex(x, 2 * x).abs(), (_rand(3),)),
        (lambda x: torch.fft.rfft(x).abs().square(), (_rand(5),)),
        (lambda x: torch.view_as_real(torch.exp(1j * x)), (_rand(3),)),
        (torch.where, (torch.tensor([True, False]), _rand(2), 1)),
    ],
}


def boundary_entries() -> dict[str, Any]:
    """Families of boundary samples, by name."""
    return dict(CALLS)


def boundary_cases(calls: list[Call], limit: int | None = None) -> Iterator[Case]:
    """The samples of a family."""
    for number, (function, args) in enumerate(calls):
        name = getattr(function, "__name__", "call")
        case = case_of(name, number, function, (args, {}), lambda t: t.dtype == torch.float64)
        if case is not None:
            yield case
