r"""Functions whose local Jacobian is given as a function of its own: the common core of `BlackBox` and `Smoothed`.

A *structure* says which entries the Jacobian has, and so how it is laid out, pushed and pulled:

===============  ========================================================  =============================================
structure        meaning                                                   Jacobian in the argument ``x``
===============  ========================================================  =============================================
``elementwise``  output i depends on entry i of the broadcast arguments    ``(*out)``
``block``        the last dimension mixes; the leading ones are samples    ``(*batch, *rest, n)``, x: ``(*batch, n)``
``dense``        everything depends on everything                          ``(*out, *x.shape)``
===============  ========================================================  =============================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge import ClosedForm, elementwise, floats
from dualnn.engine.bridge_linear import Linear, linear, untouched
from dualnn.engine.errors import DualInputError, StructureError, unknown_name

STRUCTURES = ("elementwise", "block", "dense")
TOLERANCE = 1e-3  # of the largest effect: data-dependent stops move other samples by about their tolerance

Value = Callable[..., Tensor]
Jacobian = Callable[..., Sequence[Tensor]]  # jacobian(wanted, *args): those of the arguments at positions `wanted`


def check_structure(structure: str) -> str:
    """Return a known structure; raise with the nearest one otherwise."""
    if structure not in STRUCTURES:
        raise unknown_name("structure", structure, STRUCTURES)
    return structure


def check_arguments(name: str, args: Sequence[Any]) -> list[int]:
    """Positions of the differentiated arguments.

    Raises:
        DualInputError: There is none, or a complex one would lose its derivative.
    """
    for i, a in enumerate(args):
        if isinstance(a, Tensor) and a.dtype.is_complex:
            raise DualInputError(f"{name}: argument {i} is complex: pass its real and imaginary parts")
    where = floats(args)
    if not where:
        got = ", ".join(str(a.dtype) if isinstance(a, Tensor) else type(a).__name__ for a in args) or "nothing"
        raise DualInputError(f"{name} needs a floating point tensor to differentiate in, got {got}: use x.float()")
    return where


def refuse_bad_numbers(name: str, args: Sequence[Any]) -> None:
    """Raise where a plain argument holds numbers at which a function cannot be probed."""
    for i in floats(args):
        bad = ~torch.isfinite(args[i])
        if bad.any():
            first = tuple(bad.nonzero()[0].tolist())
            raise DualInputError(
                f"{name}: argument {i} holds {int(bad.sum())} numbers of {bad.numel()} that are not finite, the first "
                f"at {first}: there is nothing to evaluate around them"
            )


def sample_shape(structure: str, args: Sequence[Any]) -> torch.Size:
    """The axes along which entries do not mix, broadcast over the arguments."""
    shapes = [args[i].shape for i in floats(args)]
    if structure == "dense":
        return torch.Size()
    if structure == "block":
        if any(len(s) == 0 for s in shapes):
            raise DualInputError(
                "a block function mixes the last dimension, but an argument has none: use x.reshape(1)"
            )
        shapes = [s[:-1] for s in shapes]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise StructureError(f"the arguments' samples do not broadcast ({structure} structure): {error}") from None


def check_output(name: str, structure: str, args: Sequence[Any], shape: torch.Size) -> None:
    """Raise where an output's shape contradicts the structure."""
    samples = sample_shape(structure, args)
    if structure == "elementwise" and shape != samples:
        raise StructureError(
            f"{name}: an elementwise function of these arguments must return shape {tuple(samples)}, got "
            f"{tuple(shape)}. Use structure='block' where the last dimension mixes, 'dense' where everything does."
        )
    if structure == "block" and shape[: len(samples)] != samples:
        raise StructureError(
            f"{name}: a block function of these arguments must return a shape that starts with {tuple(samples)}, one "
            f"row for each sample, got {tuple(shape)}. Use structure='dense' where samples mix."
        )


def check_apart(
    name: str, structure: str, value: Value, args: Sequence[Any], sizes: Sequence[float | Tensor], y: Tensor
) -> None:
    """Probe the claimed structure: move every second sample; the outputs of the others must stay.

    Args:
        name: For the message.
        structure: ``"elementwise"`` or ``"block"`` (``"dense"`` claims nothing).
        value: The function of plain tensors.
        args: Plain arguments.
        sizes: By how much to move each differentiated argument.
        y: ``value(*args)``.

    Raises:
        StructureError: Samples mix.
    """
    samples = sample_shape(structure, args)
    if samples.numel() < 2 or not y.numel():
        return
    # Scattered, not alternating: a coupling of neighbours and one of all entries show alike.
    mask = (torch.arange(samples.numel(), device=y.device) * 2654435761 % 4294967296 < 2147483648).reshape(samples)
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    moved = list(args)
    for i, size in zip(floats(args), sizes, strict=True):
        own = args[i].shape[:-1] if structure == "block" else args[i].shape
        if own == samples:
            m = mask.unsqueeze(-1) if structure == "block" else mask
            moved[i] = args[i] + size * m
    change = (value(*moved) - y).abs().reshape(*samples, -1)
    still, effect = change[~mask], change[mask]
    finite = still[torch.isfinite(still)]
    reach = float(effect[torch.isfinite(effect)].max()) if torch.isfinite(effect).any() else 0.0
    most = float(finite.max()) if len(finite) else 0.0
    if most > TOLERANCE * reach:
        what = "entries" if structure == "elementwise" else "samples"
        wider = "'block' or 'dense'" if structure == "elementwise" else "'dense'"
        raise StructureError(
            f"{name}: moving half of the {what} moved the outputs of the others by {most:.3g}, so the structure is not "
            f"{structure!r} (or the function is random). Use structure={wider}."
        )


@dataclasses.dataclass
class _Block:
    """Push and pull by one matrix for each sample."""

    name: str
    function: Value
    jacobian: Jacobian
    batched: bool

    def value(self, *args: Any) -> tuple[Tensor]:
        return (self.function(*args),)

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> tuple[Tensor]:
        present = [i for i, t in enumerate(tangents) if t is not None]
        y, batch = out[0], len(sample_shape("block", primals))
        rest = y.shape[batch:].numel()
        total: Any = 0
        for i, jac in zip(present, self.jacobian(present, *primals), strict=True):
            t = tangents[i]
            t = t.reshape(t.shape[0], *(1,) * (batch + 2 - t.dim()), *t.shape[1:], 1)
            total = total + jac.reshape(*jac.shape[:batch], rest, jac.shape[-1]) @ t  # (K, *batch, rest, 1)
        return (total.reshape(len(tangents[present[0]]), *y.shape),)

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> list[Tensor]:
        batch = len(sample_shape("block", primals))
        rows = grads[0].reshape(*grads[0].shape[:batch], 1, grads[0].shape[batch:].numel())
        pulled = []
        for i, jac in zip(wanted, self.jacobian(wanted, *primals), strict=True):
            g = rows @ jac.reshape(*jac.shape[:batch], rows.shape[-1], jac.shape[-1])
            pulled.append(g.squeeze(-2).sum_to_size(primals[i].shape))
        return pulled


@dataclasses.dataclass
class _Dense:
    """Push and pull by the whole matrix."""

    name: str
    function: Value
    jacobian: Jacobian
    batched: bool = False

    def value(self, *args: Any) -> tuple[Tensor]:
        return (self.function(*args),)

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> tuple[Tensor]:
        present = [i for i, t in enumerate(tangents) if t is not None]
        y = out[0]
        total: Any = 0
        for i, jac in zip(present, self.jacobian(present, *primals), strict=True):
            columns = jac.reshape(y.numel(), primals[i].numel())
            total = total + tangents[i].reshape(len(tangents[i]), primals[i].numel()) @ columns.mT
        return (total.reshape(len(tangents[present[0]]), *y.shape),)

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> list[Tensor]:
        row = grads[0].reshape(1, -1)
        return [
            (row @ jac.reshape(row.shape[1], primals[i].numel())).reshape(primals[i].shape)
            for i, jac in zip(wanted, self.jacobian(wanted, *primals), strict=True)
        ]


def with_jacobian(
    name: str, structure: str, function: Value, jacobian: Jacobian, *args: Any, batched: bool = False
) -> Tensor:
    """Apply a function with a given Jacobian, differentiably in every mode.

    Args:
        name: For messages.
        structure: One of `STRUCTURES`.
        function: The value, by any code; called on plain tensors.
        jacobian: ``jacobian(wanted, *args)``: the Jacobian in each argument of the positions ``wanted``. It is called
            on tensors and DualTensors, and differentiated for second derivatives.
        *args: The arguments.
        batched: A block function takes any number of leading axes in all arguments: ``torch.func.vmap`` calls it once.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> with_jacobian("square", "elementwise", torch.square, lambda wanted, x: [2 * x], x).sum().backward()
        >>> x.grad
        tensor([2., 4.])
    """
    if structure != "elementwise":
        rule: Linear = (
            _Block(name, function, jacobian, batched) if structure == "block" else _Dense(name, function, jacobian)
        )
        return linear(rule, *args)[0]

    def value(*plain: Any) -> Tensor:
        return untouched(name, lambda *a: (function(*a),), plain)[0]

    return elementwise(ClosedForm(value, lambda y, *given: jacobian(floats(given), *given)), *args)
