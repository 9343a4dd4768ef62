"""Swap named submodules for exact local duals inside backprop, and back: weights, names and state_dict untouched.

The instance's ``forward`` is patched with an object of an importable class, so that a swapped module deep-copies (the
copy runs on its own weights) and pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dualnn.engine.names import matching
from dualnn.layers.held import refuse_unpicklable
from dualnn.layers.local import LocalCall


class LocalForward:
    """Stands in for a module's ``forward``: the same code, run on duals."""

    one_layer = True  # signals perturb its result as a whole

    def __init__(self, module: nn.Module, local: LocalCall) -> None:
        self.module, self.local = module, local
        self.before = module.__dict__.get("forward")

    def __getstate__(self) -> dict[str, Any]:
        refuse_unpicklable(f"The swapped {type(self.module).__name__}", {"forward": self.before})
        return vars(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on duals."""
        return self.local(self._run, self.module, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def swap_forward(
    module: nn.Module, where: Sequence[str], structure: str = "auto", tangents: int | None = None, seed: int = 0
) -> list[str]:
    """Let submodules run as exact local duals inside ordinary backprop.

    Args:
        module: Holds them.
        where: Names or globs of submodules.
        structure: This and the others as for `dualnn.layers.Dual`.
        tangents: K of a random estimate, where no exact structure fits.
        seed: Of its directions.

    Returns:
        The qualified names that were swapped; `restore_forward` undoes it.

    Raises:
        UnknownNameError: A pattern matches nothing; the nearest name is given.
    """
    chosen = matching(module, where)
    # A module inside a swapped one runs on duals already.
    outer = [n for n in chosen if not any(n.startswith(o + ".") for o in chosen)]
    for name in outer:
        if not isinstance(chosen[name].__dict__.get("forward"), LocalForward):
            chosen[name].forward = LocalForward(chosen[name], LocalCall(structure, tangents, seed=seed))  # type: ignore[method-assign]
    return outer


def restore_forward(module: nn.Module) -> None:
    """Undo `swap_forward` in a module and all its submodules."""
    for sub in module.modules():
        patch = sub.__dict__.get("forward")
        if isinstance(patch, LocalForward):
            del sub.__dict__["forward"]
            if patch.before is not None:
                sub.forward = patch.before  # type: ignore[method-assign]
