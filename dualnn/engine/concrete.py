"""The plain numbers under duals and the wrappers of ``torch.func``, for decisions that depend on values."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch, _get_dispatch_mode, _TorchDispatchModeKey

from dualnn.engine.dual_tensor import primal_of


def concrete(x: Tensor) -> Tensor:
    """The plain numbers under duals and functorch wrappers (the first entry of a vmapped batch)."""
    x = primal_of(x)
    while _functorch.is_functorch_wrapped_tensor(x):
        dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else -1
        x = _functorch.get_unwrapped(x)
        if dim >= 0:
            x = x.select(dim, 0)
    return x.detach()


def traced() -> bool:
    """Whether a program is being recorded (`dualnn.compile`, make_fx): numbers only stand for others."""
    return _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
