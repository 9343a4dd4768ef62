"""First derivatives of a right-hand side along given directions and in all of y, from one dual pass.

The derivative of an implicit step needs both, at the same stages: the Jacobian for its matrix, the directions for its
right-hand side. `solvers.implicit`, which nests, asks for them one after the other; here they share the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, count, split, top_level
from dualnn.engine.tangents import Dense, Tangent
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.ode.field import Field


class Along(NamedTuple):
    """A right-hand side whose arguments carry directions of one level, and nothing else.

    Attributes:
        level: Of the directions.
        num: How many.
        field: The right-hand side at the arguments' values.
        tangents: Of its arguments, behind n zeros for the Jacobian's directions; None for constants.
    """

    level: int
    num: int
    field: Field
    tangents: tuple[Tangent | None, ...]

    def linearise(self, t: Tensor, y: Tensor, dt: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`f_y` and :math:`f_y \dot y + f_t \dot t + f_p \dot p` at plain ``t``, ``y``.

        Shape:
            ``t: batch, y: (*batch, n), dt: (K, *batch), dy: (K, *batch, n) -> (*batch, n, n), (K, *batch, n)``.
        """
        n = y.shape[-1]
        rows = torch.eye(n, dtype=y.dtype, device=y.device).reshape(n, *(1,) * (y.dim() - 1), n).expand(n, *y.shape)
        in_t = None if dt is None else Dense(torch.cat([dt.new_zeros(n, *t.shape), dt.expand(len(dt), *t.shape)]))
        f, tan = push(
            lambda t, y, *args: self.field.at(args)(t, y),
            (t, y, *self.field.args),
            [in_t, Dense(torch.cat([rows, dy.expand(len(dy), *y.shape)])), *self.tangents],
        )
        columns: Any = dense_of(tan, f)
        return columns[:n].movedim(0, -1), columns[n:]


def along(field: Field, values: Sequence[Any], n: int) -> Along | None:
    """What the arguments carry, if that and ``values`` are duals of one level over plain tensors; else None.

    None as well where the mass matrix itself moves.
    """
    everything = (*values, *field.args)
    level = single(everything)
    if not level or isinstance(field.mass, DualTensor):
        return None
    if field.known is None:
        num = count(level, everything)
        parts = [split(a, level) for a in field.args]
        wide: list[Tangent | None] = []
        for value, tan in parts:
            rows = None if tan is None else tan.dense()
            wide.append(None if rows is None else Dense(torch.cat([rows.new_zeros(n, *value.shape), rows])))
        field.known = Along(level, num, field.at([v for v, _ in parts]), tuple(wide))
    return field.known


def single(values: Sequence[Any]) -> int:
    """The level of values that are duals of one level over plain tensors (or constants); else 0."""
    level = top_level(values)
    return level if level and all(_first(v, level) for v in values) else 0


def apart(x: Any, level: int, num: int) -> tuple[Tensor, Tensor]:
    """Value and directions, zeros where there are none."""
    value, tan = split(x, level)
    return value, value.new_zeros(num, *value.shape) if tan is None else tan.dense()


def _first(x: Any, level: int) -> bool:
    if not isinstance(x, DualTensor):
        return not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled())
    plain = not isinstance(x._primal, DualTensor) and (x._tan.is_zero or type(x._tan) is Dense)
    if not plain or x._level != level:
        return False
    inside = () if x._tan.is_zero else (x._tan.dense(),)
    return not any(
        isinstance(r, DualTensor) or (r.requires_grad and torch.is_grad_enabled()) for r in (x._primal, *inside)
    )
