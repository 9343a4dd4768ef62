"""Activations by name."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from dualnn.activations.base import Activation
from dualnn.engine.errors import DualnnError, unknown_name

_REGISTRY: dict[str, type[Activation]] = {}

Class = TypeVar("Class", bound=type[Activation])


def register(name: str) -> Callable[[Class], Class]:
    """Class decorator: make an Activation available as `get(name)`.

    Raises:
        DualnnError: the name is taken.

    Example:
        >>> from dualnn.activations.kepler import Kepler
        >>> register("kepler")(Kepler) is Kepler  # the same class again is no clash
        True
    """

    def decorate(cls: Class) -> Class:
        taken = _REGISTRY.get(name)
        if taken is not None and taken is not cls:
            raise DualnnError(
                f"activation {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                f"choose another name for {cls.__module__}.{cls.__qualname__}"
            )
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return decorate


def available() -> list[str]:
    """The registered names, sorted.

    Example:
        >>> "kepler" in available()
        True
    """
    return sorted(_REGISTRY)


def get_class(name: str) -> type[Activation]:
    """The class registered as `name`.

    Raises:
        UnknownNameError: no such name; the message lists the choices and the nearest one.

    Example:
        >>> get_class("kepler").__name__
        'Kepler'
    """
    if name not in _REGISTRY:
        raise unknown_name("activation", name, _REGISTRY)
    return _REGISTRY[name]


def get(name: str, **options: Any) -> Activation:
    """Make the activation registered as `name`.

    Args:
        name: One of `available()`.
        options: Arguments of its class.

    Raises:
        UnknownNameError: no activation of that name, or it takes no argument of that name.

    Example:
        >>> get("kepler", num_channels=8)
        Kepler(num_channels=8, margin=0.001)
    """
    cls = get_class(name)
    accepted = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    for option in options:
        if option not in accepted:
            raise unknown_name(f"argument of activation {name!r}", option, accepted)
    return cls(**options)
