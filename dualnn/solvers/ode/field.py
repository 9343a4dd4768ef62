"""The right-hand side as the integrators see it: counted, checked, and linearised by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.factors import LU, same_shape
from dualnn.solvers.ode.mass import slope


class Counts:
    """What has been spent, on the whole batch."""

    def __init__(self) -> None:
        self.evaluations = self.jacobians = self.factorisations = 0


class Field:
    """``fn(t, y, *args)`` for times of the batch's shape, and the mass matrix in front of y'.

    Args:
        fn: The user's function.
        args: Its further arguments, behind the mass matrix if there is one.
        counts: Where evaluations are counted; None: they are not.
        weighted: Whether there is a mass matrix.
        jac: The user's Jacobian; None: the engine's.
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        args: Sequence[Any],
        counts: Counts | None = None,
        weighted: bool = False,
        jac: Callable[..., Tensor] | None = None,
    ) -> None:
        self.fn, self.args, self.weighted, self.jac = fn, tuple(args), weighted, jac
        self.counts = Counts() if counts is None else counts
        self.known: Any = None  # what `along` found out about the arguments
        self._seeds: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side at ``t: batch``, ``y: (*batch, n)``."""
        self.counts.evaluations += 1
        f = self._of(t, y)
        same_shape(f, y)
        return f

    def at(self, args: Sequence[Any]) -> Field:
        """The same for other values of the arguments, with the engine's Jacobian: for derivatives."""
        return Field(self.fn, args, weighted=self.weighted)

    @property
    def mass(self) -> Tensor | None:
        """The mass matrix, ``(n, n)`` or ``(*batch, n, n)``; None: the identity."""
        return self.args[0] if self.weighted else None

    def inertia(self, y: Tensor) -> Tensor:
        """The mass matrix or the identity."""
        mass = self.mass
        return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device) if mass is None else mass

    def weigh(self, x: Tensor) -> Tensor:
        """The mass matrix times ``x: (*lead, *batch, n)``."""
        mass = self.mass
        return x if mass is None else (x.unsqueeze(-2) @ mass.mT).squeeze(-2)

    def weigh_stages(self, z: Tensor) -> Tensor:
        """The mass matrix times each row of ``(*batch, stages, n)``."""
        mass = self.mass
        return z if mass is None else z @ mass.mT

    def slope(self, t: Tensor, y: Tensor, f: Tensor | None = None) -> Tensor:
        """The derivative of y in time; ``f``: the right-hand side, if it is known."""
        if self.mass is not None:
            return slope(self.mass, *self.linearise(t, y))
        return self(t, y) if f is None else f

    def _of(self, t: Tensor, y: Tensor) -> Tensor:
        return self.fn(t.unsqueeze(-1) if y.dim() > 1 else t, y, *self.args[self.weighted :])

    def linearise(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""``(f, f_y, f_t)`` by one dual pass.

        Shape:
            ``f: (*batch, n), f_y: (*batch, n, n), f_t: (*batch, n)``.
        """
        self.counts.jacobians += 1
        if self.jac is not None:
            return self._given(self.jac, t, y)
        in_t, in_y = self._directions(t, y)
        f, tan = push(self._of, (t, y), [Dense(in_t), Dense(in_y)])
        same_shape(f, y)
        columns: Any = dense_of(tan, f)
        return f, columns[:-1].movedim(0, -1), columns[-1]

    def _given(self, jac: Callable[..., Tensor], t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, tan = push(
            lambda t: self._of(t, y), (t,), [Dense(torch.ones((1, *t.shape), dtype=t.dtype, device=t.device))]
        )
        same_shape(f, y)
        slope: Any = dense_of(tan, f)
        found = jac(t.unsqueeze(-1) if y.dim() > 1 else t, y, *self.args[self.weighted :])
        if not isinstance(found, Tensor) or found.shape != (*y.shape, y.shape[-1]) or found.dtype != y.dtype:
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise StructureError(f"jac must return {y.dtype} {(*y.shape, y.shape[-1])}, got {got}")
        return f, found, slope[0]

    def factorise(self, matrix: Tensor) -> LU:
        """LU factors, counted."""
        self.counts.factorisations += 1
        return LU(matrix)

    def _directions(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._seeds is None or self._seeds[1].shape[1:] != y.shape:
            n, device = y.shape[-1], y.device
            in_y = torch.eye(n + 1, n, dtype=y.dtype, device=device).reshape(n + 1, *(1,) * (y.dim() - 1), n)
            in_t = torch.eye(n + 1, dtype=y.dtype, device=device)[n].reshape(n + 1, *(1,) * t.dim())
            self._seeds = in_t.expand(n + 1, *t.shape), in_y.expand(n + 1, *y.shape)
        return self._seeds
