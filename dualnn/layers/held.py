"""Functions that a layer holds: named and placed where they would stop a spawned process from starting."""

from __future__ import annotations

import functools
import multiprocessing.context
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from dualnn.engine.errors import DualInputError, UnpicklableError


class HoldsFunctions(nn.Module):
    """A module around a function of the user.

    It copies and pickles as they do. A process that is *spawned* gets the module by pickle, which finds a function by
    its name in its module: a lambda or a function within a function stops it, and is named here.

    Raises:
        UnpicklableError: While a process is being spawned, for a function that it could not find.

    Attributes:
        fn: The function.
        label: Its name.
        name: The layer and the function, for messages.
    """

    one_layer = True  # signals perturb its result as a whole

    def __init__(self, fn: Callable, wrapped: str = "a function") -> None:
        super().__init__()
        if not callable(fn):
            raise DualInputError(f"{type(self).__name__} wraps {wrapped}, got {fn!r}")
        self.fn = fn
        self.label = getattr(fn, "__name__", type(fn).__name__)
        self.name = f"{type(self).__name__}({self.label})"

    def __getstate__(self) -> Any:
        refuse_unpicklable(type(self).__name__, vars(self))
        return super().__getstate__()  # type: ignore[misc]


def refuse_unpicklable(owner: str, attributes: dict[str, Any]) -> None:
    """Raise for the first held function that a process being spawned could not find."""
    if multiprocessing.context.get_spawning_popen() is None:
        return  # a copy, or a pickler that may know how (cloudpickle, dill)
    for name, value in attributes.items():
        for fn in unpicklable(value):
            raise UnpicklableError(
                f"{owner} holds {described(fn)} as .{name}: a spawned process cannot find it by name. {CURE}"
            )


CURE = (
    "Define it with def at the top level of an importable module (its constants by functools.partial, or as attributes "
    "of a class with __call__), or start the processes by strategy='ddp' or 'ddp_fork'."
)


def unpicklable(value: Any) -> Iterator[types.FunctionType]:
    """The functions in a value (itself, in a partial or a bound method) that pickle cannot find by name.

    Example:
        >>> [fn.__name__ for fn in unpicklable(functools.partial(lambda x: x))], list(unpicklable(functools.reduce))
        (['<lambda>'], [])
    """
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from unpicklable(part)
    elif isinstance(value, types.MethodType):
        yield from unpicklable(value.__self__)
    elif isinstance(value, types.FunctionType) and not _found(value):
        yield value


def _found(fn: types.FunctionType) -> bool:
    try:
        return operator.attrgetter(fn.__qualname__)(sys.modules[fn.__module__]) is fn
    except (AttributeError, KeyError):
        return False


def described(fn: types.FunctionType) -> str:
    """Name and place of a function."""
    return f"{fn.__qualname__!r} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno})"


def unspawnable(held: Iterable[tuple[str, str, types.FunctionType]]) -> str:
    """The message on what `holders` found."""
    found = "; ".join(f"{name or 'the module itself'} holds {described(fn)} as .{a}" for name, a, fn in held)
    return f"no process could be spawned, because functions cannot be found by name there: {found}. {CURE}"


def holders(module: nn.Module) -> list[tuple[str, str, types.FunctionType]]:
    """Every function within a module that pickle cannot find: the submodule's name, its attribute, the function."""
    return [
        (name, attribute, fn)
        for name, sub in module.named_modules()
        for attribute, value in vars(sub).items()
        for fn in unpicklable(value)
    ]
