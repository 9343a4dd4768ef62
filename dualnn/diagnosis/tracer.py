"""Watch every torch call of a run: where values leave the graph, what is overwritten, which line made which node."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dualnn.engine.dual_tensor import DualTensor

CutCause = Literal["inference_mode", "no_grad", "detach", "numpy", "no derivative", "copy", "item", "flat"]

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep  # not torchvision
_LEAVES = {"item": "item", "tolist": "item", "numpy": "numpy", "__array__": "numpy", "detach": "detach"}
_LEAVES |= {"detach_": "detach", "data": "detach", "tensor": "copy", "__dlpack__": "numpy"}
_NUMBERS = {"__float__", "__int__", "__bool__", "__complex__", "__index__", "__format__", "__repr__", "__contains__"}
#: A loop may cut at every step: more than this many cuts tell nothing new.
CUTS = 200
#: Ops whose derivative is zero wherever it exists.
FLAT_OPS = frozenset(
    "round floor ceil trunc fix sign sgn heaviside signbit floor_divide __floordiv__ bucketize searchsorted histc "
    "argmax argmin argsort gt ge lt le eq ne greater less greater_equal less_equal equal not_equal __gt__ __ge__ "
    "__lt__ __le__ __eq__ __ne__ isfinite isnan isinf logical_and logical_or logical_not logical_xor multinomial "
    "bernoulli long int short bool char byte nonzero count_nonzero".split()
)
AUGMENTED = frozenset("add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split())
#: Ops whose reverse derivative is not the derivative of the sample they draw.
SAMPLERS = frozenset({"_standard_gamma", "_sample_dirichlet", "binomial", "poisson"})


@dataclasses.dataclass(frozen=True)
class Place:
    """A line of somebody's source."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        """``file:line``, the file relative to the working directory where it lies below it."""
        if not self.file:
            return ""
        try:
            short = os.path.relpath(self.file)
        except ValueError:  # another drive
            short = self.file
        return f"{self.file if short.startswith('..') else short}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value that left the graph, or an op whose derivative vanishes."""

    cause: CutCause
    op: str
    place: Place
    module: str


@dataclasses.dataclass(frozen=True)
class Origin:
    """The torch call that made a node of autograd's graph."""

    op: str
    place: Place
    storages: frozenset[int]
    module: str = ""


NOWHERE = Origin("", Place(), frozenset())


def user_place() -> Place | None:
    """The innermost line outside torch and this package; None inside a custom autograd Function."""
    frame = sys._getframe(1)
    found: Place | None = None
    functions = _function_codes()
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code in functions:
            return None
        if file.startswith(_TORCH):
            if found is None and frame.f_code.co_name == "_call_impl":
                found = Place()  # the code of torch's own module: no user's line below it
        elif file.startswith(_HERE):
            if found is not None:
                break
            if not file.endswith("tracer.py"):
                return None  # the doctor's own work
        elif found is None and not file.startswith("<frozen"):
            found = Place(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return found or Place()


def _function_codes() -> set[Any]:
    """The code of the forward of every custom autograd Function: no graph is recorded in there, on purpose."""
    pending, codes = [torch.autograd.Function], set()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        forward = inspect.unwrap(getattr(cls.__dict__.get("forward"), "__func__", None) or cls.forward)
        codes.add(getattr(forward, "__code__", None))
    return codes


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors of any nesting of containers, dataclasses and packed sequences."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float)):
        return
    elif isinstance(value, dict) or (hasattr(value, "keys") and hasattr(value, "values")):
        for v in value.values():
            yield from tensors_in(v, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for v in value:
            yield from tensors_in(v, depth - 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), depth - 1)


def is_real(x: Any) -> bool:
    """Whether this is a tensor that the doctor differentiates in."""
    return isinstance(x, Tensor) and x.dtype.is_floating_point


class Tracer(TorchFunctionMode):
    """Records cuts and the ops of each module; with ``nodes=True`` also which call made which node.

    Args:
        module: Tells the name of the module that is running.
        nodes: Follow autograd's graph (slower).
    """

    def __init__(self, module: Callable[[], str] = str, nodes: bool = False) -> None:
        super().__init__()
        self.module, self.follow = module, nodes
        self.cuts: list[Cut] = []
        self.writes: list[Origin] = []
        self.ops: dict[str, set[str]] = {}
        self.nodes: dict[Any, Origin] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call and look at what came of it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = _name(func)
        given = [*tensors_in(args, 2), *tensors_in(kwargs, 2)]
        if any(isinstance(t, DualTensor) for t in given):
            return out  # inside one of our own layers: not ours to judge
        made = list(tensors_in(out, 2))
        leaves = name in _LEAVES or name in _NUMBERS
        if made or leaves:
            self.ops.setdefault(self.module(), set()).add(name)
        tracked = any(t.requires_grad for t in given if is_real(t))
        if tracked and (leaves or (made and (name in FLAT_OPS or not any(t.requires_grad for t in made)))):
            self._cut(name, made)
        if self.follow:
            self._follow(name, given, made)
        return out

    def _cut(self, name: str, made: list[Tensor]) -> None:
        cause: CutCause
        if name in FLAT_OPS or (made and not any(is_real(t) or t.is_complex() for t in made) and name not in _LEAVES):
            cause = "flat"
        elif name in _NUMBERS:
            cause = "item"
        elif name in _LEAVES:
            cause = _LEAVES[name]  # type: ignore[assignment]
        elif torch.is_inference_mode_enabled():
            cause = "inference_mode"
        else:
            cause = "no derivative" if torch.is_grad_enabled() else "no_grad"
        if len(self.cuts) >= CUTS or (made and all(t.numel() == 0 for t in made)):
            return
        if name.endswith("_like") or name.startswith("new_"):
            return  # only its shape is used
        place = user_place()
        if place is not None:
            self.cuts.append(Cut(cause, name, place, self.module()))

    def _follow(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        place = user_place() or Place()
        storages = frozenset(_storage(t) for t in made)
        origin = Origin(name, place, storages, self.module())
        if given and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or _augmented(name)):
            self.writes.append(Origin(name, place, frozenset({_storage(given[0])})))
            made = [*made, given[0]]
        self.claim(made, origin)

    def claim(self, made: Iterable[Tensor], origin: Origin = NOWHERE) -> None:
        """Ascribe the nodes behind results that nobody has claimed."""
        pending: list[Any] = [t.grad_fn for t in made if t.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node in self.nodes or type(node).__name__ == "AccumulateGrad":
                continue
            self.nodes[node] = origin
            pending += [n for n, _ in node.next_functions if n is not None]


def _augmented(name: str) -> bool:
    """Whether this is ``__iadd__`` or one of its kin."""
    return name.startswith("__i") and name.strip("_")[1:] in AUGMENTED


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapper tensors own none
        return 0


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):  # a property such as Tensor.data
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name
