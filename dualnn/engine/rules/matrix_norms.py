"""``torch.linalg.norm``: norms of entries are vector norms, norms of singular values go to `spectra`.

Through the singular values the second derivatives at repeated ones are nan with a warning, as those of ``svdvals`` are;
torch's reverse mode would leave the nan unexplained. The rest (sums of rows or columns) is torch's reverse mode's.
"""

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


def _of_singular_values(x: Tensor, ord: Any, dim: Any, keepdim: bool) -> Tensor | None:
    """The norms that are functions of the singular values, or None."""
    if ord not in ("nuc", 2, -2):
        return None
    rows, columns = (d % x.dim() for d in ((-2, -1) if dim is None else dim))
    values = L.svdvals(x.movedim((rows, columns), (-2, -1)))
    out = values.sum(-1) if ord == "nuc" else values.amax(-1) if ord == 2 else values.amin(-1)
    for d in sorted((rows, columns)) if keepdim else ():
        out = out.unsqueeze(d)
    return out


def _rule(name: str, default: Any, default_dim: Any) -> None:
    op = getattr(L, name)

    def rule(func: Any, args: tuple, kwargs: dict) -> Tensor:
        named = dict(zip(("A", "ord", "dim", "keepdim"), args, strict=False)) | kwargs
        x = named["A"] if "A" in named else named["input"]
        ord, dim, keepdim = named.get("ord", default), named.get("dim", default_dim), named.get("keepdim", False)
        out = None
        if named.get("dtype") is None and named.get("out") is None:
            found = _entrywise(x, ord, dim)
            out = _of_singular_values(x, ord, dim, keepdim) if found is None else L.vector_norm(x, *found, keepdim)
        return reverse_rule(func, args, kwargs) if out is None else with_values(func, args, kwargs, out)

    register(op, rule=rule)


_rule("norm", None, None)
_rule("matrix_norm", "fro", (-2, -1))
