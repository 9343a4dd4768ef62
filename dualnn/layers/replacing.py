"""`replace`: drop a layer or activation into an existing model, in place."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dualnn.engine.errors import DualInputError
from dualnn.layers.activation import make_activation

Replacement = str | nn.Module | type[nn.Module] | Callable[[], nn.Module]


def replace(model: nn.Module, rules: Mapping[type[nn.Module], Replacement], where: str = "*") -> list[str]:
    """Replace submodules by type, in place.

    Args:
        model: The model.
        rules: For each type what takes its place: the name of an activation (one of
            `dualnn.activations.available()`, a class of ``torch.nn`` or a dotted path), a module class, a function
            without arguments that makes a module, or a module (deep-copied for every place, so that none share
            parameters).
        where: Only submodules whose qualified name matches this glob.

    Returns:
        The qualified names of the replaced submodules. Names, every other weight, the device, the dtype and the
        training mode are kept.

    Raises:
        DualInputError: Nothing matched, or a replacement is not a module.
        UnknownNameError: An unknown activation.

    Example:
        >>> import torch, dualnn as dn
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU())
        >>> dn.layers.replace(net, {torch.nn.GELU: "kepler"})
        ['1']
    """
    found: list[str] = []
    made: dict[nn.Module, nn.Module] = {}
    for name, parent in list(model.named_modules()):
        if any(name == f or name.startswith(f + ".") for f in found):
            continue  # inside a module that is gone
        for child_name, child in list(parent._modules.items()):  # named_children() would name a shared one once
            if child is None:
                continue
            full = f"{name}.{child_name}" if name else child_name
            kind = next((k for k in rules if type(child) is k), None)
            if kind is None or not fnmatch.fnmatch(full, where):
                continue
            if child not in made:  # a module used in two places stays one module
                made[child] = _placed(_made(rules[kind], child), child, model)
            parent.add_module(child_name, made[child])
            found.append(full)
    if not found:
        types = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise DualInputError(
            f"nothing to replace: no submodule of type {', '.join(k.__name__ for k in rules)} with a name matching "
            f"{where!r}. The model's leaf modules are: {', '.join(types)}"
        )
    return found


def _made(replacement: Replacement, old: nn.Module) -> nn.Module:
    if not isinstance(replacement, (str, nn.Module)) and not callable(replacement):
        raise DualInputError(f"a replacement is a name, a module, a class or a function, got {replacement!r}")
    # An activation that learns for each channel goes on doing so; others take no channels.
    channels = getattr(old, "num_channels", getattr(old, "num_parameters", 1))
    return make_activation(replacement, channels if isinstance(channels, int) else 1)


def _placed(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Give the new module the device and dtype of what it replaces (or of the model), and its training mode."""
    candidates = [*old.parameters(), *model.parameters()]
    like: torch.Tensor = next((p for p in candidates if p.dtype.is_floating_point), torch.empty(0))
    return new.to(device=like.device, dtype=like.dtype).train(old.training)
