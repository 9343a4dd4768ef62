"""Forward gradients: directional derivatives along random weight directions, times the directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.directions import Directions, check_sampler
from dualnn.engine.dual_tensor import make
from dualnn.engine.errors import DualInputError, unknown_name
from dualnn.engine.levels import fresh_level
from dualnn.engine.parameters import swapped
from dualnn.engine.tangents import Drawn, LowRank, Tangent
from dualnn.signals.base import Signal, Step, dual_loss, inject, loss_of, trainable, with_loss

COMBINE = ("mean",)


class ForwardGradient(Signal):
    r"""Estimate the gradient from K directional derivatives along random weight directions, in one forward pass.

    .. math:: \hat g = \frac1K \sum_{k=1}^K (\nabla L \cdot u_k)\, u_k, \qquad E[\hat g] = \nabla L

    Unbiased. With n trainable numbers its relative squared error is (n + 1)/K for Gaussian directions, (n - 1)/K for
    Rademacher ones, and its cosine to the gradient about sqrt(K / n): a weak teacher for a large n. Nothing is taped:
    memory is that of a forward pass with K tangents, whatever the depth.

    Args:
        tangents: K.
        sampler: ``"rademacher"`` (entries ±1: the least variance), ``"gaussian"``, or ``"basis"`` (all unit vectors:
            exact; K must be the number of trainable numbers).
        combine: How directional derivatives are combined; ``"mean"``.
        rank: None draws dense directions. r draws :math:`\sum_{i=1}^r a_i b_i^T / \sqrt r` for every parameter of two
            or more dimensions: also unbiased (of slightly larger variance), and a linear layer never forms the matrix.

    Raises:
        DualInputError: K or the rank is less than 1, or ``"basis"`` is given another K than needed.
        UnknownNameError: An unknown sampler or combination.

    Reference:
        Baydin, Pearlmutter, Syme, Wood, Torr, "Gradients without backpropagation", 2022, arXiv 2202.08587.

    Example:
        >>> import torch
        >>> from dualnn.signals import ForwardGradient, signal_loss
        >>> net, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
        >>> loss = signal_loss(lambda: net(x).square().mean(), net, ForwardGradient(tangents=8), key=0)
        >>> loss.backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])
    """

    def __init__(
        self, tangents: int = 1, sampler: str = "rademacher", combine: str = "mean", rank: int | None = None
    ) -> None:
        if tangents < 1:
            raise DualInputError(f"tangents must be at least 1, got {tangents}")
        if rank is not None and rank < 1:
            raise DualInputError(f"rank must be at least 1 or None for dense directions, got {rank}")
        if combine not in COMBINE:
            raise unknown_name("combination", combine, COMBINE)
        self.tangents, self.combine, self.rank = tangents, combine, rank
        self.sampler = check_sampler(sampler)

    def __repr__(self) -> str:  # noqa: D105
        return f"ForwardGradient(tangents={self.tangents}, sampler={self.sampler!r}, rank={self.rank})"

    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run the step once with dual parameters."""
        parameters = trainable(module)
        total = sum(p.numel() for p in parameters)
        if self.sampler == "basis" and self.tangents != total:
            raise DualInputError(
                f"sampler='basis' needs tangents={total}, one for each trainable number; got {self.tangents}"
            )
        output, gradients = weight_pass(step, module, Directions(self.sampler, self.tangents, key), self.rank)
        loss = loss_of(output)
        if loss is None:
            return output
        warn_unused(module, [p for p in parameters if gradients[p] is None])
        return with_loss(output, inject(loss.detach(), gradients))


def weight_pass(
    step: Step, module: nn.Module, directions: Directions, rank: int | None
) -> tuple[Any, dict[nn.Parameter, Tensor | None]]:
    """One forward pass with dual parameters: the step's output (still dual), and the gradient estimate.

    A parameter that the step does not use has the estimate None.
    """
    parameters = trainable(module)
    blocks: dict[nn.Parameter, tuple[int, int]] = {}
    used: set[nn.Parameter] = set()
    offset = 0
    for index, p in enumerate(parameters):
        blocks[p] = (index, offset)
        offset += p.numel()

    def low_rank(p: nn.Parameter) -> bool:
        return rank is not None and p.dim() >= 2

    kept: dict[nn.Parameter, Any] = {}
    room = offset // 8

    def once(p: nn.Parameter, draw: Callable[[], Any]) -> Any:
        """What is next to nothing beside the gradient (rank-one factors, biases) is not drawn again at its end."""
        nonlocal room
        used.add(p)
        found = kept.get(p)
        if found is None:
            found = draw()
            size = sum(t.numel() for t in found) if isinstance(found, tuple) else found.numel()
            if size <= room:
                kept[p], room = found, room - size
        return found

    def factors(p: nn.Parameter) -> tuple[Tensor, Tensor]:
        return once(p, lambda: directions.factors(*blocks[p], tuple(p.shape), rank or 1, p))

    def drawn(p: nn.Parameter) -> Tensor:
        return once(p, lambda: directions.draw(*blocks[p], tuple(p.shape), p))

    def tangent(p: nn.Parameter) -> Tangent:
        if low_rank(p):
            return LowRank(directions.num, lambda: factors(p), p.shape)
        return Drawn(directions.num, lambda: drawn(p))

    with fresh_level() as level, torch.no_grad():
        duals = {p: make(p.detach(), tangent(p), level) for p in parameters}
        with swapped(module, duals):
            output = step()
        if loss_of(output) is None:
            return output, {}
        loss = dual_loss(output, level)
        slopes = loss._tan.dense().reshape(-1) * directions.weight
        gradients: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)
        for p in parameters:
            if p not in used:
                continue
            if low_rank(p):
                a, b = factors(p)
                gradients[p] = torch.einsum("k,kro,kri->oi", slopes.to(a.dtype), a, b).reshape(p.shape)
            else:
                u = drawn(p)
                gradients[p] = torch.tensordot(slopes.to(u.dtype), u, dims=1)
    return output, gradients


def warn_unused(module: nn.Module, unused: list[nn.Parameter], why: str = "the step does not use") -> None:
    """Warn (once per message, by Python's own filter) of parameters that get no gradient."""
    if unused:
        lost = {id(p) for p in unused}
        names = [name for name, p in module.named_parameters() if id(p) in lost]
        warnings.warn(f"{why} {', '.join(names)}: no gradient is written for them", UserWarning, stacklevel=4)
