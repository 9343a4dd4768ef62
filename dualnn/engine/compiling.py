"""`compile`: a function of duals as one program of plain torch operations, handed to ``torch.compile``.

DualTensors are taken apart at the door: the function is run once on duals whose parts are recorded, so what remains is
a program of plain operations on values and tangents, which inductor fuses. One program is kept for every combination of
shapes, dtypes, devices and constants.

What a program cannot do runs eagerly instead, with the reason in one warning: control flow that depends on numbers,
random operations, and arguments that somebody else differentiates (autograd, ``torch.func``, a second level of duals).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, make, top_level
from dualnn.engine.errors import CompileFallbackWarning, DualInputError
from dualnn.engine.levels import fresh_level
from dualnn.engine.parameters import swapped
from dualnn.engine.tangents import Dense, Zero
from dualnn.engine.untraced import untraced

MANY = 16
Backend = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]


def compile(
    fn: Callable,
    *,
    backend: str | Backend = "inductor",
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compile a function of tensors and DualTensors.

    Results equal those of the eager function to rounding. Worth its price (seconds to a minute for each set of shapes)
    where one small step runs many times: the inside of a solver, a recurrent cell.

    Args:
        fn: The function, or a module: parameters and buffers of a module, or of the module that a method belongs to,
            are inputs of the program, so that an optimizer's step and a replaced parameter are seen. Other tensors that
            ``fn`` captures are those of the first call.
        backend: Of ``torch.compile``; or a function of the recorded graph of aten operations and its inputs, which
            returns a function of such inputs.
        options: For the backend.

    Returns:
        A function with the same arguments and results. ``.programs`` counts what has been compiled, ``.reason`` says
        why the last call ran eagerly, if it did.

    Example:
        >>> import torch, dualnn as dn
        >>> step = dn.compile(lambda x: torch.tanh(0.9 * x), backend="eager")
        >>> step(dn.dual(torch.zeros(3), torch.ones(3))).tangent
        tensor([[0.9000, 0.9000, 0.9000]])
    """
    return Compiled(fn, backend, options)


class Compiled:
    """What `compile` returns."""

    def __init__(self, fn: Callable, backend: str | Backend, options: dict[str, Any] | None) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.fn, self.backend, self.options = fn, backend, options
        self.module = module_of(fn)
        self.reason: str | None = None
        self._programs: dict[Any, _Program | str] = {}
        self._said: set[str | None] = set()

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return sum(isinstance(p, _Program) for p in self._programs.values())

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program for these arguments, or the function itself."""
        ran, out = self.attempt(args, kwargs)
        if ran:
            return out
        self._warn()
        return self.fn(*args, **kwargs)

    def attempt(self, args: tuple, kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Whether there is a program for these arguments, and what it returned; ``.reason`` says why not."""
        program, flat, level = self._program(args, kwargs)
        return (False, None) if program is None else (True, program(flat, level))

    def prepared(self, args: tuple) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]] | None:
        """The program for arguments like these, which must hold no duals, on flat tensors; and those to begin with.

        For loops in which only numbers change: a call costs what the program does, and nothing is looked up. It takes
        the tensors among the arguments, contiguous and in their order, and returns those among the results. None, with
        ``.reason``, where there is no program.
        """
        program, flat, level = self._program(args, {})
        return None if program is None else (program.call, flat)

    def _program(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Program | None, list[Tensor], int]:
        leaves, spec = (args, None) if not kwargs and _all_tensors(args) else pytree.tree_flatten((args, kwargs))
        level = top_level(leaves)
        held = [] if self.module is None else [*self.module.parameters(), *self.module.buffers()]
        flat, key, self.reason = _taken_apart(leaves, level)
        if self.reason is None and any(p.requires_grad for p in held) and torch.is_grad_enabled():
            self.reason = "autograd records the module's parameters (call it under torch.no_grad())"
        if self.reason is not None:
            return None, flat, level
        if self.module is not None:
            key += tuple((p.shape, p.stride(), p.dtype, p.device) for p in held)
            key += tuple(m.training for m in self.module.modules())
        key = (*key, spec, torch.is_autocast_enabled())
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._traced(leaves, spec, level, flat, held)
            if self.programs == MANY:
                warnings.warn(
                    f"{_name(self.fn)} has been compiled for {MANY} combinations of shapes and constants: pass "
                    "numbers that vary as tensors",
                    stacklevel=3,
                )
        if isinstance(program, _Program):
            return program, flat + held, level
        self.reason = program
        self._warn()
        return None, flat, level

    def _traced(
        self, leaves: Sequence[Any], spec: Any, level: int, flat: list[Tensor], held: list[Tensor]
    ) -> _Program | str:
        """The program for arguments like these and the tensors ``held`` by the module, or why there is none."""
        # Imported here: they cost a second, and most users never compile.
        from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        program = _Program()

        def run(*parts: Tensor) -> list[Tensor]:
            own = iter(parts)
            versions = [t._version for t in parts[: len(flat)]]
            with fresh_level() as inner:
                args = [_rebuilt(x, own, level, inner) for x in leaves]
                call_args, call_kwargs = (args, {}) if spec is None else pytree.tree_unflatten(args, spec)
                lifted = {} if self.module is None else dict(zip(held, own, strict=True))
                with swapped(self.module or nn.Module(), lifted):
                    result = self.fn(*call_args, **call_kwargs)
                    program.flat = type(result) is tuple and _all_tensors(result)
                    out, program.spec = pytree.tree_flatten(result)
            program.writes = versions != [t._version for t in parts[: len(versions)]]
            return program.note(out, inner)

        # Views of their own: equal arguments would be taken for one. Fake tensors: nothing is computed while recording,
        # so that no buffer is updated.
        alike = [t.detach().view_as(t) for t in (*flat, *held)]
        try:
            with torch.no_grad():
                graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*alike)
        except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException):
            return "its control flow, or a shape, depends on numbers (if, while, float or item on a tensor)"
        if program.writes:
            return "it writes to its arguments in place"
        if any(_random(node) for node in graph.graph.nodes):
            return "it draws random numbers, which a compiled program would draw differently"
        if callable(self.backend) or self.backend == "inductor":
            # Without dynamo, whose guards cost 20 us a call: the key of the program guards all that can change.
            try:
                with torch.no_grad():
                    if callable(self.backend):
                        program.call = self.backend(graph, alike)
                    else:
                        program.call = torch._inductor.compile(graph, list(alike), options=self.options)
            except (InductorError, InvalidCxxCompiler, CppCompileError) as error:
                return f"inductor could not build it ({str(error).strip().splitlines()[0]}; is there a C++ compiler?)"
        else:
            program.call = torch.compile(graph, dynamic=False, backend=self.backend, options=self.options)
        return program

    def _warn(self) -> None:
        if self.reason in self._said:
            return
        self._said.add(self.reason)
        warnings.warn(f"{_name(self.fn)} runs eagerly: {self.reason}", CompileFallbackWarning, stacklevel=4)


class _Program:
    """One compiled graph, and how its flat results make the function's own."""

    def __init__(self) -> None:
        self.call: Callable[..., Sequence[Tensor]]
        self.spec: Any = None
        self.kinds: list[Any] = []
        self.writes = self.flat = False

    def note(self, leaves: list[Any], level: int) -> list[Tensor]:
        """Flat tensors of the results; remembers which were duals."""
        flat: list[Tensor] = []
        self.kinds = []
        for x in leaves:
            if isinstance(x, DualTensor) and x._level == level:
                self.kinds.append(("dual", x._tan.num, x._tan.is_zero))
                flat += [x._primal] if x._tan.is_zero else [x._primal, x._tan.dense()]
            elif isinstance(x, Tensor):
                self.kinds.append("plain")
                flat.append(x)
            else:
                self.kinds.append(("constant", x))
        return flat

    def __call__(self, flat: list[Tensor], level: int) -> Any:
        with torch.no_grad():
            found = iter(self.call(*flat))
        leaves: list[Any] = []
        for kind in self.kinds:
            if kind == "plain":
                leaves.append(next(found))
            elif kind[0] == "dual":
                primal = next(found)
                leaves.append(make(primal, Zero(kind[1]) if kind[2] else Dense(next(found)), level))
            else:
                leaves.append(kind[1])
        return tuple(leaves) if self.flat else pytree.tree_unflatten(leaves, self.spec)


def _all_tensors(args: tuple) -> bool:
    return all(isinstance(a, Tensor) for a in args)


def _taken_apart(leaves: Sequence[Any], level: int) -> tuple[list[Tensor], tuple, str | None]:
    """Plain tensors, what the program depends on, and why there can be none."""
    flat: list[Tensor] = []
    key: list[Any] = []
    for x in leaves:
        if isinstance(x, DualTensor):
            tan = x._tan
            flat.append(x._primal)
            if not tan.is_zero:
                flat.append(tan.dense())
            key.append((tan.num, tan.is_zero))
            if x._level != level or isinstance(x._primal, DualTensor) or isinstance(flat[-1], DualTensor):
                return flat, (), "it was given duals of several levels"
        elif isinstance(x, Tensor):
            key.append("plain")
            flat.append(x)
        else:
            try:
                hash(x)
            except TypeError:
                raise DualInputError(
                    f"an argument of a compiled function must be a tensor or hashable, got {type(x).__name__}"
                ) from None
            key.append((type(x), x))
    if get_interpreter_stack():
        return flat, (), "it was called inside a torch.func transform"
    if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
        return flat, (), "autograd records its arguments (call it under torch.no_grad())"
    for t in flat:
        key += (t.shape, t.dtype, t.device)
    return [t.contiguous() for t in flat], tuple(key), None


def _rebuilt(x: Any, parts: Iterator[Tensor], level: int, inner: int) -> Any:
    if isinstance(x, DualTensor):
        primal = next(parts)
        return make(primal, Zero(x._tan.num) if x._tan.is_zero else Dense(next(parts)), inner)
    return next(parts) if isinstance(x, Tensor) else x


def _random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def module_of(fn: Callable) -> nn.Module | None:
    """The module itself, or the one that a method belongs to."""
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", type(fn).__name__)
