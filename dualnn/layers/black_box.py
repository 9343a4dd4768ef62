"""`BlackBox`: numpy or scipy code inside a network, differentiated by differences or by a Jacobian of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualnn.engine.bridge import floats
from dualnn.engine.bridge_linear import Once, linear
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.layers.given_jacobian import (
    check_apart,
    check_arguments,
    check_output,
    check_structure,
    refuse_bad_numbers,
    sample_shape,
    with_jacobian,
)
from dualnn.layers.held import HoldsFunctions

STEP = float(np.finfo(np.float64).eps) ** (1 / 3)  # balances the h^2 of central differences and rounding, eps / h


class BlackBox(HoldsFunctions):
    r"""Call code that knows nothing of torch, and multiply by its local Jacobian in backward.

    The function takes and returns numpy arrays. Its Jacobian is given, or taken by central differences,

    .. math:: J_j = \frac{f(x + h e_j) - f(x - h e_j)}{2 h}, \qquad h = step \cdot \max(1, |x_j|),

    when it is needed, in float64 whatever the dtype of the data (error about 1e-10, relative to the scale of f, where f
    itself is good to 1e-16). Feature j of all samples is moved at once: 2 n calls of the function for n features (2 for
    each argument if it is elementwise), whatever the batch (``torch.func.vmap`` calls it for one sample after the
    other, unless it is elementwise). A probe (at the first call and every ``probe_every`` calls) checks that other
    samples do not move. Works under ``loss.backward()``, ``torch.func`` and with DualTensors.

    Why it exists: a call to scipy, a lookup table or a simulator cuts the graph: backprop goes on without it, silently.

    Args:
        fn: Function of numpy arrays (float64 for floating point tensors), which returns one array of floats. It gets
            copies, so it may work in place; it must be deterministic.
        structure: ``"block"``: the last dimension mixes, the leading ones are samples (a smaller argument is shared by
            them). ``"elementwise"``: output i depends on entry i of the broadcast arguments. ``"dense"``: everything
            may depend on everything, 2 calls for each input number.
        jacobian: Instead of differences: a function of the same numpy arguments, which returns the Jacobian in each
            floating point argument (one alone needs no tuple): ``(*out,)`` elementwise, ``(*out, n)`` block, ``(*out,
            *x.shape)`` dense. If it is an `nn.Module` (another `BlackBox`, say) it is called on tensors, and second
            derivatives differentiate it. `dualnn.gradcheck` tells whether it is right.
        step: Relative step of the differences (default 6e-6); larger for functions iterated to a tolerance.
        probe_every: See above.

    Shape:
        Block: x: (*batch, n) -> y: (*batch, *rest).

    Raises:
        StructureError: Wrong shape returned, or samples mix although the structure says that they do not.
        DualInputError: No floating point input, numbers that are not finite, a function that is not deterministic or
            returns no floats, differences that leave the function's domain.
        UnsupportedOpError: (in a second derivative) without an `nn.Module` as ``jacobian``.
        UnknownNameError: An unknown structure.

    Example:
        >>> import numpy as np
        >>> cosine = BlackBox(np.cos, structure="elementwise")
        >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> cosine(x).sum().backward()
        >>> x.grad
        tensor([ 0.0000, -0.8415])
    """

    def __init__(
        self,
        fn: Callable,
        structure: str = "block",
        jacobian: Callable | None = None,
        step: float | None = None,
        probe_every: int = 1000,
    ) -> None:
        super().__init__(fn)
        if jacobian is not None and not callable(jacobian):
            raise DualInputError(f"BlackBox: jacobian must be a function, got {jacobian!r}")
        if step is not None and not 0 < step < 1:
            raise DualInputError(f"BlackBox: step is relative and must lie between 0 and 1, got {step}")
        if probe_every < 1:
            raise DualInputError(f"BlackBox: probe_every must be at least 1, got {probe_every}")
        self.structure, self.jacobian = check_structure(structure), jacobian
        self.step, self.probe_every = STEP if step is None else step, probe_every
        self._calls = 0

    def extra_repr(self) -> str:
        """The function and how it is differentiated."""
        how = "differences" if self.jacobian is None else "jacobian given"
        return f"{self.label}, structure={self.structure!r}, {how}"

    # Numpy does not trace: one clean graph break instead.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function; keyword arguments reach it as they are and are not differentiated."""
        check_arguments(self.name, args)
        for key, given in kwargs.items():
            if isinstance(given, Tensor):
                raise DualInputError(f"{self.name}: the tensor {key}= is a keyword argument: pass it by position")

        def run(arrays: Sequence[Any]) -> np.ndarray:
            copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
            return self._floats(self.fn(*copies, **kwargs))

        def value(*plain: Any) -> Tensor:
            refuse_bad_numbers(self.name, plain)
            arrays = _arrays(plain)
            y = run(arrays)
            check_output(self.name, self.structure, plain, torch.Size(y.shape))
            if self._calls % self.probe_every == 0:
                self._probe(run, arrays, y)
            self._calls += 1
            return _tensor(y, plain)

        def jacobian(wanted: Sequence[int], *given: Any) -> Sequence[Tensor]:
            if isinstance(self.jacobian, nn.Module):
                found = self.jacobian(*given, **kwargs)
                return self._selected(found if isinstance(found, (tuple, list)) else (found,), wanted, given)
            once = Once(
                f"the Jacobian of {self.name}",
                lambda *plain: self._jacobians(run, wanted, plain, kwargs),
                "for second derivatives give jacobian= as a differentiable nn.Module, such as another BlackBox.",
                batched=self.structure == "elementwise",
            )
            return linear(once, *given)

        return with_jacobian(self.name, self.structure, value, jacobian, *args)

    def _floats(self, y: Any) -> np.ndarray:
        try:
            y = np.asarray(y)
        except ValueError as error:
            raise StructureError(f"{self.name} returned what is no array of numbers: {error}") from None
        if y.dtype.kind != "f":
            raise DualInputError(
                f"{self.name} returned {y.dtype} instead of floats: one array of a floating point dtype is needed. A "
                "decision (integers, booleans) has no derivative: use layers.Smoothed or layers.Surrogate."
            )
        return y.astype(np.float64)

    def _steps(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.step * np.maximum(1.0, np.abs(x)))

    def _probe(self, run: Callable, arrays: Sequence[Any], y: np.ndarray) -> None:
        again = run(arrays)
        if not np.array_equal(y, again, equal_nan=True):
            raise DualInputError(
                f"{self.name} is not deterministic: two calls at the same point differ by up to "
                f"{np.nanmax(np.abs(again - y)):.3g}, which differences would take for a derivative"
            )
        tensors = [torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for a in arrays]
        sizes = [torch.from_numpy(self._steps(arrays[i])) for i in floats(tensors)]

        def value(*moved: Any) -> Tensor:
            return torch.from_numpy(run([a.numpy() if isinstance(a, Tensor) else a for a in moved]))

        check_apart(self.name, self.structure, value, tensors, sizes, torch.from_numpy(y))

    def _jacobians(
        self, run: Callable, wanted: Sequence[int], plain: Sequence[Any], kwargs: dict
    ) -> tuple[Tensor, ...]:
        arrays = _arrays(plain)
        if self.jacobian is not None:
            copies = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
            found = self.jacobian(*copies, **kwargs)
            found = found if isinstance(found, (tuple, list)) else (found,)
            return tuple(self._selected([_tensor(self._floats(j), plain) for j in found], wanted, plain))
        batch = len(sample_shape(self.structure, plain))
        return tuple(_tensor(self._differences(run, arrays, i, batch), plain) for i in wanted)

    def _differences(self, run: Callable, arrays: list[Any], i: int, batch: int) -> np.ndarray:
        """The Jacobian in argument i, by columns."""
        x = arrays[i]
        steps = self._steps(x)

        def column(where: Any) -> np.ndarray:
            """Move the entries ``where`` of x."""
            up, down = x.copy(), x.copy()
            up[where] += steps[where]
            down[where] -= steps[where]
            change = run([*arrays[:i], up, *arrays[i + 1 :]]) - run([*arrays[:i], down, *arrays[i + 1 :]])
            width = up[where] - down[where]  # as rounded: not exactly 2 h
            if self.structure == "block":
                width = np.asarray(width).reshape(width.shape + (1,) * (change.ndim - batch))
            return change / width

        if self.structure == "elementwise":
            jac = column(...)
        else:
            places = range(x.shape[-1]) if self.structure == "block" else np.ndindex(x.shape)
            columns = [column((..., j) if self.structure == "block" else j) for j in places]
            own = x.shape[-1:] if self.structure == "block" else x.shape
            shape = columns[0].shape if columns else run(arrays).shape
            jac = np.stack(columns, -1).reshape(*shape, *own) if columns else np.zeros((*shape, *own))
        bad = int((~np.isfinite(jac)).sum())
        if bad:
            raise DualInputError(
                f"{self.name}: {bad} of {jac.size} differences in argument {i} are not finite: a step of "
                f"{self.step:.1e} leaves the function's domain. Give a smaller step= or a jacobian=."
            )
        return jac

    def _selected(self, found: Sequence[Any], wanted: Sequence[int], args: Sequence[Any]) -> list[Tensor]:
        """The wanted ones of the Jacobians that the user's function returned."""
        where = floats(args)
        if len(found) != len(where):
            raise StructureError(
                f"the jacobian of {self.name} returned {len(found)} arrays for {len(where)} floating point arguments"
            )
        samples = sample_shape(self.structure, args)
        picked = []
        for i in wanted:
            jac = found[where.index(i)]
            own = {"elementwise": (), "block": args[i].shape[-1:], "dense": args[i].shape}[self.structure]
            fits = jac.shape[: len(samples)] == samples and (not own or jac.shape[-len(own) :] == own)
            if not fits or (self.structure == "elementwise" and jac.shape != samples):
                expected = ", ".join(map(str, [*samples, *(["…"] if self.structure != "elementwise" else []), *own]))
                raise StructureError(
                    f"the jacobian of {self.name} in argument {i} has shape {tuple(jac.shape)}, expected ({expected})"
                )
            picked.append(jac)
        return picked


def _arrays(args: Sequence[Any]) -> list[Any]:
    """Numpy copies of the tensors, floats in float64; anything else as it is."""
    found = []
    for a in args:
        if isinstance(a, Tensor):
            a = a.detach().cpu()
            a = (a.double() if a.dtype.is_floating_point else a).numpy().copy()
        found.append(a)
    return found


def _tensor(y: np.ndarray, args: Sequence[Any]) -> Tensor:
    """A numpy result in the dtype and on the device of the arguments."""
    like = [args[i] for i in floats(args)]
    dtype = like[0].dtype
    for x in like[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.from_numpy(np.ascontiguousarray(y)).reshape(y.shape).to(like[0].device, dtype)
