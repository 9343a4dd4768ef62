"""`custom_dual`: one definition of a function and its derivative, for every way in which it may be differentiated."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.bridge import ClosedForm, elementwise, floats
from dualnn.engine.bridge_linear import Once, linear, untouched
from dualnn.engine.custom_general import ONCE, General
from dualnn.engine.dual_tensor import DualTensor
from dualnn.engine.errors import DualInputError, DualnnError, DualShapeError, StructureError
from dualnn.engine.gradcheck import FIRST, SECOND, GradcheckError, gradcheck


class CustomDual:
    """A function that brings its own derivative: what `custom_dual` returns. Call it as the function.

    Attributes:
        name: The function's name.
        order: How often it can be differentiated: 1, or any number of times (2).
    """

    def __init__(
        self,
        value: Callable,
        partials: Callable | None,
        push: Callable | None,
        vjp: Callable | None,
        order: int,
        batched: bool,
    ) -> None:
        functools.update_wrapper(self, value)
        self.__qualname__ = getattr(value, "__qualname__", type(value).__name__)
        self.name = getattr(value, "__name__", type(value).__name__)
        self.value, self.partials, self.push, self.vjp = value, partials, push, vjp
        self.order, self.batched = order, batched
        try:
            self._signature: inspect.Signature | None = inspect.signature(value)
        except ValueError:  # most of torch's built-in functions have none
            self._signature = None
        if self._signature is not None:
            named = [p.name for p in self._signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
            if named:
                raise DualInputError(
                    f"custom_dual: {self.name} has keyword-only parameters ({', '.join(named)}), which its derivative "
                    "rule would not see: make them positional"
                )
        self._local = ClosedForm(self._checked_value, self._checked_partials)

    def __repr__(self) -> str:
        return f"<custom_dual {self.name}, {'elementwise' if self.partials else 'general'}, order={self.order}>"

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: D105
        # A decorated function stands in the place of the function itself: pickle it by that name.
        owner: Any = sys.modules.get(self.__module__)
        for part in self.__qualname__.split("."):
            owner = getattr(owner, part, None)
        return self.__qualname__ if owner is self else super().__reduce_ex__(protocol)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if torch.compiler.is_compiling():
            # The engine does not trace: a clean graph break instead. Decorating with `disable` would do, but loads the
            # compiler (two seconds) at every import of this package.
            return torch.compiler.disable(self._call)(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        args = self._bound(args, kwargs)
        for i, a in enumerate(args):
            if isinstance(a, (list, tuple, dict)) and any(isinstance(x, Tensor) for x in _flat(a)):
                raise DualInputError(
                    f"{self.name}: argument {i} is a {type(a).__name__} of tensors: pass them one by one"
                )
            if isinstance(a, Tensor) and a.dtype.is_complex and (isinstance(a, DualTensor) or a.requires_grad):
                raise DualInputError(
                    f"{self.name}: argument {i} is complex, its derivative would be lost: pass real parts"
                )
        if self.partials is not None:
            if not floats(args):
                return self.value(*args)
            return elementwise(self._local, *args)
        assert self.push is not None
        call = General(self.name, self.value, self.push, self.vjp, self.order, self.batched)
        return call.rebuilt(linear(call, *args))

    def _bound(self, args: tuple, kwargs: dict) -> tuple:
        if self._signature is None:
            if kwargs:
                raise DualInputError(f"{self.name} has no signature: pass {', '.join(kwargs)} by position")
            return args
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    # Elementwise functions

    def _checked_value(self, *args: Any) -> Tensor:
        return untouched(self.name, self._value_of, args)[0]

    def _value_of(self, *args: Any) -> tuple[Tensor]:
        y = self.value(*args)
        shape = torch.broadcast_shapes(*(args[i].shape for i in floats(args)))
        if not isinstance(y, Tensor) or y.shape != shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise StructureError(
                f"{self.name} is defined by partials, so it is elementwise and must return shape {tuple(shape)}, got "
                f"{got}. Define it by push where outputs depend on several inputs."
            )
        return (y,)

    def _checked_partials(self, y: Tensor, *args: Any) -> Sequence[Tensor]:
        if self.order == 1:
            once = Once(f"the derivative of {self.name}", self._partials_of, ONCE, batched=True)
            return linear(once, y, *args)
        return self._partials_of(y, *args)

    def _partials_of(self, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
        assert self.partials is not None
        found = self.partials(y, *args)
        found = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        where = floats(args)
        if len(found) != len(where):
            raise StructureError(
                f"partials of {self.name} returned {len(found)} derivatives for {len(where)} floating point arguments"
            )
        tensors = []
        for i, p in zip(where, found, strict=True):
            if isinstance(p, (int, float)):
                p = torch.full((), float(p), dtype=args[i].dtype, device=args[i].device)
            if not isinstance(p, Tensor) or not all(
                a in (1, b) for a, b in zip(reversed(p.shape), reversed(y.shape), strict=False)
            ):
                got = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
                raise DualShapeError(
                    f"partial {i} of {self.name} is {got}, which does not broadcast to {tuple(y.shape)}"
                )
            tensors.append(p)
        return tuple(tensors)

    # Definition

    def verify(self, samples: Sequence[Any] | None = None) -> None:
        """Check the derivative against finite differences, in every mode.

        Args:
            samples: Argument tuples to check at (a tensor for a single argument). None: random ones.

        Raises:
            GradcheckError: It is wrong, or a mode fails.
            DualInputError: No samples were given, and the function accepts none of the random ones.
        """
        modes = FIRST if self.order == 1 else (*FIRST, *SECOND)
        for sample in self._samples() if samples is None else samples:
            report = gradcheck(self, sample, modes=modes, raise_exception=False, entries=6)
            failed = [v for v in report.verdicts if v.status == "unsupported"]
            if not report or failed:
                advice = ""
                if report and all(v.mode in SECOND for v in failed):
                    advice = "\nFor a derivative that is not differentiable torch code itself, say order=1."
                raise GradcheckError(
                    f"custom_dual: the derivative given for {self.name} does not hold.\n{report}{advice}"
                )

    def _samples(self) -> list[tuple[Tensor, ...]]:
        """Random arguments that the function accepts."""
        rule = self.value if self._signature is not None else self.partials or self.value
        try:
            parameters = inspect.signature(rule).parameters.values()
        except ValueError:
            raise self._no_samples("it has no signature") from None
        if any(p.kind == p.VAR_POSITIONAL for p in parameters):
            raise self._no_samples("it takes any number of arguments")
        number = sum(p.default is p.empty for p in parameters) - (rule is not self.value)
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...], low: float, high: float) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low

        if self.partials is not None:
            shapes = [((2, 2), (2,), ())[min(i, 2)] for i in range(number)]
            drawn = [tuple(draw(s, low, high) for s in shapes) for low, high in ((0.2, 0.9), (-2.0, 2.0))]
        else:
            square = tuple(draw((3, 3), -1.0, 1.0) + 2 * torch.eye(3, dtype=torch.float64) for _ in range(number))
            drawn = [square, tuple(draw((3,), 0.2, 0.9) for _ in range(number))]
        accepted, why = [], "its value is not finite there"
        for sample in drawn:
            try:
                with torch.no_grad():
                    out = _flat(self.value(*(t.clone() for t in sample)))
            except DualnnError:
                raise
            except Exception as error:  # a trial: what the function does not take is told below if it takes nothing
                why = f"it raised {type(error).__name__}: {error}"
                continue
            if all(torch.isfinite(y).all() for y in out if isinstance(y, Tensor)):
                accepted.append(sample)
                if self.push is not None:
                    break  # a rule for matrices need not hold for vectors
        if not accepted:
            raise self._no_samples(why)
        return accepted

    def _no_samples(self, why: str) -> DualInputError:
        return DualInputError(
            f"custom_dual could not make arguments to check {self.name} with ({why}): give samples=[(x, …), …], or "
            "check=False"
        )


def _flat(x: Any) -> list[Any]:
    return pytree.tree_leaves(x)


def custom_dual(
    value: Callable | None = None,
    *,
    partials: Callable | None = None,
    push: Callable | None = None,
    vjp: Callable | None = None,
    order: int = 2,
    batched: bool = False,
    samples: Sequence[Any] | None = None,
    check: bool = True,
) -> Any:
    r"""Give a function its derivative once; it then works in every mode.

    ``loss.backward()``, double backward, ``torch.func`` (grad, jvp, vmap) and DualTensors of any level. Use it as a
    decorator or as a function. What ``value`` does inside (numpy, in-place work, ``no_grad``) does not matter; the
    derivative is either of

    - ``partials(y, *args)``, for an elementwise function of broadcasting arguments: :math:`\partial y/\partial x_i` for
      each floating point argument (one alone needs no tuple);
    - ``push(primals, tangents, out)``, for any function: :math:`\dot y = J \dot x`, linear in the tangents and made of
      torch code on them. ``tangents`` has a tensor in the shape of each floating point argument (zeros where it is
      constant), None for the others. Return one for each output. Backward transposes it, unless ``vjp(primals, grads,
      out)`` says how: one gradient for each floating point argument.

    Both are plain torch code, which is differentiated again for higher orders.

    Args:
        value: The function, of positional arguments; returns a tensor, or with ``push`` also a tuple of tensors. It
            must not change its arguments.
        partials: See above.
        push: See above.
        vjp: See above; only with ``push``.
        order: 2: differentiable any number of times. 1: the derivative is not itself differentiable torch code (numpy,
            loops under ``no_grad``); differentiating it raises instead of returning zeros.
        batched: The leading axes of all arguments are batch axes, and ``push`` also takes tangents with one more axis
            in front (K directions at once; tangents of smaller arguments have axes of length 1 behind it). Faster:
            otherwise it is called once for each direction, and under ``vmap`` once for each sample.
        samples: Argument tuples at which to check the derivative on definition. None: random ones, in (0.2, 0.9) and
            (-2, 2) where the function is finite; for ``push`` 3 x 3 matrices, or else vectors of 3.
        check: Compare with finite differences on definition (some milliseconds).

    Returns:
        The function, as a `CustomDual`; a decorator if ``value`` is not given.

    Raises:
        GradcheckError: The derivative is wrong (on definition; the message is `gradcheck`'s report).
        DualInputError: The definition is incomplete, or arguments to check with cannot be made.
        UnsupportedOpError: (from a call) a second derivative with ``order=1``.

    Example:
        >>> import torch, dualnn as dn
        >>> @dn.custom_dual(partials=lambda y, x: 1 - y * y)
        ... def my_tanh(x):
        ...     return torch.from_numpy(__import__("numpy").tanh(x.numpy()))
        >>> x = torch.tensor([0.5], requires_grad=True)
        >>> my_tanh(x).backward()
        >>> round(float(x.grad), 4)
        0.7864
        >>> inverse = dn.custom_dual(torch.inverse, push=lambda p, t, y: -y @ t[0] @ y, samples=[torch.eye(2) * 2])
        >>> float(dn.jvp(inverse, (torch.tensor([[4.0]]),), (torch.tensor([[1.0]]),))[1])
        -0.0625
    """
    if (partials is None) == (push is None):
        raise DualInputError("custom_dual needs one of partials= (elementwise) and push= (any function)")
    if vjp is not None and push is None:
        raise DualInputError("custom_dual: vjp= goes with push=; an elementwise function needs only partials=")
    if order not in (1, 2):
        raise DualInputError(f"custom_dual: order must be 1 or 2 (2: any number of times), got {order!r}")

    def define(function: Callable) -> CustomDual:
        if not callable(function):
            raise DualInputError(f"custom_dual wraps a function, got {function!r}")
        made = CustomDual(function, partials, push, vjp, order, batched)
        if check:
            with torch.inference_mode(False), torch.enable_grad():
                made.verify(samples)
        return made

    return define if value is None else define(value)


__all__ = ["CustomDual", "custom_dual"]
