"""What a right-hand side depends on besides its arguments: parameters are lifted to arguments, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.dual_tensor import DualTensor, primal_of
from dualnn.engine.errors import TangentLostError
from dualnn.engine.parameters import Places


def plain(x: Any) -> Any:
    """The value of a tensor, without tangents or graph; anything else as it is."""
    return primal_of(x).detach() if isinstance(x, Tensor) else x


def lifted(fn: Callable[..., Tensor], args: Sequence[Any]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """A module's (or a module's method's) parameters in front of the other arguments, where they are differentiated."""
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    if not isinstance(module, nn.Module):
        return fn, tuple(args)
    places = Places(module)
    count = len(places.parameters)
    if not any(isinstance(p, DualTensor) or (torch.is_grad_enabled() and p.requires_grad) for p in places.parameters):
        return fn, tuple(args)

    def call(t: Tensor, y: Tensor, *rest: Any) -> Tensor:
        with places.swapped(rest[:count]):
            return fn(t, y, *rest[count:])

    return call, (*places.parameters, *args)


def refuse_captured(fn: Callable[..., Tensor], t: Tensor, y: Tensor, args: Sequence[Any], name: str = "fn") -> None:
    """Raise where ``fn`` of plain arguments is differentiable: by something that it captured, and would be lost."""
    f = fn(t.unsqueeze(-1) if y.dim() > 1 else t, y, *args)
    if isinstance(f, DualTensor) or (isinstance(f, Tensor) and torch.is_grad_enabled() and f.requires_grad):
        kind = "carries tangents" if isinstance(f, DualTensor) else "requires grad"
        raise TangentLostError(
            f"{name} depends on something that {kind} and is not among its arguments, so its derivative would be lost: "
            "pass it in args (fn(t, y, *args)), make fn an nn.Module that owns it, or detach it"
        )
