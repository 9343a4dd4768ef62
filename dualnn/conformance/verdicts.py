"""Verdicts on one case: is the derivative right, does the engine raise, or is it wrong?

===========  ==========================================================================================================
`right`      every entry agrees with the oracle
`raises`     an error said that this cannot be done (`UnsupportedOpError`), or another one came
`wrong`      a number came out that no oracle confirms
`nan`        nan came where an oracle has a number (singular points: 0 / 0)
`unchecked`  no oracle has an answer (a kink where torch's own reverse mode raises)
===========  ==========================================================================================================

First order: K directions against 5-point differences; at kinks, where differences do not settle, against torch's own
reverse mode. Second order: forward over forward against the difference of a reverse gradient, and entry by entry
against the difference of the first order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.conformance.case import Case, is_continuous, plain, real
from dualnn.conformance.differences import agrees, difference
from dualnn.engine.dual_tensor import DualTensor, dual
from dualnn.engine.errors import UnsupportedOpError

RIGHT, RAISES, WRONG, NAN, UNCHECKED = "right", "raises", "WRONG", "nan", "unchecked"
NUM = 2


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An outcome and, where it is not `right`, why."""

    outcome: str
    why: str = ""


def directions(tensors: Sequence[Tensor], num: int, seed: int) -> list[Tensor]:
    """``num`` random directions for each tensor: ``(num, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for x in tensors:
        # A complex direction is a real one plus i times another.
        shape = (num, *x.shape, 2) if x.dtype.is_complex else (num, *x.shape)
        t = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        drawn.append((torch.view_as_complex(t) if x.dtype.is_complex else t).to(x.dtype))
    return drawn


def attempt(check: Callable[[], Verdict]) -> Verdict:
    """A verdict, with errors told apart."""
    try:
        return check()
    except UnsupportedOpError as error:
        return Verdict(RAISES, str(error).split(". ")[0])
    except Exception as e:  # reported, not swallowed: every row of the table shows it
        return Verdict(RAISES, f"{type(e).__name__}: {' '.join(str(e).split())[:120]}")


def moved(case: Case, direction: Sequence[Tensor]) -> Callable[[float], list[Tensor]]:
    """The results along a direction, as real tensors."""

    def at(h: float) -> list[Tensor]:
        return [real(y).clone() for y in case(*[x + h * d for x, d in zip(case.tensors, direction, strict=True)])]

    return at


def compare(
    got: Sequence[Tensor], oracle: tuple[list[Tensor], list[Tensor]], other: Any, what: str, subgradient: bool = True
) -> Verdict:
    """Entries against a difference where it is trusted, against ``other()`` elsewhere (None: no answer).

    ``subgradient``: elsewhere ``other()`` is the convention to follow; otherwise (second order, at a kink) there is no
    derivative, and a difference from it proves nothing.
    """
    second: list[Tensor] | None = None
    unchecked = False
    for i, (g, o, trusted) in enumerate(zip(got, *oracle, strict=True)):
        if g.shape != o.shape:
            return Verdict(WRONG, f"{what}: shape {tuple(g.shape)} for {tuple(o.shape)}")
        trusted = trusted & ~o.isnan()
        good = agrees(g, o)
        bad = trusted & ~good
        if bool(g[bad].isnan().any()):
            return Verdict(NAN, f"{what}: nan")
        if bool(bad.any()):
            worst = (g - o).abs()[bad].max()
            return Verdict(WRONG, f"{what}: off by {float(worst):.2g}")
        rest = ~trusted & ~good
        if bool(rest.any()):
            second = other() if second is None else second
            if second is None:
                unchecked = True
            elif bool((agrees(g, second[i]) | trusted | good).all()):
                continue
            elif not subgradient:
                unchecked = True
            else:
                return Verdict(WRONG, f"{what}: differs from torch's subgradient at a kink")
    return Verdict(UNCHECKED, f"{what}: on a kink") if unchecked else Verdict(RIGHT)


def by_reverse(case: Case, *along: Sequence[Tensor]) -> list[Tensor] | None:
    """Directional derivatives by torch's reverse mode alone (J v is the gradient of <J^T u, v> in u)."""
    try:
        xs = [x.clone().requires_grad_() for x in case.tensors]
        ys = case(*xs)
        us = [torch.ones_like(y).requires_grad_() for y in ys]
        alive = [(y, u) for y, u in zip(ys, us, strict=True) if y.requires_grad]
        if not alive:
            return [real(torch.zeros_like(u)).detach() for u in us]
        pairs = alive
        for direction in along:
            targets, seeds = [t for t, _ in pairs], [s for _, s in pairs]
            gs = torch.autograd.grad(targets, xs, seeds, create_graph=True, allow_unused=True)
            pairs = [(g, d) for g, d in zip(gs, direction, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                return [real(torch.zeros_like(u)).detach() for u in us]
        out = torch.autograd.grad([g for g, _ in pairs], us, [d for _, d in pairs], allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return None
    return [real(torch.zeros_like(u) if o is None else o).detach() for o, u in zip(out, us, strict=True)]


def check_value(case: Case) -> Verdict:
    """The dual's value equals the plain op's: `bitwise`, or `close` to rounding."""
    wanted = case(*case.tensors)
    got = [
        plain(y) for y in case(*[dual(x, t) for x, t in zip(case.tensors, directions(case.tensors, 1, 1), strict=True)])
    ]
    outcome = "bitwise"
    for g, w in zip(got, wanted, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return Verdict(WRONG, f"value: {tuple(g.shape)} {g.dtype} for {tuple(w.shape)} {w.dtype}")
        if not torch.equal(torch.nan_to_num(real(g)), torch.nan_to_num(real(w))):
            outcome = "close"
            if not torch.allclose(g, w, rtol=1e-9, atol=1e-10, equal_nan=True):
                return Verdict(WRONG, f"value: off by {float((g - w).abs().max()):.2g}")
    return Verdict(outcome)


class Oracles:
    """What a case is compared with, computed once for all engines under test."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.first = directions(case.tensors, NUM, 1)
        self.along = [[t[k] for t in self.first] for k in range(NUM)]
        self.exact = all(real(x).dtype == torch.float64 for x in case.tensors)  # else a small step is rounded away
        self._differences: list[Any] = [None] * NUM
        self._curvature: Any = None

    def slope(self, k: int) -> tuple[list[Tensor], list[Tensor]]:
        """Difference along direction k."""
        if self._differences[k] is None:
            found, trusted = difference(moved(self.case, self.along[k]), self.case.step)
            # Rounded to less than double precision a value has steps, and its difference is noise.
            for y, t in zip(self.case(*self.case.tensors), trusted, strict=True):
                t &= real(y).dtype == torch.float64 and self.exact
            self._differences[k] = found, trusted
        return self._differences[k]

    def pairing(self) -> list[Tensor]:
        """Random weights of the results."""
        shapes = [torch.empty(real(y).shape, dtype=torch.float64) for y in self.case(*self.case.tensors)]
        return [w[0] for w in directions(shapes, 1, 5)]

    def curvature(self) -> tuple[float, bool] | None:
        """<w, f''[u, v]> by the difference of a reverse gradient (None where torch cannot)."""
        if self._curvature is None:
            try:
                self._curvature = (self._reverse_difference(),)
            except (RuntimeError, NotImplementedError):
                self._curvature = (None,)
        return self._curvature[0]

    def _reverse_difference(self) -> tuple[float, bool]:
        weights = self.pairing()
        u, v = self.along

        def gradient(h: float) -> list[Tensor]:
            xs = [(x + h * d).requires_grad_() for x, d in zip(self.case.tensors, v, strict=True)]
            total = _weighted(weights, self.case(*xs))
            grads = torch.autograd.grad(total, xs, allow_unused=True)
            dots = [(real(g) * real(d)).sum() for g, d in zip(grads, u, strict=True) if g is not None]
            return [sum(dots, torch.zeros((), dtype=torch.float64)).detach().reshape(1).to(torch.float64)]

        (slope,), (trusted,) = difference(gradient, self.case.step)
        return float(slope), self.exact and bool(trusted) and self._reverse_is_right(weights)

    def _reverse_is_right(self, weights: Sequence[Tensor]) -> bool:
        """Torch's own reverse gradient against the first difference: it is no oracle where it is wrong."""
        u = self.along[0]
        found, trusted = self.slope(0)
        if not all(bool(t.all()) for t in trusted):
            return True
        xs = [x.clone().requires_grad_() for x in self.case.tensors]
        total = _weighted(weights, self.case(*xs))
        grads = torch.autograd.grad(total, xs, allow_unused=True)
        by_reverse = sum(float((real(g) * real(d)).sum()) for g, d in zip(grads, u, strict=True) if g is not None)
        by_difference = sum(float((w * f).sum()) for w, f in zip(weights, found, strict=True))
        return abs(by_reverse - by_difference) <= 1e-5 * (1 + abs(by_difference))


Forward = Callable[[Case, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def check_first(oracles: Oracles, forward: Forward) -> Verdict:
    """Directional derivatives from ``forward(case, primals, direction)`` against the oracles."""
    case = oracles.case
    unchecked = None
    for k in range(NUM):
        got = [real(t) for t in forward(case, case.tensors, oracles.along[k])]
        verdict = compare(got, oracles.slope(k), lambda k=k: by_reverse(case, oracles.along[k]), "first order")
        if verdict.outcome == WRONG:
            return verdict
        unchecked = verdict if verdict.outcome == UNCHECKED else unchecked
    return unchecked or Verdict(RIGHT)


def check_second(oracles: Oracles, forward: Forward, twice: Forward) -> Verdict:
    """``twice(case, u, v)``, the second directional derivative, against the difference of a reverse gradient.

    Where that is not trusted (kinks, no reverse formula), entry by entry against the difference of ``forward``.
    """
    case = oracles.case
    u, v = oracles.along
    got = [real(t) for t in twice(case, u, v)]
    oracle = oracles.curvature()
    if oracle is not None and oracle[1]:
        mixed = sum((w * t).sum() for w, t in zip(oracles.pairing(), got, strict=True))
        if not bool(agrees(torch.as_tensor(mixed).double(), torch.tensor(oracle[0], dtype=torch.float64))):
            nan = bool(torch.as_tensor(mixed).isnan())
            return Verdict(
                NAN if nan else WRONG, f"second order: {float(mixed):.6g}, a difference gives {oracle[0]:.6g}"
            )
        return Verdict(RIGHT)

    def slope_along_v(h: float) -> list[Tensor]:
        return [real(t).clone() for t in forward(case, [x + h * d for x, d in zip(case.tensors, v, strict=True)], u)]

    derivatives, trusted = difference(slope_along_v, case.step)
    trusted = [t & oracles.exact for t in trusted]
    return compare(got, (derivatives, trusted), lambda: by_reverse(case, u, v), "second order", False)


def by_duals(case: Case, primals: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """One direction through dualnn."""
    return [_tangent(y)[0] for y in case(*[dual(x, t) for x, t in zip(primals, direction, strict=True)])]


def by_duals_twice(case: Case, u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Forward over forward through dualnn."""
    inner = [dual(dual(x, b), torch.zeros_like(x) + a) for x, a, b in zip(case.tensors, u, v, strict=True)]
    return [_tangent(_tangent(y)[0])[0] for y in case(*inner)]


def check_reverse(oracles: Oracles) -> Verdict:
    """Reverse over forward: the gradient of <w, J u> along v, against the same oracle (or forward over forward)."""
    case = oracles.case
    u, v = oracles.along
    weights = oracles.pairing()
    xs = [x.clone().requires_grad_() for x in case.tensors]
    total = _weighted(weights, by_duals(case, xs, u))
    mixed = 0.0
    if total.requires_grad:
        grads = torch.autograd.grad(total, xs, allow_unused=True)
        mixed = sum(float((real(g) * real(d)).sum()) for g, d in zip(grads, v, strict=True) if g is not None)
    oracle = oracles.curvature()
    if oracle is not None and oracle[1]:
        wanted = oracle[0]
    else:
        twice = by_duals_twice(case, u, v)
        wanted = sum(float((w * real(t)).sum()) for w, t in zip(weights, twice, strict=True))
        if wanted != wanted:
            return Verdict(UNCHECKED, "reverse over dual: the second derivative does not exist")
    if not bool(agrees(torch.tensor(mixed, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64))):
        return Verdict(NAN if mixed != mixed else WRONG, f"reverse over dual: {mixed:.6g} for {wanted:.6g}")
    return Verdict(RIGHT)


def by_torch(case: Case, primals: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """One direction through torch.func.jvp."""
    return list(torch.func.jvp(lambda *xs: tuple(case(*xs)), tuple(primals), tuple(direction))[1])


def by_torch_twice(case: Case, u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """torch.func.jvp of jvp."""

    def inner(*xs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda *ys: tuple(case(*ys)), xs, tuple(u))[1]

    return list(torch.func.jvp(inner, tuple(case.tensors), tuple(v))[1])


def check_counts(case: Case) -> Verdict:
    """K = 0 gives no directions; K of several equals one at a time."""
    several = directions(case.tensors, 3, 3)
    for num in (0, 3):
        out = case(*[dual(x, t[:num]) for x, t in zip(case.tensors, several, strict=True)])
        for y in out:
            if _tangent(y, num).shape != (num, *y.shape):
                return Verdict(WRONG, f"K = {num}: tangent of shape {tuple(_tangent(y, num).shape)}")
    single = by_duals(case, case.tensors, [t[2] for t in several])
    for y, one in zip(out, single, strict=True):
        if not torch.allclose(_tangent(y)[2], one, rtol=1e-9, atol=1e-9, equal_nan=True):
            return Verdict(WRONG, "K = 3 differs from one direction at a time")
    return Verdict(RIGHT)


def _weighted(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    return torch.stack([(w * real(y)).sum() for w, y in zip(weights, values, strict=True)]).sum()


def _tangent(y: Any, num: int = 1) -> Tensor:
    if isinstance(y, DualTensor):
        return y.tangent
    if isinstance(y, Tensor) and is_continuous(y):
        return torch.zeros((num, *y.shape), dtype=y.dtype)
    raise TypeError(f"a result of type {type(y).__name__} carries no derivative")
