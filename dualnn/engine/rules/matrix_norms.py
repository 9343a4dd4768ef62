"""``torch.linalg.norm``: what is a norm of entries goes to the vector norm, the rest to torch's reverse mode."""

from typing import Any

import torch
from torch import Tensor

from dualnn.engine.by_reverse import reverse_rule
from dualnn.engine.decompose import with_values
from dualnn.engine.registry import register

L = torch.linalg


def _entrywise(x: Tensor, ord: Any, dim: Any) -> tuple[Any, Any] | None:
    """``(ord, dim)`` of the vector norm that this is, or None."""
    if ord is None:
        return 2, dim
    one = isinstance(dim, int) or (isinstance(dim, (tuple, list)) and len(dim) == 1)
    if not isinstance(ord, str) and (one or (dim is None and x.dim() == 1)):
        return ord, dim
    return (2, dim) if ord == "fro" else None


def _rule(name: str, default: Any, default_dim: Any) -> None:
    op = getattr(L, name)

    def rule(func: Any, args: tuple, kwargs: dict) -> Tensor:
        named = dict(zip(("A", "ord", "dim", "keepdim"), args, strict=False)) | kwargs
        x = named["A"] if "A" in named else named["input"]
        found = _entrywise(x, named.get("ord", default), named.get("dim", default_dim))
        if found is None or named.get("dtype") is not None:
            return reverse_rule(func, args, kwargs)
        out = L.vector_norm(x, found[0], found[1], named.get("keepdim", False))
        return with_values(func, args, kwargs, out)

    register(op, rule=rule)


_rule("norm", None, None)
_rule("matrix_norm", "fro", (-2, -1))
