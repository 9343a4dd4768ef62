"""Random local tangents where no exact structure fits: tried on the replay, with the variance that they will have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.diagnosis.replay import Replay
from dualnn.diagnosis.tracer import is_real, tensors_in
from dualnn.diagnosis.verdict import JITTER, Judge
from dualnn.engine.parameters import swapped
from dualnn.engine.transforms import jvp
from dualnn.layers.local import LocalCall
from dualnn.layers.local_swap import LocalForward

#: K of a proposed estimate: as many tangents as a module of a usual width pushes in a moment.
TANGENTS = 256


def estimated_numbers(replay: Replay, which: Sequence[int]) -> int | None:
    r"""Let random local tangents take the place of the replayed module.

    The estimate is unbiased if its directions are pushed rightly: the dual derivative :math:`\langle g, Jv \rangle` is
    compared with differences for each leaf, which no sampling noise blurs.

    Returns:
        The numbers among which the tangents are drawn (those of one sample where samples do not mix, and the
        parameters), on which the variance depends; None where duals cannot run the module or the numbers differ.
    """
    call = LocalCall("random", tangents=1)  # one is enough to see that it runs
    try:
        with replay.moved(1, JITTER):
            judge = Judge(replay, which)
            for k in which:
                v = replay.direction(k)
                pushed = _pushed(replay, k, v)
                if not any(replay.difference({k: v}, step).near(pushed, judge.tolerance) for step in judge.steps):
                    return None
        with replay.patched(LocalForward(replay.module, call)):
            grads = replay.reverse(which)
    except Exception:
        return None  # duals cannot run it: another remedy
    reached = all(g is not None and bool(torch.isfinite(g).all()) for g in grads.values())
    return call.plan.columns if reached and call.plan is not None else None


def _pushed(replay: Replay, k: int, v: Tensor) -> float:
    """<g, J v> by one dual pass."""
    replay.state.restore()
    replay.random.restore()
    given = [x.clone() if isinstance(x, Tensor) else x for x in replay.leaves_in]

    def run(moving: Tensor) -> tuple[Tensor, ...]:
        leaf, filled = replay.leaves[k], list(given)
        values = {o.parameter: o.base.clone() for o in replay.leaves if o.parameter is not None}
        for other in replay.leaves:
            if other.parameter is None:
                filled[other.index] = other.base.clone()
        if leaf.parameter is None:
            filled[leaf.index] = moving
        else:
            values[leaf.parameter] = moving
        args, kwargs = pytree.tree_unflatten(filled, replay.call.spec)
        with torch.no_grad(), swapped(replay.module, values):
            return tuple(t for t in tensors_in(replay.module(*args, **kwargs)) if is_real(t))

    outputs, tangents = jvp(run, (replay.leaves[k].base.clone(),), (v,))
    total = 0.0
    for g, t in zip(replay.covector(outputs), tangents, strict=True):
        total += float(torch.where(g == 0, 0, g * t).double().sum())
    return total
