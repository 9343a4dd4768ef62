r"""The matrix exponential: the Taylor polynomial of degree 18 of a scaled matrix, squared back, on all directions.

Five products give the polynomial (Bader, Blanes, Casas, the scheme of torch's own ``matrix_exp``), s squarings undo
the scaling by :math:`2^{-s}`; every product :math:`X Y` moves by :math:`\mathrm dX\, Y + X\, \mathrm dY`, whose factors
the K directions share. What is differentiated is this polynomial; the scaling is frozen. The norm is scaled below 1/2,
twice as far as the value needs: the remainder of the j-th derivative is about :math:`2^{-(19 - j)} / (19 - j)!`, below
rounding for every order of use.

Reference:
    Bader, Blanes, Casas, "Computing the matrix exponential with an optimized Taylor polynomial approximation",
    Mathematics 7, 2019; Al-Mohy, Higham, "Computing the Fréchet derivative of the matrix exponential", SIAM J. Matrix
    Anal. Appl. 30, 2009.
"""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.generic import pushforward
from dualnn.engine.registry import Sample
from dualnn.engine.scaling import idle
from dualnn.engine.sides import after, before, beside, leading

Pair = tuple[Tensor, Tensor]  # a value (*batch, n, n) and its directions (*batch, n, K, n)

# Coefficients of I, X, X^2, X^3, X^6 in the five polynomials; with A9 = Q0 Q4 + Q3 the result is Q1 + (Q2 + A9) A9.
COEFFICIENTS = (
    (0.0, -1.00365581030144618291e-01, -8.02924648241156932449e-03, -8.92138498045729985177e-04, 0.0),
    (
        0.0,
        3.97849749499645077844e-01,
        1.36783778460411720168e00,
        4.98289622525382669416e-01,
        -6.37898194594723280150e-04,
    ),
    (
        -1.09676396052962061844e01,
        1.68015813878906206114e00,
        5.71779846478865511061e-02,
        -6.98210122488052056106e-03,
        3.34975017086070470649e-05,
    ),
    (
        -9.04316832390810593223e-02,
        -6.76404519071381882256e-02,
        6.75961301770459654925e-02,
        2.95552570429315521194e-02,
        -1.39180257516060693404e-05,
    ),
    (0.0, 0.0, -9.23364619367118555360e-02, -1.69364939002081722752e-02, -1.40086798182036094347e-05),
)
NORM = 0.5


def _product(a: Pair, b: Pair) -> Pair:
    return a[0] @ b[0], after(a[1], b[0]) + before(a[0], b[1])


def _plus(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _combined(coefficients: tuple[float, ...], powers: list[Pair]) -> Pair:
    value, moved = None, None
    for c, (p, d) in zip(coefficients[1:], powers, strict=True):
        if c:
            value = p * c if value is None else torch.add(value, p, alpha=c)
            moved = d * c if moved is None else torch.add(moved, d, alpha=c)
    assert value is not None and moved is not None
    if coefficients[0]:
        value = value + coefficients[0] * torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
    return value, moved


def _squarings(x: Tensor) -> tuple[Tensor, int]:
    """How often each matrix is halved (and then squared), and the most."""
    norm = primal_of(x).detach().abs().sum(-2).amax(-1)
    _, exponent = torch.frexp(norm / NORM)  # norm / NORM < 2^exponent
    counts = torch.where(torch.isfinite(norm), exponent.clamp(min=0), 0)
    return counts, int(counts.max()) if counts.numel() else 0


def frechet(x: Tensor, t: Tensor) -> Tensor:
    """Directions of ``exp(x)``, for directions ``t: (K, *x.shape)``."""
    counts, most = _squarings(x)
    one = (x, beside(t))
    if most:
        factor = torch.ldexp(torch.ones_like(counts, dtype=primal_of(x).real.dtype), -counts)[..., None, None]
        one = (x * factor, one[1] * factor.unsqueeze(-1))
    two = _product(one, one)
    three = _product(one, two)
    six = _product(three, three)
    q = [_combined(c, [one, two, three, six]) for c in COEFFICIENTS]
    nine = _plus(_product(q[0], q[4]), q[3])
    found = _plus(q[1], _product(_plus(q[2], nine), nine))
    even = bool((counts == most).all())
    for i in range(most):
        squared = _product(found, found)
        if not even:  # a sample of small norm is done earlier: more squarings would only add rounding
            open_ = (i < counts)[..., None, None]
            squared = torch.where(open_, squared[0], found[0]), torch.where(open_.unsqueeze(-1), squared[1], found[1])
        found = squared
    return leading(found[1])


def by_blocks(x: Tensor, t: Tensor) -> Tensor:
    r"""The same as a block of :math:`\exp \begin{pmatrix} A & dA \\ 0 & A \end{pmatrix}`: needs no look at the norm."""
    x = x.expand(t.shape)
    low = torch.cat([torch.zeros_like(x), x], -1)
    n = x.shape[-1]
    return torch.linalg.matrix_exp(torch.cat([torch.cat([x, t], -1), low], -2))[..., :n, n:]


@pushforward(
    "matrix_exp",
    lambda r: [Sample((r(3, 3),)), Sample((r(2, 3, 3),)), Sample((6 * r(2, 2, 2),)), Sample((0.05 * r(3, 3),))],
    functions=[torch.linalg.matrix_exp, torch.matrix_exp, torch.Tensor.matrix_exp],
)
def _matrix_exp(t: Tensor, x: Tensor, y: Any) -> Tensor:
    return frechet(x, t) if idle() and x.numel() else by_blocks(x, t)
