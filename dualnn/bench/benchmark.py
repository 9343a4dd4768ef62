"""A benchmark is data: a name, parameters, and arms that compute the same numbers in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dualnn.engine.errors import DualInputError, DualnnError

Run = Callable[[], Any]
Side = Literal["ours", "peer", "floor"]


class Unavailable(DualnnError, RuntimeError):
    """An arm cannot run here; the message, which the table prints, says why."""


@dataclass(frozen=True)
class Arm:
    """One way to compute a benchmark's numbers.

    Attributes:
        make: Builds what is timed, and is called just before: a function without arguments. That returns its numbers,
            a tensor, an array or a nesting of them, or a dict of such, where every name that two arms share is
            compared. Raises `Unavailable` where the arm cannot run.
        side: ``"ours"``; ``"peer"``; or ``"floor"``: less work than is asked for (the plain function), so it cannot win
            and need not be comparable.
        compiled: Its first call compiles, and how long that took is stated.
    """

    make: Callable[[], Run]
    side: Side
    compiled: bool = False


@dataclass(frozen=True)
class Benchmark:
    """What to time, beside what.

    Attributes:
        group: As in ``dualnn bench GROUP``.
        name: As in ``dualnn bench GROUP/NAME``; several benchmarks of one name differ in their parameters.
        parameters: Sizes; what the table's columns are called by.
        arms: By name, in the order of the table.
        reference: The arm that ratios are taken to.
        rtol: How closely the arms' numbers agree, relative to the largest one.
        note: What a reader must know.
        contest: Whether the arms do the same job. Where they do not (estimates beside gradients), the fastest is the
            cheapest, not the winner.
    """

    group: str
    name: str
    parameters: Mapping[str, Any]
    arms: Mapping[str, Arm]
    reference: str
    rtol: float = 1e-8
    note: str = ""
    contest: bool = True

    def __post_init__(self) -> None:
        if self.reference not in self.arms:
            raise DualInputError(f"{self}: the reference {self.reference!r} is not among the arms {list(self.arms)}")

    def __str__(self) -> str:
        return f"{self.group}/{self.name} ({named(self.parameters)})"


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: Tiny sizes, one round, nothing compiled to machine code: whether it runs, not how fast.
        rounds: In each, every arm is timed once.
        seconds: A round repeats a short arm until about this long.
        clock: ``"wall"``; or ``"cpu"``, the processor time of all the process's threads: on a machine that others use,
            waiting for a core is no arm's fault.
        without: Globs of arms to leave out, such as those that compile for minutes.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int = 9
    seconds: float = 0.05
    clock: Literal["wall", "cpu"] = "wall"
    without: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """Of torch.compile."""
        return "eager" if self.quick else "inductor"

    def generator(self) -> torch.Generator:
        """The same numbers in every run, on the CPU."""
        return torch.Generator().manual_seed(0)


def named(parameters: Mapping[str, Any]) -> str:
    """``a=1, b=2``."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


@dataclass
class Group:
    """A named list of benchmarks.

    Attributes:
        title: One line.
        names: The benchmarks' names.
        benchmarks: Makes them; the tensors they share are made here, each arm later.
    """

    title: str
    names: tuple[str, ...]
    benchmarks: Callable[[Settings], list[Benchmark]] = field(repr=False)
