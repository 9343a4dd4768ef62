"""Activations with exact derivatives where backprop has none: `get("kepler")` is a module that just trains.

One activation a file. Every module of this folder is imported here, so a new file that registers a class is
available by name and meets the standard tests without another line anywhere.

Example:
    >>> import torch, dualnn as dn
    >>> dn.activations.get("implicit_tanh", a=2.0)(torch.zeros(2))
    tensor([0., 0.], grad_fn=...)
"""

import importlib
import pkgutil

from dualnn.activations.base import Activation
from dualnn.activations.registry import available, get, get_class, register

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")

# Classes by their own names too (dualnn.activations.Kepler), for LightningCLI's class_path.
globals().update({get_class(_name).__name__: get_class(_name) for _name in available()})

__all__ = ["Activation", "available", "get", "get_class", "register"]
