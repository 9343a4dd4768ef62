"""DualTensor: a value and K tangents that travel together through ordinary torch code.

The object is a `torch.Tensor` to the eye (shape, dtype, device, operators, every ``torch.*`` call). Calls arrive
in `__torch_function__`, which looks for a rule (`registry`), then re-runs the Python body of a composite function
so that its inner calls meet rules (`composite`), and otherwise raises. The
shell owns no storage: an op that slips past the rules reaches `__torch_dispatch__`, which raises as well, so a
tangent is never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.engine.errors import DualShapeError, StructureError, TangentLostError, UnsupportedOpError
from dualnn.engine.levels import user_level
from dualnn.engine.registry import RULES, rule_for
from dualnn.engine.tangents import Dense, PerSample, Tangent, Zero

if TYPE_CHECKING:
    from dualnn.engine.views import Memory


class DualTensor(Tensor):
    r"""A tensor :math:`x + \sum_k \varepsilon_k \dot x_k` with its K directional derivatives.

    Build one with `dualnn.dual`. Arithmetic and ``torch.*`` functions carry the tangents along; nothing is taped.

    Attributes:
        primal: The value, a Tensor (or a DualTensor of a lower level).
        tangent: The directions, ``(K, *primal.shape)``.
        num_tangents: K.
        level: Which nested derivative this dual belongs to.

    Example:
        >>> import torch, dualnn as dn
        >>> x = dn.dual(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> (x * x).tangent
        tensor([[2., 0.],
                [0., 4.]])
    """

    _primal: Tensor
    _tan: Tangent
    _level: int
    _memory: Memory | None = None  # what this dual shares with its views, or with what it is a view of

    @property
    def primal(self) -> Tensor:
        """The value."""
        return self._primal

    @property
    def tangent(self) -> Tensor:
        """The directions as one tensor ``(K, *shape)`` (zeros where the value does not depend on them)."""
        if self._tan.is_zero:
            return torch.zeros((self._tan.num, *self._primal.shape), dtype=self.dtype, device=self.device)
        return self._tan.given()

    @property
    def num_tangents(self) -> int:
        """Number of directions K."""
        return self._tan.num

    @property
    def level(self) -> int:
        """The level; operands of lower levels are constants to this dual."""
        return self._level

    # The metadata are read in almost every op: Python properties are several times cheaper than the C getters,
    # which would come through __torch_function__.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the value."""
        return self._primal.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of the value."""
        return self._primal.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of the value."""
        return self._primal.device

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Number of dimensions of the value."""
        return self._primal.dim()

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether autograd tracks the value or the tangents (reverse over forward)."""
        return self._primal.requires_grad or self._tan.requires_grad

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Send one torch call to its rule."""
        rule = RULES.get(func) or rule_for(func)
        return rule(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Iterable[type], args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        """Raise: an op reached the kernels without a rule, and would have dropped the tangents."""
        if str(func) in ("aten.detach.default", "aten.alias.default"):
            raise UnsupportedOpError(
                "torch.tensor(x), plain.new_tensor(x), torch.FloatTensor(x) or nn.Parameter(x) of a DualTensor x would "
                "copy its value and lose its tangents. Use x.clone() to keep them, x.detach() for the value alone."
            )
        raise UnsupportedOpError(
            f"{func} met a DualTensor without passing a dual rule. If this happened inside a custom C++ op or "
            "torch.compile, call it on .primal and .tangent, or wrap it with dualnn.layers.Dual."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DualTensor({self._primal!r}, num_tangents={self._tan.num}, level={self._level})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: D105
        raise UnsupportedOpError(
            "a DualTensor cannot be pickled or deep-copied: its level has no meaning outside the running "
            "derivative. Save .primal (and .tangent) instead."
        )

    def __deepcopy__(self, memo: Any) -> Any:  # noqa: D105
        return self.__reduce_ex__(4)

    def __hash__(self) -> int:  # noqa: D105
        return id(self)

    def backward(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Raise: a dual carries its derivatives forward."""
        raise UnsupportedOpError(
            "backward() was called on a DualTensor: its derivative is already there, in .tangent. For reverse over "
            "forward call .primal.backward() or .tangent.sum().backward(); to train, use dualnn.signals.signal_loss."
        )


_new_shell = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


def make(primal: Tensor, tan: Tangent, level: int) -> DualTensor:
    """Put a value and its tangent together (no checks: rules call this for every op)."""
    dtype = primal.dtype
    # Positional arguments (strides, storage offset, memory format, dtype, layout, device) parse faster than keywords.
    shell = _new_shell(DualTensor, primal.shape, None, None, None, dtype, torch.strided, primal.device)
    if isinstance(tan, Dense) and tan.data.dtype != dtype:
        # Autocast runs the value's op and the tangents' ops in dtypes of their own.
        if tan.data.dtype.is_complex and not primal.dtype.is_complex:
            raise UnsupportedOpError("an operation from complex to real numbers has a rule for real ones only")
        data = tan.data.to(primal.dtype)
        tan = PerSample(data, tan.batch) if isinstance(tan, PerSample) else Dense(data)
    elif tan.waits and tan.dtype != dtype:  # type: ignore[attr-defined]
        tan = Dense(tan.dense().to(dtype))
    shell._primal = primal
    shell._tan = tan
    shell._level = level
    return shell


def dual(primal: Tensor, tangent: Tensor) -> DualTensor:
    """Make a dual tensor from a value and its directions.

    Args:
        primal: The value, floating point or complex.
        tangent: ``(K, *primal.shape)``, or ``primal.shape`` for a single direction (K = 1).

    Returns:
        The dual; duals made in one context share a level and must share K.

    Raises:
        DualShapeError: The shapes, dtypes or devices disagree, or the value is an integer.

    Example:
        >>> import torch, dualnn as dn
        >>> y = torch.sin(dn.dual(torch.tensor(0.0), torch.tensor(1.0)))
        >>> float(y.tangent)
        1.0
    """
    tangent = checked_tangent(primal, tangent)
    if tangent.dim() == primal.dim():
        tangent = tangent.unsqueeze(0)
    below = [t._level for t in (primal, tangent) if isinstance(t, DualTensor)]
    return make(primal, seed(tangent), max([user_level(), *(level + 1 for level in below)]))


def seed(tangent: Tensor) -> Tangent:
    """The tangent of given directions ``(K, *shape)``; no directions at all are a structural zero."""
    return Dense(tangent) if tangent.shape[0] else Zero(0)


def checked_tangent(primal: Any, tangent: Any) -> Tensor:
    """Check that ``tangent`` fits ``primal``: ``(K, *shape)`` or ``shape``, with its dtype and device."""
    for name, value in (("primal", primal), ("tangent", tangent)):
        if not isinstance(value, Tensor):
            raise DualShapeError(f"the {name} must be a torch.Tensor, got {type(value).__name__}: {value!r}")
    if not (primal.dtype.is_floating_point or primal.dtype.is_complex):
        raise DualShapeError(f"a dual needs a floating point value, got {primal.dtype}: convert it with .float()")
    if tangent.shape != primal.shape and tangent.shape[1:] != primal.shape:
        raise DualShapeError(
            f"tangent of shape {tuple(tangent.shape)} does not fit a value of shape {tuple(primal.shape)}: it must "
            f"be (K, {', '.join(map(str, primal.shape))}) for K directions, or the value's own shape for one"
        )
    if tangent.dtype != primal.dtype or tangent.device != primal.device:
        raise DualShapeError(
            f"tangent is {tangent.dtype} on {tangent.device}, value is {primal.dtype} on {primal.device}: "
            "convert the tangent with tangent.to(primal)"
        )
    return tangent


def split(x: Any, level: int) -> tuple[Any, Tangent | None]:
    """Value and tangent of an operand at ``level`` (None where it does not depend on its directions)."""
    if isinstance(x, DualTensor) and x._level == level:
        return x._primal, None if x._tan.is_zero else x._tan
    return x, None


def top_level(args: Iterable[Any]) -> int:
    """The highest level among the operands (0 where none is dual); looks into lists and tuples."""
    level = 0
    for x in args:
        if isinstance(x, DualTensor):
            level = max(level, x._level)
        elif isinstance(x, (list, tuple)):
            level = max(level, top_level(x))
    return level


def count(level: int, args: Iterable[Any]) -> int:
    """Number of directions of the operands at ``level``; raises where they disagree."""
    tangents = [x._tan for x in pytree.tree_leaves(list(args)) if isinstance(x, DualTensor) and x._level == level]
    apart = [t.num for t in tangents if isinstance(t, PerSample)]
    found = {t.num for t in tangents if not (apart and t.is_zero)}  # zero directions are zero for each sample too
    if len(found) > 1:
        if apart:
            raise StructureError(
                "a value reduced over the batch meets one that still depends on every sample: samples mix before "
                "the loss, so there is no derivative per sample. Use per_sample=False."
            )
        raise DualShapeError(f"duals with different numbers of tangents meet in one op: K = {sorted(found)}")
    return found.pop()


def primal_of(x: Any) -> Any:
    """The plain tensor under all levels."""
    while isinstance(x, DualTensor):
        x = x._primal
    return x


def require_tangent(x: Any, level: int, what: str) -> DualTensor:
    """Return ``x`` as a dual of ``level`` with a tangent, or say what may have cut it."""
    if isinstance(x, DualTensor) and x._level == level and not x._tan.is_zero:
        return x
    raise TangentLostError(
        f"{what} carries no tangent: it does not depend on the perturbed values by differentiable operations. "
        "Likely causes: .detach(), .item() or .numpy() on the way; a loss made of argmax or comparisons; "
        "a new tensor built from numbers (torch.tensor(x)); or no parameter of the module is used."
    )
