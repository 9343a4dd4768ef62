"""Ops that draw random numbers: one draw for the value and all its directions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.decompose import decomposition
from dualnn.engine.dual_tensor import primal_of
from dualnn.engine.generic import register_inplace
from dualnn.engine.registry import register, spellings


def repeatable(rule: Callable) -> Callable:
    """Let every evaluation of ``func`` inside a rule draw the same numbers; the caller's stream moves once."""

    def wrapped(func: Callable, args: tuple, kwargs: dict) -> Any:
        device = next(primal_of(x).device for x in args if isinstance(x, Tensor))
        cuda = [device] if device.type == "cuda" else []
        before = _states(cuda)
        moved: list[Any] = []

        def again(*a: Any, **k: Any) -> Any:
            if moved:
                with torch.random.fork_rng(cuda):
                    _restore(before, cuda)
                    return func(*a, **k)
            out = func(*a, **k)
            moved.append(True)
            return out

        return rule(again, args, kwargs)

    return wrapped


def _states(cuda: list) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]


def _restore(states: list[Tensor], cuda: list) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(cuda, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


for _name in ("alpha_dropout", "feature_alpha_dropout", "rrelu"):
    _found = list(dict.fromkeys([*spellings(_name)]))
    register(*_found, rule=repeatable(reverse_rule))
    register_inplace(_name, repeatable(reverse_rule), _found)
for _name in ("fractional_max_pool2d", "fractional_max_pool3d"):
    _kernel = getattr(torch._C._nn, _name)
    _public = [getattr(F, _name), getattr(F, _name + "_with_indices")]
    register(_kernel, *_public, rule=repeatable(reverse_rule))


@decomposition("normal", torch.normal, own_value=False)
def _normal(mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None) -> Tensor:
    """mean + std * z with the z that torch draws: the derivative follows the path."""
    shape = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    like = primal_of(mean if isinstance(mean, Tensor) else std)
    z = torch.normal(torch.zeros(shape, dtype=like.dtype, device=like.device), 1.0, generator=generator)
    return mean + std * z
