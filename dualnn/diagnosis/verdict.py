r"""The verdict on one submodule: reverse mode against differences, leaf by leaf.

============================  ======================  ===================================================
reverse                       difference              verdict
============================  ======================  ===================================================
raises                        any                     ``raises``
nan or inf                    finite                  ``nonfinite`` (judged at the very point)
none or zero                  not zero                ``cut``
none or zero                  zero, and values move   ``flat``
not zero                      zero, and values move   ``surrogate`` (information)
another number                settled                 ``wrong``, or ``cut`` where a part left the graph
the same number               the same                healthy
============================  ======================  ===================================================

A first disagreement proves nothing: the point may be a tie or a kink. It is judged again nearby, at several steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dualnn.diagnosis.replay import BackwardError, Difference, Replay
from dualnn.diagnosis.report import Kind

TOLERANCE = 2e-3
STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # the shortest first: in a large module a step of 1e-4 crosses kinks
COARSE_STEPS = (1e-2, 3e-3, 3e-2)  # for a module that only runs in single precision
JITTER = 1e-3
POOL = 6  # more parameters than this are first judged together


@dataclasses.dataclass
class Verdict:
    """What is wrong with one call of a module.

    Attributes:
        kind: As `Finding.kind`.
        leaves: The positions of the leaves that fail.
        error: What was raised.
        jittered: The disagreement was seen beside the recorded point.
    """

    kind: Kind
    leaves: list[int]
    error: Exception | None = None
    jittered: bool = False


class Judge:
    """Judges a `Replay`.

    Args:
        replay: The submodule alone.
        which: The leaves to judge.
        sampler: The module draws random numbers whose reverse derivative is another estimator than their path's.
    """

    def __init__(self, replay: Replay, which: Sequence[int], sampler: bool = False) -> None:
        self.replay, self.which, self.sampler = replay, list(which), sampler
        self.steps = STEPS if replay.wide else COARSE_STEPS
        self.tolerance = TOLERANCE if replay.wide else 3e-2
        self.outputs = 0
        self.finite = False

    def verdict(self) -> Verdict | None:
        """The first failure found, worst first; None for a healthy call."""
        replay = self.replay
        outputs = replay.run(inputs=self.which)
        self.outputs = len(outputs)
        if not outputs or not self.which:
            return None
        try:
            grads = replay.backward(outputs, self.which)
        except BackwardError as error:
            return Verdict("raises", self.which, error.__cause__)  # type: ignore[arg-type]
        broken = [k for k, g in grads.items() if g is not None and not bool(torch.isfinite(g).all())]
        self.finite = not broken
        if broken and (really := [k for k in broken if self._finite_in_truth(k, grads[k])]):
            return Verdict("nonfinite", really)
        if self.sampler:
            return None
        suspects = self._suspects(grads, broken)
        if not suspects:
            return None
        return self._nearby(suspects)

    def _finite_in_truth(self, k: int, grad: Tensor | None) -> bool:
        """Whether a difference, central or one-sided, settles at an entry whose gradient is not finite."""
        if grad is None:
            return False
        leaf = self.replay.leaves[k]
        bad = torch.nonzero(~torch.isfinite(grad) & torch.isfinite(leaf.base))
        small, smaller = (1e-4, 1e-6) if self.replay.wide else (1e-2, 1e-3)
        for index in bad[:: max(1, len(bad) // 3)][:3]:
            unit = torch.zeros_like(leaf.base)
            unit[tuple(index)] = leaf.scale
            settles = [self._slopes(k, unit, small), self._slopes(k, unit, smaller)]
            for a, b in zip(*settles, strict=True):
                if torch.isfinite(a) and torch.isfinite(b) and abs(a - b) <= 0.1 * max(abs(a), abs(b)) + 1e-6:
                    return True
        return False

    def _slopes(self, k: int, v: Tensor, step: float) -> list[Tensor]:
        """Central, forward and backward differences of <g, y>."""
        sums = []
        for s in (step, 0.0, -step):
            total = torch.zeros((), dtype=torch.float64)
            outputs = self.replay.values({k: v * s})
            for y, g in zip(outputs, self.replay.covector(outputs), strict=True):
                total = total + torch.where(g == 0, 0, y * g).double().sum()
            sums.append(total)
        ahead, here, behind = sums
        return [(ahead - behind) / (2 * step), (ahead - here) / step, (here - behind) / step]

    def _suspects(self, grads: dict[int, Tensor | None], broken: Sequence[int]) -> list[int]:
        """Leaves whose reverse derivative does not equal the first difference, or is zero."""
        sound = [k for k in self.which if k not in broken]
        empty = [k for k in sound if self._empty(k, grads[k])]
        full = [k for k in sound if k not in empty]
        if len(full) > POOL:
            # Divided, so that the kinks crossed stay as rare as with one leaf.
            directions = {k: self.replay.direction(k) / len(full) ** 0.5 for k in full}
            if any(self._agree(directions, grads, step) for step in self.steps[:3]):
                full = []
        return sorted(empty + [k for k in full if not self._agree({k: self.replay.direction(k)}, grads, self.steps[0])])

    def _agree(self, directions: dict[int, Tensor], grads: dict[int, Tensor | None], step: float) -> bool:
        reverse = sum(inner(grads[k], v) for k, v in directions.items())
        return self.replay.difference(directions, step).near(reverse, self.tolerance)

    def _empty(self, k: int, grad: Tensor | None) -> bool:
        return grad is None or not bool(grad.count_nonzero())

    def _nearby(self, suspects: Sequence[int]) -> Verdict | None:
        """Judge again beside ties and kinks; where the module refuses other points, at the point itself."""
        try:
            with self.replay.moved(1, JITTER):
                self.replay.run()
        except Exception:  # a domain that noise leaves (probabilities, sorted edges): stay
            return self._decide(suspects, jittered=False)
        with self.replay.moved(1, JITTER):
            return self._decide(suspects, jittered=True)

    def _decide(self, suspects: Sequence[int], jittered: bool) -> Verdict | None:
        replay = self.replay
        grads = replay.reverse(self.which)
        found: dict[Kind, list[int]] = {}
        for k in suspects:
            if kind := self._kind(k, grads[k], jittered):
                found.setdefault(kind, []).append(k)
        if "surrogate" in found:
            # Beside a straight-through estimator, other leaves (its scale, say) are estimated as well.
            return Verdict("surrogate", found["surrogate"], jittered=jittered)
        order: tuple[Kind, ...] = ("cut", "wrong", "flat", "unexamined")
        for kind in order:
            if kind in found:
                return Verdict(kind, found[kind], jittered=jittered)
        return None

    def _kind(self, k: int, grad: Tensor | None, jittered: bool) -> Kind | None:
        if grad is not None and not bool(torch.isfinite(grad).all()):
            return None
        v = self.replay.direction(k)
        reverse = inner(grad, v)
        ladder: list[Difference] = []
        for step in self.steps:
            ladder.append(self.replay.difference({k: v}, step))
            if not self._empty(k, grad) and ladder[-1].near(reverse, self.tolerance):
                return None
        if self._still(k):
            if self._empty(k, grad):
                return self._flat_or_dead(k)
            return "surrogate" if self._moves(k) and not self._tiny(grad, v) else None
        if self._empty(k, grad):
            return "cut" if self._settled(ladder, 0.0) and not self._kink(k, jittered) else None
        if not self._settled(ladder, reverse) or self._kink(k, jittered):
            return None
        return "wrong" if self._repeats() else "unexamined"

    def _still(self, k: int) -> bool:
        """Whether the values do not move with very small steps."""
        step = 1e-8 if self.replay.wide else 1e-4
        for seed in range(3):  # a small step may still cross a jump
            d = self.replay.difference({k: self.replay.direction(k, seed)}, step)
            if d.size <= d.noise:
                # The finest step sees only noise where a smooth derivative is small: look at a longer one.
                coarse = self.replay.difference({k: self.replay.direction(k, seed)}, 1e-6 if self.replay.wide else 1e-2)
                return coarse.size <= coarse.noise
        return False

    def _moves(self, k: int) -> bool:
        """Whether the values move over a finite distance."""
        return any(moved for _, moved in self._far(k))

    def _far(self, k: int) -> list[tuple[Tensor, bool]]:
        """Finite steps in a leaf, and whether the values moved by them."""
        replay, leaf = self.replay, self.replay.leaves[k]
        here = replay.values({})
        found = []
        for seed, size in ((1, 1.0), (2, 1.0), (3, 3.0 + 1 / leaf.scale), (4, 3.0 + 1 / leaf.scale)):
            far = replay.direction(k, seed) * size
            try:
                there = replay.values({k: far})
            except Exception:  # outside the module's domain
                continue
            found.append((far, any(_differ(a, b) for a, b in zip(here, there, strict=True))))
        return found

    def _flat_or_dead(self, k: int) -> Kind | None:
        """Zero here: everywhere (flat), cut off where the function does slope, or only here (a dead unit)."""
        moving = [far for far, moved in self._far(k) if moved]
        if not moving:
            return None
        leaf = self.replay.leaves[k]
        base = leaf.base
        still = 0
        for far in moving:
            try:
                leaf.base = base + far
                self.replay.dirty.add(k)
                grad = self.replay.reverse([k])[k]
                if grad is not None and bool(grad.count_nonzero()):
                    return None
                still += self._still(k)
            finally:
                leaf.base = base
                self.replay.dirty.add(k)
        return "flat" if still == len(moving) else "cut"

    def _tiny(self, grad: Tensor | None, v: Tensor) -> bool:
        """Whether a gradient is rounding noise beside the values."""
        size = max((float(y.abs().max()) for y in self.replay.values({}) if y.numel()), default=0.0)
        return abs(inner(grad, v)) <= 1e-9 * max(size, 1e-30)

    def _settled(self, ladder: Sequence[Difference], reverse: float) -> bool:
        """Whether neighbouring steps agree far better with one another than with reverse mode.

        Only then does the difference mean a derivative: across many kinks it drifts from step to step.
        """
        fine = ladder[:3] if self.replay.wide else ladder
        pairs = [*zip(fine, fine[1:], strict=False), *zip(ladder[3:], ladder[4:], strict=False)]
        return any(
            abs(a.value - b.value) <= 0.05 * abs(b.value - reverse) + b.noise and a.size > 2 * a.noise for a, b in pairs
        )

    def _kink(self, k: int, jittered: bool) -> bool:
        """Whether one-sided differences disagree (only asked at a point that could not be moved)."""
        if jittered:
            return False
        _, ahead, behind = self._slopes(k, self.replay.direction(k), self.steps[0])
        return bool(abs(ahead - behind) > 0.02 * max(abs(ahead), abs(behind)) + 1e-9)

    def _repeats(self) -> bool:
        """Whether two runs from one state give the same values."""
        first, second = self.replay.values({}), self.replay.values({})
        return all(torch.allclose(a, b, rtol=1e-9, equal_nan=True) for a, b in zip(first, second, strict=True))


def inner(grad: Tensor | None, v: Tensor) -> float:
    """<J^T g, v>."""
    return 0.0 if grad is None else float(torch.where(v == 0, 0, grad.to_dense() * v).double().sum())


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-6, atol=1e-12, equal_nan=True)
