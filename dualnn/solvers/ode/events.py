"""What to watch for while integrating, and what has been met.

Reference:
    Hiskens, Pai, "Trajectory sensitivity analysis of hybrid systems", IEEE Trans. Circuits Syst. I 47, 2000; Shampine,
    Thompson, "Event location for ordinary differential equations", 2000; in neural ODEs: Chen, Amos, Nickel, 2021,
    arXiv 2011.03902.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.errors import ConvergenceError, DualInputError
from dualnn.solvers.stats import those


@dataclasses.dataclass(frozen=True)
class Event:
    """Something to watch for.

    Attributes:
        fn: ``fn(t, y, *args) -> (*batch,)``, with the arguments of the right-hand side: zero at the event.
        terminal: Whether a sample ends there; a number: at that occurrence.
        direction: 1: only where ``fn`` rises, -1: only where it falls, 0: both.
        required: Raise for samples without an occurrence.
    """

    fn: Callable[..., Tensor]
    terminal: bool | int = False
    direction: int = 0
    required: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise DualInputError(f"an event must be a function event(t, y, *args), got {type(self.fn).__name__}")
        if self.direction not in (-1, 0, 1):
            raise DualInputError(f"an event's direction must be -1, 0 or 1, got {self.direction!r}")
        if self.terminal < 0:
            raise DualInputError(f"an event's terminal must be a bool or a number of occurrences, got {self.terminal}")

    @classmethod
    def of(cls, given: Any) -> Event:
        """From an event, or a function that may have scipy's attributes ``terminal`` and ``direction``."""
        if isinstance(given, Event):
            return given
        direction = getattr(given, "direction", 0)
        return cls(given, getattr(given, "terminal", False), (direction > 0) - (direction < 0))


def events_of(given: Any) -> tuple[tuple[Event, ...], bool]:
    """What a user asks for, and whether it was one alone."""
    if given is None:
        return (), False
    if isinstance(given, (tuple, list)):
        return tuple(map(Event.of, given)), False
    return (Event.of(given),), True


class Occurrences(NamedTuple):
    """The occurrences of one event, in the order in which they come; nan where a sample has no (more) of them.

    Attributes:
        t: Times, ``(M, *batch)``: M is the largest number of occurrences of any sample, and at least 1.
        y: States, ``(M, *batch, n)``.
        counts: How many each sample has, ``batch``.
    """

    t: Tensor
    y: Tensor
    counts: Tensor


class Crossing(NamedTuple):
    """Samples that met an event in a step: at ``t + theta h`` of it; the others' entries are harmless.

    Attributes:
        event: Which.
        samples: Mask, ``batch``.
        theta: Where in the step.
        scale: The largest value of the event's function at the step's ends.
        t: When.
        y: The state there.
    """

    event: int
    samples: Tensor
    theta: Tensor
    scale: Tensor
    t: Tensor
    y: Tensor


def gathered(events: Sequence[Event], crossings: Sequence[Crossing], y: Tensor) -> list[Occurrences]:
    """All occurrences of each event; ``t`` and ``y`` of the crossings may be differentiable. ``y``: the start."""
    batch = y.shape[:-1]
    out = []
    for k in range(len(events)):
        mine = [c for c in crossings if c.event == k]
        if not mine:
            nan = torch.full((1, *y.shape), torch.nan, dtype=y.dtype, device=y.device)
            out.append(Occurrences(nan[..., 0], nan, torch.zeros(batch, dtype=torch.int64, device=y.device)))
            continue
        mask = torch.stack([c.samples for c in mine])
        count = mask.sum(0)
        most = int(count.max())
        first = torch.argsort(~mask, dim=0, stable=True)[:most]
        there = torch.arange(most, device=y.device).reshape(-1, *(1,) * len(batch)) < count
        t = torch.stack([c.t for c in mine]).gather(0, first)
        wide = first.unsqueeze(-1).expand(*first.shape, y.shape[-1])
        states = torch.stack([c.y for c in mine]).gather(0, wide)
        out.append(
            Occurrences(torch.where(there, t, torch.nan), torch.where(there.unsqueeze(-1), states, torch.nan), count)
        )
    return out


def missing(events: Sequence[Event], found: Sequence[Occurrences]) -> None:
    """Raise for events that must occur and did not."""
    for k, (event, got) in enumerate(zip(events, found, strict=True)):
        lost = got.counts == 0
        if event.required and bool(lost.any()):
            where = torch.nonzero(lost.reshape(-1)).flatten().tolist()
            raise ConvergenceError(
                f"event {k} does not occur for {those(where, lost.numel())} up to the last time asked for: integrate "
                "further, or watch for something else (required=False gives nan)"
            )
