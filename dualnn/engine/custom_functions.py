"""Custom ``torch.autograd.Function``s under duals: refuse them rather than be wrong.

``Function.apply`` passes duals straight to ``forward``, under ``no_grad``. The derivative that its author wrote in
``backward`` (a straight-through estimator, say) would be ignored, and the reverse graph of the result would be gone.
Torch offers no hook there, so ``apply`` is exchanged while a derivative is being computed (in `levels.fresh_level`).
Not watched are duals that a user builds by hand outside of one, and an ``apply`` that was bound to a name before
(``f = MyFunction.apply`` at the top of a module): there the forward code is what is differentiated.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.autograd import Function

from dualnn.engine.errors import UnsupportedOpError

_lock = threading.Lock()
_users = 0
_original: Any = Function.__dict__["apply"]


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    from dualnn.engine.dual_tensor import DualTensor  # levels, which imports this module, comes first

    # Torch 2.11's checkpoint saves its inputs through a function without a value: there is nothing to lose.
    if cls.__module__ == "torch.utils.checkpoint" and cls.__name__ == "_NoopSaveInputs":
        return _original.__get__(None, cls)(*args, **kwargs)
    duals = [a for a in (*args, *kwargs.values()) if isinstance(a, DualTensor)]
    # Torch's own (reentrant checkpoint, module hooks) compute what they wrap; only the reverse graph would be lost.
    ours = not cls.__module__.startswith("torch.")
    if duals and (ours or (torch.is_grad_enabled() and any(d.requires_grad for d in duals))):
        raise UnsupportedOpError(
            f"the custom autograd function {cls.__name__} met a DualTensor: the derivative in its backward cannot be "
            "used by a forward pass. Define it with dualnn.custom_dual (one definition for backward and duals), call "
            "its forward code directly, or checkpoint with use_reentrant=False."
        )
    return _original.__get__(None, cls)(*args, **kwargs)


def refuse_duals() -> None:
    """From now on (in any thread), ``Function.apply`` raises on duals: until `accept_duals` was called as often."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            Function.apply = classmethod(_apply)  # type: ignore[method-assign, assignment]


def accept_duals() -> None:
    """Take one `refuse_duals` back."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            Function.apply = _original  # type: ignore[method-assign]
