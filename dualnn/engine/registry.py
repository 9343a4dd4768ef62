"""The rule registry: which rule serves which torch callable, with the samples that test it.

A rule is a function ``rule(func, args, kwargs)``, registered where it is defined. Registration names every spelling
of the op (``torch.tanh``, ``Tensor.tanh``, …), and brings samples, from which the standard tests check its value,
its first and its second derivative. A second registration of the same callable raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import UnsupportedOpError

Rule = Callable[[Callable, tuple, dict], Any]

RULES: dict[Any, Rule] = {}
SPECS: dict[str, OpSpec] = {}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an op: positional and keyword arguments; every float tensor among them is differentiated.

    Attributes:
        args: Positional arguments (lists of tensors allowed).
        kwargs: Keyword arguments.
        constant: Indices of positional float tensors that are not differentiated.
    """

    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    constant: tuple[int, ...] = ()


SampleMaker = Callable[[Callable[..., Tensor]], Iterable[Sample]]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """What the standard tests need to know of a rule.

    Attributes:
        name: Unique name, for the tests' ids.
        op: The callable that the samples call.
        samples: Takes a maker of random float64 tensors ``rand(*shape, low=-2, high=2)``, yields `Sample` objects.
        smooth: False where finite differences across a kink or jump would mislead.
        flat: The derivative is zero almost everywhere.
        reverse: False where torch has no reverse mode to compare with (nor to differentiate the rule's value with).
    """

    name: str
    op: Callable
    samples: SampleMaker
    smooth: bool = True
    flat: bool = False
    reverse: bool = True


def register(*functions: Callable, rule: Rule, spec: OpSpec | None = None) -> None:
    """Let ``rule`` serve every callable in ``functions``; ``spec`` brings the standard tests."""
    for function in dict.fromkeys(functions):
        if function in RULES:
            raise ValueError(f"{function} already has a dual rule")
        RULES[function] = rule
    if spec is not None:
        add_spec(spec)


def add_spec(spec: OpSpec) -> None:
    """Let the standard tests find an op."""
    if spec.name in SPECS:
        raise ValueError(f"an op named {spec.name!r} is already registered")
    SPECS[spec.name] = spec


def rule_for(func: Callable) -> Rule:
    """The rule of a callable: its own (of ours, or `by_reverse`), or one made from its Python body (`composite`)."""
    rule = RULES.get(func)
    if rule is not None:
        return rule
    from dualnn.engine.composite import composite_rule  # needs the dual tensor, which needs this module

    rule = composite_rule(func)
    if rule is None:
        raise unsupported(func)
    RULES[func] = rule
    return rule


def unsupported(func: Callable, why: str = "has no dual rule") -> UnsupportedOpError:
    """The error for an op that cannot be followed."""
    return UnsupportedOpError(
        f"{op_name(func)} {why}. Rewrite it with supported operations, register a rule in dualnn.engine.rules, or, "
        "if its tangent is not wanted, call it on x.detach()."
    )


def op_name(func: Callable) -> str:
    """A readable name such as ``torch.linalg.qr`` or ``Tensor.put_``."""
    name = getattr(func, "__name__", repr(func))
    if name == "__get__" or name == "__set__":
        owner = getattr(func, "__self__", None)
        return f"Tensor.{getattr(owner, '__name__', owner)}"
    if getattr(Tensor, name, None) is func:
        return f"Tensor.{name}"
    module = getattr(func, "__module__", None) or ""
    if getattr(torch, name, None) is func:
        module = "torch"
    return f"{module}.{name}" if module else str(name)


def spellings(name: str, *, method: bool = True) -> list[Callable]:
    """Every callable by which torch offers an op of this name: torch, Tensor, special, linalg."""
    homes: list[Any] = [torch, torch.special, torch._C._nn, torch._VF]
    if method:
        homes.append(Tensor)
    found = [getattr(home, name) for home in homes if hasattr(home, name)]
    return list(dict.fromkeys(found))
