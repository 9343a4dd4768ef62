"""The regularised lower incomplete gamma function P(a, exp(u)) and all its derivatives, in u and in the shape a.

Everything is written in u = log x: dP/du = exp(a u - exp(u) - lgamma(a)) has no singularity anywhere, so neither
have the higher derivatives (x = 0 is u = -inf).
"""

import math
from functools import cache, partial

import torch
from torch import Tensor

from dualnn.engine.bridge import ClosedForm, elementwise
from dualnn.engine.errors import ConvergenceError

#: Iterations of the series or continued fraction before giving up. They take about 10 sqrt(a) + 100.
MAX_STEPS = 20_000

Jet = list[Tensor]
"""Truncated power series in the shape: [f, f', f''/2, ...], coefficients of epsilon^j in f(a + epsilon)."""


def _product(f: Jet, g: Jet) -> Jet:
    return [sum((f[i] * g[j - i] for i in range(1, j + 1)), f[0] * g[j]) for j in range(len(f))]


def _reciprocal(f: Jet) -> Jet:
    inverse = [1 / f[0]]
    for j in range(1, len(f)):
        inverse.append(-inverse[0] * sum((f[i] * inverse[j - i] for i in range(2, j + 1)), f[1] * inverse[j - 1]))
    return inverse


def _constant(value: Tensor, order: int) -> Jet:
    return [value] + [torch.zeros_like(value) for _ in range(order)]


def _series(x: Tensor, a: Tensor, order: int) -> Jet:
    """sum_n x^n / ((a + 1) ... (a + n)), with P = x^a exp(-x) / Gamma(a + 1) times it."""
    eps = torch.finfo(x.dtype).eps
    term = _constant(torch.ones_like(x), order)
    total = [t.clone() for t in term]
    for n in range(1, MAX_STEPS):
        # Division by (a + n + epsilon). The signs of the coefficients alternate with j and are the same in every
        # term, so nothing cancels and every coefficient keeps its relative accuracy.
        for j in range(order + 1):
            term[j].mul_(x)
            if j:
                term[j].sub_(term[j - 1])
            term[j].div_(a + n)
            total[j].add_(term[j])
        # Past the largest term only; the tail of a coefficient is a few terms long by then, hence the factor.
        done = a + n > x
        for t, s in zip(term, total, strict=True):
            done &= t.abs() <= eps / 8 * s.abs()
        if bool(done.all()):
            return total
    raise _did_not_converge("series", a, x)


def _continued_fraction(x: Tensor, a: Tensor, order: int) -> Jet:
    """Legendre's 1 / (x + 1 - a - 1 (1 - a) / (x + 3 - a - ...)), with Q = 1 - P = x^a exp(-x) / Gamma(a) times it."""
    eps = torch.finfo(x.dtype).eps
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    above = [zero] * max(order - 1, 0)  # b and the numerators are linear in a: higher coefficients vanish
    b = ([x + 1 - a, -one] + above)[: order + 1]
    d = _reciprocal(b)
    fraction = d
    # Modified Lentz needs c_1 = infinity: c enters as its reciprocal's product with the numerator, 0 at first.
    over_c = _constant(zero, order)
    for n in range(1, MAX_STEPS):
        b = [b[0] + 2, *b[1:]]
        numerator = ([n * (a - n), n * one] + above)[: order + 1]
        d = _reciprocal([p + q for p, q in zip(b, _product(numerator, d), strict=True)])
        c = [p + q for p, q in zip(b, over_c, strict=True)]
        following = ([(n + 1) * (a - n - 1), (n + 1) * one] + above)[: order + 1]
        over_c = _product(following, _reciprocal(c))
        factor = _product(c, d)
        fraction = _product(fraction, factor)
        scale = [eps * (1 + (f / fraction[0]).abs()) for f in fraction]
        change = [factor[0] - 1, *factor[1:]]
        if all(bool((t.abs() <= 2 * s).all()) for t, s in zip(change, scale, strict=True)):
            return fraction
    raise _did_not_converge("continued fraction", a, x)


def _did_not_converge(what: str, a: Tensor, x: Tensor) -> ConvergenceError:
    return ConvergenceError(
        f"incomplete gamma: the {what} did not converge in {MAX_STEPS} steps (largest shape {a.max().item():.4g}, "
        f"largest x {x.max().item():.4g}, {x.dtype}); shapes up to 1e6 are in reach"
    )


def _log_power_jet(u: Tensor, a: Tensor, shift: int, order: int) -> Jet:
    """exp(a u - exp(u) - lgamma(a + shift)): its value first, then its jet divided by the value."""
    shape = a + shift
    log = [u - torch.digamma(shape)]
    log += [-_log_gamma_derivative(j, shape) / math.factorial(j) for j in range(2, order + 1)]
    power = [torch.ones_like(u)]
    for j in range(1, order + 1):  # power' = log' power, coefficient by coefficient
        power.append(sum((i * log[i - 1] * power[j - i] for i in range(2, j + 1)), log[0] * power[j - 1]) / j)
    return [torch.exp(a * u - torch.exp(u) - torch.lgamma(shape)), *power]


def _log_gamma_derivative(order: int, a: Tensor) -> Tensor:
    if order == 0:
        return torch.lgamma(a)
    if order == 1:
        return torch.digamma(a)
    # Not torch.polygamma(1, .): its float64 result is off by up to 5e-10.
    return (-1) ** order * math.factorial(order - 1) * torch.special.zeta(float(order), a)


@cache
def log_gamma(order: int) -> ClosedForm:
    """The derivative of that order of log Gamma, as a local function of a, a > 0, accurate to 1e-14."""
    return ClosedForm(partial(_log_gamma_derivative, order), lambda y, a: (elementwise(log_gamma(order + 1), a),))


@torch.no_grad()
def shape_derivative(order: int, u: Tensor, a: Tensor) -> Tensor:
    """The derivative of that order in a of P(a, exp(u)), a > 0: value only, data-dependent stop.

    Series for x < max(a + 1, 3), continued fraction above (there 1 - P, which keeps its digits, is differentiated).

    Shape:
        u, a: broadcastable to (*) -> (*). NaN gives NaN; u = inf and -inf give the limits.
    """
    u, a = torch.broadcast_tensors(u, a)
    x = torch.exp(u)
    result = torch.full_like(u, torch.nan)
    result[torch.isposinf(x) & torch.isfinite(a)] = float(order == 0)
    known = torch.isfinite(x) & torch.isfinite(a)
    large = known & (x >= torch.clamp(a + 1, min=3))
    small = known & ~large
    for mask, shift in ((small, 1), (large, 0)):
        if not bool(mask.any()):
            continue
        us, xs, shapes = u[mask], x[mask], a[mask]
        front, *power = _log_power_jet(us, shapes, shift, order)
        rest = (_series if shift else _continued_fraction)(xs, shapes, order)
        part = math.factorial(order) * front * _product(power, rest)[order]
        part = torch.where(front == 0, 0.0, part)  # at x = 0 front is 0 and its logarithm's derivative infinite
        if not shift:
            part = (1 - part) if order == 0 else -part
        result[mask] = part
    return result


def density(order: int, u: Tensor, a: Tensor) -> Tensor:
    """d/du of `shape_derivative(order, u, a)`, closed form, plain differentiable code.

    It is the derivative of that order in a of p = exp(a u - exp(u) - lgamma(a)): p times the complete Bell
    polynomial of the derivatives of its logarithm.
    """
    p = torch.exp(a * u - torch.exp(u) - elementwise(log_gamma(0), a))
    if order == 0:
        return p
    log = [u - elementwise(log_gamma(1), a)] + [-elementwise(log_gamma(j), a) for j in range(2, order + 1)]
    bell: list[Tensor] = [torch.ones_like(u)]
    for n in range(order):
        bell.append(sum((math.comb(n, j) * bell[n - j] * log[j] for j in range(1, n + 1)), bell[n] * log[0]))
    return p * bell[order]


@cache
def lower_gamma(order: int = 0) -> ClosedForm:
    """The derivative of that order in a of P(a, exp(u)), as a local function of (u, a), differentiable to any order.

    Measured against mpmath for a in [0.05, 200], x = exp(u) in [0, 500], float64.

    Example:
        >>> u = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> elementwise(lower_gamma(), u, torch.ones_like(u))  # 1 - 1/e
        tensor(0.6321, dtype=torch.float64, grad_fn=...)
    """
    return ClosedForm(
        partial(shape_derivative, order),
        lambda y, u, a: (density(order, u, a), elementwise(lower_gamma(order + 1), u, a)),
    )
