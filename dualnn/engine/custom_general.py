"""The `Linear` rule of one call of a general function with a push rule, made by `custom_dual`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge import floats
from dualnn.engine.bridge_linear import Once, is_float, linear
from dualnn.engine.errors import DualInputError, DualShapeError

ONCE = "its definition says order=1. Give a derivative in differentiable torch code and order=2."


class General:
    """One call of a general function: the `Linear` rule, and the structure of its result."""

    def __init__(
        self, name: str, function: Callable, push: Callable, vjp: Callable | None, order: int, batched: bool
    ) -> None:
        self.name, self.function, self.push_rule, self.vjp_rule = name, function, push, vjp
        self.order, self.batched = order, batched
        self.single = True  # one output, not a tuple; known once the function was called

    def rebuilt(self, out: tuple) -> Any:
        """A lone output as the function returns it."""
        return out[0] if self.single else out

    def value(self, *args: Any) -> tuple[Tensor, ...]:
        """The function's outputs, as a tuple."""
        return self._tuple(self.function(*args), "value")

    def _tuple(self, out: Any, what: str) -> tuple[Any, ...]:
        if what == "value":
            self.single = isinstance(out, Tensor)
        found = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        if what == "value" and not all(isinstance(y, Tensor) for y in found):
            raise DualInputError(f"{self.name} must return a tensor or a tuple of tensors, got {type(out).__name__}")
        return found

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> Sequence[Tensor | None]:
        """Every direction through the user's rule."""
        where = floats(primals)
        num = next(len(t) for t in tangents if t is not None)
        given = [
            t if t is not None else torch.zeros_like(primals[i]).unsqueeze(0).expand(num, *primals[i].shape)
            for i, t in ((i, tangents[i]) for i in where)
        ]
        if self.order > 1:
            return self._pushed(num, primals, given, out)
        count, outs = len(primals), len(out)

        def flat(*everything: Any) -> tuple[Tensor, ...]:
            found = self._pushed(num, everything[:count], everything[count + outs :], everything[count : count + outs])
            return tuple(f for f in found if f is not None)

        once = iter(linear(Once(f"the derivative of {self.name}", flat, ONCE, False), *primals, *out, *given))
        return [next(once) if is_float(y) else None for y in out]

    def _pushed(self, num: int, primals: tuple, given: Sequence[Tensor], out: tuple) -> list[Tensor | None]:
        where = floats(primals)
        if self.batched:
            # The K axis leads, in front of as many axes as the largest argument has.
            ndim = max(primals[i].dim() for i in where)
            given = [t.reshape(num, *(1,) * (ndim + 1 - t.dim()), *t.shape[1:]) for t in given]
            found = self._one(primals, given, out)
            return [self._fitting(t, (num, *y.shape)) if is_float(y) else None for t, y in zip(found, out, strict=True)]
        columns = [self._one(primals, [t[k] for t in given], out) for k in range(num)]
        return [torch.stack([c[i] for c in columns]) if columns and is_float(y) else None for i, y in enumerate(out)]

    def _one(self, primals: tuple, given: Sequence[Tensor], out: tuple) -> tuple[Any, ...]:
        tangents: list[Tensor | None] = [None] * len(primals)
        for i, t in zip(floats(primals), given, strict=True):
            tangents[i] = t
        found = self._tuple(self.push_rule(primals, tuple(tangents), self.rebuilt(out)), "push")
        if len(found) != len(out) or any(
            is_float(y) and not isinstance(t, Tensor) for t, y in zip(found, out, strict=False)
        ):
            raise DualShapeError(
                f"the push rule of {self.name} must return a tensor for each of its {len(out)} outputs, got "
                f"{', '.join(type(t).__name__ for t in found)}"
            )
        return found

    def _fitting(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """A pushed tangent in its output's shape (a rule may leave axes at length 1)."""
        if t.dim() != len(shape) or any(a not in (1, b) for a, b in zip(t.shape, shape, strict=True)):
            raise DualShapeError(
                f"the push rule of {self.name} returned a tangent of shape {tuple(t.shape)}, expected {tuple(shape)}"
                + (" (with batched=True the directions lead)" if self.batched else "")
            )
        return t.expand(tuple(shape))

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> Sequence[Tensor]:
        """The user's vjp rule, or the transpose of the push rule."""
        if self.order > 1:
            return self._pulled(primals, grads, out, wanted)
        count, outs = len(primals), len(out)

        def flat(*everything: Any) -> tuple[Tensor, ...]:
            return self._pulled(
                everything[:count], everything[count + outs :], everything[count : count + outs], wanted
            )

        return linear(Once(f"the derivative of {self.name}", flat, ONCE, False), *primals, *out, *grads)

    def _pulled(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> tuple[Tensor, ...]:
        where = floats(primals)
        if self.vjp_rule is not None:
            found = self._tuple(self.vjp_rule(primals, self.rebuilt(grads), self.rebuilt(out)), "vjp")
            if len(found) != len(where):
                raise DualShapeError(
                    f"the vjp rule of {self.name} returned {len(found)} gradients for {len(where)} floating point "
                    "arguments"
                )
            return tuple(found[where.index(i)] for i in wanted)

        def along(*tangents: Tensor) -> tuple[Tensor, ...]:
            given = [torch.zeros_like(primals[i]) for i in where]
            for i, t in zip(wanted, tangents, strict=True):
                given[where.index(i)] = t
            pushed = zip(self._one(primals, given, out), out, strict=True)
            return tuple(self._fitting(t, y.shape) for t, y in pushed if is_float(y))

        # The push is linear in the tangents, so its transpose is its reverse derivative, taken at any point.
        anywhere = [torch.zeros_like(primals[i]) for i in wanted]
        given = tuple(g for g, y in zip(grads, out, strict=True) if is_float(y))
        if self.order > 1:
            return torch.func.vjp(along, *anywhere)[1](given)
        # Plain autograd leaves the primals plain tensors, which a rule for order=1 may hand to numpy.
        with torch.enable_grad():
            leaves = [t.requires_grad_() for t in anywhere]
            total = sum(((y * g).sum() for y, g in zip(along(*leaves), given, strict=True)), leaves[0].new_zeros(()))
            return torch.autograd.grad(total, leaves, materialize_grads=True)
