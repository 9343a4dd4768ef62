r"""Solves, inverses and the log-determinant: one factorisation, the K directions as more columns.

================  ====================================================================================================
solve             :math:`\mathrm dX = A^{-1}(\mathrm dB - \mathrm dA\,X)`
inv               :math:`\mathrm d(A^{-1}) = -A^{-1}\, \mathrm dA\, A^{-1}`
slogdet           :math:`\mathrm d \log|\det A| = \mathrm{Re}\, s`, :math:`\mathrm d\,\mathrm{sign} = i\,
                  \mathrm{sign}\, \mathrm{Im}\, s` with :math:`s = \mathrm{tr}(A^{-1} \mathrm dA)`
solve_triangular  as solve, with the triangle of dA that is read
lu_solve          as solve, with :math:`\mathrm dA = P (\mathrm dL\, U + L\, \mathrm dU)`, P frozen
cholesky_solve    as solve, with :math:`\mathrm dA = \mathrm dL\, L^H + L\, \mathrm dL^H`
cholesky_inverse  as inv, with the same dA
================  ====================================================================================================

The value of ``solve`` and ``slogdet`` is torch's own, and so are the factors (`Factored`): torch returns them with it.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from dualnn.engine.concrete import traced
from dualnn.engine.decompose import decomposition
from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.factored import Factored, broadcast, factors_of_slogdet, factors_of_solve, refuse_singular
from dualnn.engine.generic import operands, pushforward
from dualnn.engine.registry import Sample
from dualnn.engine.sides import after, before, below, beside, leading, only, turned
from dualnn.engine.tangents import Tangent, Zero

L = torch.linalg
triangular = L.solve_triangular


def regular(r: Any, *shape: int) -> Tensor:
    """Matrices far from singular, with singular values apart."""
    return r(*shape) + torch.diag_embed(torch.arange(3.0, 3.0 + shape[-1], dtype=torch.float64))


def square(r: Any) -> list[Sample]:
    """One matrix, and two."""
    return [Sample((regular(r, 3, 3),)), Sample((regular(r, 2, 3, 3),))]


def _inverse(t: Tensor, x: Tensor, y: Any, *_: Any, **__: Any) -> Any:
    inv = y if isinstance(y, Tensor) else y[0]
    moved = leading(-after(before(inv, beside(t)), inv))
    return moved if isinstance(y, Tensor) else (moved, None)


pushforward("linalg.inv", square, functions=[L.inv, torch.inverse, Tensor.inverse])(_inverse)
pushforward("linalg.inv_ex", square, functions=[L.inv_ex])(_inverse)


def _is_vector(a: Tensor, b: Tensor) -> bool:
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def _solved(A: Tensor, B: Tensor, left: bool, check: bool) -> tuple[Tensor, Tensor]:
    """``(X, info)``; from the right it is :math:`A^H X^H = B^H`."""
    vector = left and _is_vector(A, B)
    factored, info = Factored(A), []

    def value(a: Tensor, b: Tensor) -> Tensor:
        b = b if left else b.mH
        if is_functorch_wrapped_tensor(a) or is_functorch_wrapped_tensor(b) or traced():
            x, found = L.solve_ex(a, b, left=left, check_errors=check)
        else:
            x, lu, pivots, found, flipped = factors_of_solve(a, b, left)
            factored.adopt(lu, pivots, flipped, found)
            if check:
                refuse_singular(found)
        info.append(found)
        return x if left else x.mH

    rhs = B.unsqueeze(-1) if vector else B if left else B.mH
    if rhs.shape[:-2] != A.shape[:-2]:
        shape = torch.broadcast_shapes(rhs.shape[:-2], A.shape[:-2])
        rhs = rhs.expand(*shape, *rhs.shape[-2:])
    x = factored.descend(A, rhs, not left, value)
    x = x.squeeze(-1) if vector else x if left else x.mH
    return x, info[0]


def _solve_samples(r: Any) -> list[Sample]:
    return [
        Sample((regular(r, 3, 3), r(3, 2))),
        Sample((regular(r, 3, 3), r(3))),
        Sample((regular(r, 2, 3, 3), r(2, 3))),
        Sample((regular(r, 2, 3, 3), r(3, 2))),
        Sample((regular(r, 3, 3), r(2, 3)), {"left": False}),
        Sample((regular(r, 9, 3, 3), r(9, 3, 7))),
    ]


@decomposition("linalg.solve", L.solve, samples=_solve_samples, own_value=False)
def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    return _solved(A, B, left, True)[0]


@decomposition("linalg.solve_ex", L.solve_ex, samples=_solve_samples, own_value=False)
def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    x, info = _solved(A, B, left, check_errors)
    return torch.return_types.linalg_solve_ex((x, info))


@operands(
    "linalg.solve_triangular",
    lambda r: [
        Sample((regular(r, 3, 3), r(3, 2)), {"upper": True}),
        Sample((regular(r, 2, 3, 3), r(1, 3, 2)), {"upper": False, "unitriangular": True}),
        Sample((regular(r, 3, 3), r(2, 3)), {"upper": False, "left": False}),
        Sample((regular(r, 3, 3), r(2, 2, 3)), {"upper": True, "left": False}),
    ],
    functions=[L.solve_triangular],
)
def _solve_triangular(
    y: Tensor, t: dict, A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tangent | None:
    n = A.shape[-1]
    read = below(n, n, A, -int(unitriangular))
    read = read.transpose(0, 2) if upper else read

    def product(d: Tensor) -> Tensor:
        d = only(read, beside(d))
        return leading(-after(d, y) if left else -before(y, d))

    def solve(d: Tensor) -> Tensor:
        d = beside(d)
        flat = d.flatten(-2) if left else d.flatten(-3, -2)
        found = triangular(A, flat, upper=upper, left=left, unitriangular=unitriangular)
        return leading(found.unflatten(-1, d.shape[-2:]) if left else found.unflatten(-2, d.shape[-3:-1]))

    tan = t["A"] and t["A"].map(product)
    part = t["B"] and t["B"].map(lambda d: broadcast(d, y))
    tan = part if tan is None else tan.plus(part)
    return tan and tan.map(solve)


def log_determinant(A: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the modulus, from the factorisation that torch makes for the value."""
    factored = Factored(A)

    def descend(a: Tensor) -> tuple[Tensor, Tensor]:
        level = top_level((a,))
        if level == 0:
            if is_functorch_wrapped_tensor(a):
                return L.slogdet(a)
            sign, log, lu, pivots, flipped = factors_of_slogdet(a)
            factored.adopt(lu, pivots, flipped)
            return sign, log
        primal, tan = split(a, level)
        sign, log = descend(primal)
        if tan is None:
            none = Zero(count(level, (a,)))
            return make(sign, none, level), make(log, none, level)
        transposed = factored.inverted(primal).mT
        trace = tan.map(lambda d: (transposed * d).sum((-2, -1)))
        if not a.is_complex():
            return make(sign, Zero(tan.num), level), make(log, trace, level)
        turn = trace.map(lambda s: sign * torch.complex(torch.zeros_like(s.real), s.imag))
        return make(sign, turn, level), make(log, trace.map(torch.real), level)

    return descend(A)


@decomposition("linalg.slogdet", L.slogdet, samples=square, own_value=False)
def _slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(log_determinant(A))


@decomposition("slogdet", torch.slogdet, Tensor.slogdet, own_value=False)
def _old_slogdet(input: Tensor) -> Any:
    return torch.return_types.slogdet(log_determinant(input))


# Solves with factors that are given.


def _plus(a: Tangent | None, b: Tangent | None) -> Tangent | None:
    return b if a is None else a.plus(b)


def _factor_samples(r: Any) -> list[Sample]:
    packed, pivots = L.lu_factor(regular(r, 2, 3, 3))
    one, its = packed[0], pivots[0]
    return [
        Sample((packed, pivots, r(2, 3, 2))),
        Sample((packed, pivots, r(2, 3, 2)), {"adjoint": True}),
        Sample((one, its, r(2, 3)), {"left": False}),
        Sample((one, its, r(4, 2, 3)), {"left": False, "adjoint": True}),
        Sample((packed, pivots, r(3, 2))),
    ]


@operands("linalg.lu_solve", _factor_samples, functions=[L.lu_solve])
def _lu_solve(
    y: Tensor, t: dict, LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False
) -> Tangent | None:
    from_left, adjoint = left, adjoint if left else not adjoint
    x = y if from_left else y.mH
    n = LU.shape[-1]
    strict = below(n, n, LU)

    def product(d: Tensor) -> Tensor:  # -dA X, or -dA^H X
        p, lower, upper = torch.lu_unpack(LU, pivots)
        d = beside(d)
        dl, du = only(strict, d), only(~strict, d)
        if adjoint:
            inner = p.mT @ x
            return -leading(after(turned(du), lower.mH @ inner) + before(upper.mH, after(turned(dl), inner)))
        return -leading(before(p, after(dl, upper @ x) + before(lower, after(du, x))))

    def solve(d: Tensor) -> Tensor:
        d = beside(d)
        rhs = d.flatten(-2)
        if LU.dim() == 2 and rhs.dim() > 2:
            found = L.lu_solve(LU, pivots, rhs.movedim(-2, 0).flatten(1), adjoint=adjoint)
            found = found.reshape(n, *rhs.shape[:-2], rhs.shape[-1]).movedim(0, -2)
        else:
            found = L.lu_solve(LU, pivots, rhs, adjoint=adjoint)
        found = leading(found.unflatten(-1, d.shape[-2:]))
        return found if from_left else found.mH

    part = t["B"] and t["B"].map(lambda d: broadcast(d if from_left else d.mH, x))
    tan = _plus(t["LU"] and t["LU"].map(product), part)
    return tan and tan.map(solve)


@operands("lu_solve", None)
def _old_lu_solve(y: Tensor, t: dict, input: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Tangent | None:
    return _lu_solve(y, {"LU": t["LU_data"], "B": t["input"]}, LU_data, LU_pivots, input)


def _gram_direction(d: Tensor, factor: Tensor, upper: bool) -> Tensor:
    """Directions of ``L L^H`` (``U^H U``) in the layout of `sides`; of L one triangle is read."""
    n = factor.shape[-1]
    read = below(n, n, factor, 0)
    d = beside(d)
    half = before(factor.mH, only(read.transpose(0, 2), d)) if upper else after(only(read, d), factor.mH)
    return half + turned(half)


def _triangle(factor: Tensor, upper: bool) -> Tensor:
    return factor.triu() if upper else factor.tril()


@operands("cholesky_solve", None)  # torch's gradient fills the triangle that is not read: tests of their own
def _cholesky_solve(y: Tensor, t: dict, input: Tensor, input2: Tensor, upper: bool = False) -> Tangent | None:
    factor = _triangle(input2, upper)

    def solve(d: Tensor) -> Tensor:
        d = beside(d)
        return leading(torch.cholesky_solve(d.flatten(-2), input2, upper).unflatten(-1, d.shape[-2:]))

    tan = t["input2"] and t["input2"].map(lambda d: -leading(after(_gram_direction(d, factor, upper), y)))
    tan = _plus(tan, t["input"] and t["input"].map(lambda d: broadcast(d, y)))
    return tan and tan.map(solve)


@pushforward("cholesky_inverse", None)
def _cholesky_inverse(t: Tensor, x: Tensor, y: Tensor, upper: bool = False) -> Tensor:
    return leading(-after(before(y, _gram_direction(t, _triangle(x, upper), upper)), y))
