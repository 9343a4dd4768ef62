"""Submodules by name or glob, with the nearest choice where nothing matches."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from dualnn.engine.errors import unknown_name


def matching(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Submodules whose qualified names match one of ``patterns``, in the module's order.

    Raises:
        UnknownNameError: A pattern matches nothing.
    """
    names = {name: sub for name, sub in module.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise unknown_name("submodule", pattern, names)
        found.update(hits)
    return {name: sub for name, sub in names.items() if name in found}
