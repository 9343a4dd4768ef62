"""An activation from a name, a class, a function or an instance: what layers and models accept."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import activation as torch_activations

from dualnn.activations import available, get_class
from dualnn.engine.errors import DualInputError, unknown_name

# Any, where nn.Module is meant: the command line's --help would list every module class of every package.
Activation = str | Callable[..., Any]

_TORCH = frozenset(torch_activations.__all__) - {"MultiheadAttention"} | {"Identity"}
_WANTED = "give a name, or a class or function that returns a torch.nn.Module"


def make_activation(activation: Activation, channels: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Build one activation module for a layer of `channels` features.

    Args:
        activation: the name of a `torch.nn` activation class ("GELU"), of a registered one ("kepler", see
            `dualnn.activations.available`), a dotted path ("dualnn.models.NewtonTanh"), a class or function that
            returns a module, or an instance, which is copied so that layers share no parameters.
        channels: number of features; passed on to whatever takes `num_channels` (activations that learn per
            channel), unless `kwargs` says otherwise.
        kwargs: further keyword arguments of the class or function.

    Raises:
        UnknownNameError: no activation, or no argument of it, has that name; the message names the nearest.
        DualInputError: a dotted path that cannot be imported, something that makes no module, a required argument
            left out, or keyword arguments beside an instance.

    Example:
        >>> make_activation("LeakyReLU", 8, {"negative_slope": 0.1})
        LeakyReLU(negative_slope=0.1)
    """
    kwargs = dict(kwargs or {})
    if isinstance(activation, nn.Module):
        if kwargs:
            raise DualInputError(f"activation_kwargs {sorted(kwargs)} given beside an instance: configure the instance")
        return copy.deepcopy(activation)
    factory = _by_name(activation) if isinstance(activation, str) else activation
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:  # not callable, or a builtin such as torch.relu
        raise DualInputError(f"activation {activation!r}: {_WANTED}") from error
    if "num_channels" in parameters:
        kwargs.setdefault("num_channels", channels)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in kwargs.keys() - parameters.keys():
            raise unknown_name(f"argument of activation {activation!r}", name, parameters)
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if name not in kwargs and parameter.default is parameter.empty and parameter.kind not in optional:
            raise DualInputError(f"activation {activation!r} needs {name!r} (in activation_kwargs): {_WANTED}")
    module = factory(**kwargs)
    if not isinstance(module, nn.Module):
        raise DualInputError(f"activation {activation!r} returned {type(module).__name__}: {_WANTED}")
    return module


def _by_name(name: str) -> Callable[..., nn.Module]:
    if name in _TORCH:
        return getattr(nn, name)
    if "." in name:
        path, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise DualInputError(f"activation {name!r} cannot be imported: {error}") from error
    if name in available():
        return get_class(name)
    raise unknown_name("activation", name, [*_TORCH, *available()])
