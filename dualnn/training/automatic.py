"""``where="auto"``: the doctor examines the first batch's training step, and only what fails is swapped."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from dualnn.diagnosis import Report, examine
from dualnn.engine.directions import mixed
from dualnn.layers.local_swap import LocalForward, swap_forward
from dualnn.training.errors import TrainingSetupError


def examine_first(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> Report:
    """What the doctor says of the first batch; with several processes, of each one's first batch, to all of them alike.

    Raises:
        TrainingSetupError: The examination broke in some process, or would have to talk to the others.
    """
    if trainer.world_size == 1:
        return examine_step(module, batch, batch_idx)
    if any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules()):
        raise TrainingSetupError(
            'where="auto" examines each process alone, and SyncBatchNorm waits for the others: let the doctor examine '
            "the module in a run with devices=1, and name what it finds with where=[…]"
        )
    mine: Report | str
    try:
        mine = examine_step(module, batch, batch_idx)
    except Exception as error:  # said by every process: one that ended alone would leave the others waiting
        mine = f"{type(error).__name__}: {error}"
    found: list[Report | str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(found, mine)
    broken = [f"process {rank}: {text}" for rank, text in enumerate(found) if isinstance(text, str)]
    if broken:
        raise TrainingSetupError(f"the doctor's examination of the first batch broke in {'; '.join(broken)}")
    return merged([report for report in found if isinstance(report, Report)])


def merged(reports: Sequence[Report]) -> Report:
    """The first report, with the failures that only the others saw."""
    first, *others = reports
    findings = list(first.findings)
    for report in others:
        known = {f.path for f in findings if not f.information}
        findings += [f for f in report.failures if f.path not in known]
    findings.sort(key=lambda f: f.information)  # failures first
    examined = dict.fromkeys(path for report in reports for path in report.examined)
    return dataclasses.replace(first, findings=findings, examined=tuple(examined))


def examine_step(module: pl.LightningModule, batch: Any, batch_idx: int) -> Report:
    """Run the doctor on one training step; nothing is logged, and the module stays as it is."""
    with _unlogged(module):
        return examine(module, (batch, batch_idx), {}, method="training_step")


def to_swap(report: Report) -> dict[str, int | None]:
    """The failing submodules, by their names inside the LightningModule, that local duals can take over.

    Returns:
        For each None where they are exact; K where K random tangents estimate its gradient without bias.

    Raises:
        TrainingSetupError: Something fails that they cannot: a surrogate or a smoothing, which changes what is learnt,
            is only taken by hand.
    """
    chosen: dict[str, int | None] = {**dict.fromkeys(report.where), **report.estimates}
    beyond = [f for f in report.failures if f.path not in chosen and f.kind != "memory"]
    if beyond:
        listed = "; ".join(f"{f.name or 'training_step'}: {f.cause}. Remedy: {f.remedy}" for f in beyond)
        raise TrainingSetupError(
            f'where="auto" only swaps in exact or unbiased derivatives, and {len(beyond)} failure(s) have none: '
            f"{listed}. Mend them as it says, or name the modules yourself with where=[…]."
        )
    return chosen


def swap(module: pl.LightningModule, chosen: Mapping[str, int | None], seed: int) -> dict[str, LocalForward]:
    """Swap what was chosen; each estimate with directions of its own."""
    if exact := [name for name, tangents in chosen.items() if tangents is None]:
        swap_forward(module, exact)
    for name, tangents in chosen.items():
        if tangents is not None:
            own = mixed(seed, zlib.crc32(name.encode()))
            swap_forward(module, [name], structure="random", tangents=tangents, seed=own)
    return swapped_forwards(module)


def swapped_forwards(module: torch.nn.Module) -> dict[str, LocalForward]:
    """What runs in the place of swapped submodules, by name."""
    found = ((name, sub.__dict__.get("forward")) for name, sub in module.named_modules())
    return {name: forward for name, forward in found if isinstance(forward, LocalForward)}


def tell(trainer: pl.Trainer, report: Report, chosen: Mapping[str, int | None]) -> None:
    """Print what was found and chosen, and write it to TensorBoard as text."""
    exact = [name for name, tangents in chosen.items() if tangents is None]
    said = [f"swapped for exact local duals: {', '.join(exact)}"] if exact else []
    for name, tangents in chosen.items():
        if tangents is not None:
            cost = next(f.cost for f in report.failures if f.path == name and f.tangents is not None)
            said.append(f"swapped for {tangents} random local tangents: {name} ({cost})")
    text = "\n".join([str(report), "", *(said or ["nothing to swap: backprop works"])])
    if trainer.is_global_zero:
        print(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("doctor", f"```\n{text}\n```", trainer.global_step)


@contextmanager
def _unlogged(module: pl.LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing: an examination is not a training step."""
    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    try:
        for name in before:
            setattr(module, name, _nothing)
        yield
    finally:
        for name, value in before.items():
            module.__dict__.pop(name, None)
            if value is not None:
                setattr(module, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
