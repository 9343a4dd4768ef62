"""Smooth primitives by name: the functions whose derivative stands in for that of a hard decision.

Shared by the hard activations (`heaviside`, `sign`, `spike`) and by `dualnn.layers.Surrogate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.errors import DualnnError


@dataclasses.dataclass(frozen=True)
class Primitive:
    """A smooth function, as data.

    Attributes:
        equation: P(u), for people.
        value: P on tensors.
        slope: P' on tensors, differentiable torch code.
    """

    equation: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


PRIMITIVES: dict[str, Primitive] = {}


def register_primitive(name: str, primitive: Primitive) -> None:
    """Make a primitive available as ``Surrogate(fn, name)``.

    Raises:
        DualnnError: The name is taken.

    Example:
        >>> identity = PRIMITIVES["identity"]
        >>> register_primitive("identity", identity)  # the same again is no clash
    """
    if PRIMITIVES.get(name, primitive) is not primitive:
        raise DualnnError(f"a surrogate primitive named {name!r} is already registered")
    PRIMITIVES[name] = primitive


def _logistic_slope(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 - s)


def _inside(u: Tensor) -> Tensor:
    return (u.abs() <= 1).to(u.dtype)


register_primitive("sigmoid", Primitive("1 / (1 + exp(-u))", torch.sigmoid, _logistic_slope))
register_primitive("tanh", Primitive("tanh(u)", torch.tanh, lambda u: 1 - torch.tanh(u) ** 2))
register_primitive(
    "atan",
    Primitive(
        "1/2 + atan(pi u / 2) / pi",
        lambda u: torch.atan(math.pi / 2 * u) / math.pi + 0.5,
        lambda u: 0.5 / (1 + (math.pi / 2 * u) ** 2),
    ),
)
register_primitive(
    "erf",
    Primitive(
        "(1 + erf(u / sqrt(2))) / 2",
        lambda u: (1 + torch.erf(u / math.sqrt(2))) / 2,
        lambda u: torch.exp(-u * u / 2) / math.sqrt(2 * math.pi),
    ),
)
register_primitive(
    "triangle",
    Primitive(
        "1/2 + u - u |u| / 2 for |u| <= 1, else 0 or 1",
        lambda u: 0.5 + u.clamp(-1, 1) - u.clamp(-1, 1) * u.clamp(-1, 1).abs() / 2,
        lambda u: torch.where(u.abs() < 1, 1 - u.abs(), 0.0),
    ),
)
register_primitive(
    "fast_sigmoid", Primitive("u / (1 + |u|)", lambda u: u / (1 + u.abs()), lambda u: 1 / (1 + u.abs()) ** 2)
)
register_primitive("identity", Primitive("u", lambda u: u, torch.ones_like))
register_primitive("identity-clip", Primitive("clamp(u, -1, 1)", lambda u: u.clamp(-1, 1), _inside))
