"""Local derivatives of a cell's step, all of them in one pass on duals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import Separate, Tangent
from dualnn.engine.transforms import push

Parts = list[list[Tensor | None]]


def partials(fn: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> Parts:
    """Partial derivatives of every output in every argument, of a function that works entry by entry.

    One direction an argument, each kept apart: an intermediate costs as many products as it has arguments.

    Args:
        fn: Elementwise function of broadcasting tensors, which returns several.
        args: Its arguments.

    Returns:
        For each output a row with an entry for each argument, of the broadcast shape; None where it does not depend on
        it.

    Raises:
        StructureError: An output does not have the arguments' broadcast shape.

    Example:
        >>> x, w = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
        >>> partials(lambda x, w: (x * w, x.sin()), (x, w))[0]
        [tensor([3., 3.]), tensor([1., 2.])]
    """
    shape = torch.broadcast_shapes(*(a.shape for a in args))
    zero = args[0].new_zeros(())
    seeds: list[Tangent | None] = [Separate(len(args), {k: 1.0}, a.shape, zero) for k, a in enumerate(args)]
    values, pushed = push(lambda *a: tuple(fn(*a)), args, seeds)
    rows: Parts = []
    for value, tan in zip(values, pushed, strict=True):
        if value.shape != shape:
            raise StructureError(f"a cell's step must keep the shape {tuple(shape)}, got {tuple(value.shape)}")
        if tan is None or tan.is_zero:
            rows.append([None] * len(args))
        elif isinstance(tan, Separate):
            rows.append([tan.part(k) if k in tan.parts else None for k in range(len(args))])
        else:
            rows.append(list(tan.dense().unbind(0)))
    return rows
