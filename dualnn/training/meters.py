"""What a training step costs: bytes of live tensors, work in operations, resident size of a fresh process.

The two modes see every aten operation, the backward pass's included: autograd's engine keeps dispatch modes. They use
no saved-tensor hooks, which switch off autograd's check for in-place modification: a measured step could then return
a wrong gradient without an error.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dualnn.engine.errors import DualInputError, DualnnError
from dualnn.engine.live_bytes import LiveBytes, OpMode, aten, storages

__all__ = ["LiveBytes", "ProcessError", "Work", "forward_equivalents", "peak_rss_of"]


class ProcessError(DualnnError, RuntimeError):
    """A measured process failed or overran its time; the message ends with the last lines it printed."""


class Work(OpMode):
    """Count the operations of a program, whatever the machine.

    A product or convolution counts two for each multiply-add (torch.utils.flop_counter's formulas, and those below
    for products with a vector); any other operation that computes counts one for each element of its results;
    views and uninitialised memory count nothing. Approximations: a reduction counts its results, not what it reads;
    a factorisation or a fused recurrent layer counts its results only.

    Attributes:
        products: operations in products and convolutions.
        others: all others.

    Example:
        >>> import torch
        >>> with Work() as work:
        ...     _ = torch.tanh(torch.ones(2, 3) @ torch.ones(3, 4))
        >>> work.products, work.others  # 2 * 2 * 3 * 4; two times ones, tanh
        (48, 26)
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.others = 0

    @property
    def total(self) -> int:
        """All operations together."""
        return self.products + self.others

    def record(self, func: Any, args: Any, kwargs: Any, out: Any, before: set[int]) -> None:
        """Add one operation's count."""
        packet = func._overloadpacket
        if packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _VECTOR_PRODUCTS:
            self.products += 2 * prod(args[_VECTOR_PRODUCTS[packet]].shape)
        elif packet not in _UNINITIALISED:
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if not results:  # _foreach_add_ and its like return nothing
                results = list(_written(func, args, kwargs))
            elif not func._schema.is_mutable:
                results = [t for t in results if all(s._cdata not in before for s in storages(t))]
            self.others += sum(t.numel() for t in results)


_VECTOR_PRODUCTS = {aten.mv: 0, aten.dot: 0, aten.vdot: 0, aten.addmv: 1}  # the operand that fixes the count
_UNINITIALISED = {
    aten.empty,
    aten.empty_like,
    aten.empty_permuted,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}


def forward_equivalents(step: Callable[[], object], forward: Callable[[], object]) -> float:
    """Return work(step) / work(forward): a step's cost in units of one plain forward pass.

    Args:
        step: runs one training step (or a part of it).
        forward: runs the model once on the same batch.

    Raises:
        DualInputError: `forward` does no work at all.

    Example:
        >>> import torch
        >>> x = torch.ones(8, 8)
        >>> forward_equivalents(lambda: x @ x @ x, lambda: x @ x)
        2.0
    """
    with Work() as numerator:
        step()
    with Work() as denominator:
        forward()
    if not denominator.total:
        raise DualInputError("forward_equivalents: `forward` ran no torch operation that computes")
    return numerator.total / denominator.total


def peak_rss_of(
    command: Sequence[str] | Callable[[], object],
    timeout: float | None = None,
    env: dict[str, str] | None = None,
) -> int:
    """Return the peak resident bytes of a fresh process that runs a command or an importable function.

    Between this process and the measured one stands a small launcher: Linux carries the peak of a process that
    calls exec over to the program it starts, so that a direct child would never report less than its parent holds.
    What the launcher itself holds (about 10 MB) is therefore the least that can be reported.

    Args:
        command: program and arguments, or a function of no arguments at the top level of an importable module.
        timeout: seconds after which the process and its children are killed; None waits for ever.
        env: environment of the process; None passes this one's on.

    Raises:
        ProcessError: the process ended with another code than 0, could not be started, or overran `timeout`.
        DualInputError: the function cannot be imported by name (a lambda, a nested function, one of `__main__`).

    Example:
        >>> peak_rss_of([sys.executable, "-S", "-c", "b'x' * 50_000_000"]) > 50_000_000
        True
    """
    argv = _call_of(command) if callable(command) else [str(part) for part in command]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report")
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, report, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # one group, so that a timeout ends the measured process too
        )
        try:
            launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{argv[0]} ran for more than {timeout} s:\n{_tail(output)}") from None
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
        try:
            with open(report) as file:
                code, peak = json.load(file)
        except FileNotFoundError:
            raise ProcessError(f"{argv[0]} could not be started:\n{_tail(output)}") from None
        if code != 0:
            raise ProcessError(f"{argv[0]} ended with code {code}:\n{_tail(output)}")
    return peak if sys.platform == "darwin" else peak * 1024  # ru_maxrss: bytes on macOS, KiB elsewhere


_LAUNCHER = """
import os, sys
report, argv = sys.argv[1], sys.argv[2:]
pid = os.posix_spawnp(argv[0], argv, os.environ)
_, status, usage = os.wait4(pid, 0)
with open(report, "w") as file:
    file.write(f"[{os.waitstatus_to_exitcode(status)}, {usage.ru_maxrss}]")
"""


def _call_of(function: Callable[[], object]) -> list[str]:
    """Return the command that imports a function and calls it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<unnamed>")
    if module in (None, "__main__") or "<" in name:
        raise DualInputError(
            f"peak_rss_of: {module}.{name} cannot be imported in a fresh process: give a function at the top level "
            "of an importable module, or a command"
        )
    target: Any = importlib.import_module(str(module))
    for part in name.split("."):
        target = getattr(target, part)
    if target is not function:
        raise DualInputError(f"peak_rss_of: {module}.{name} is another object than the function given")
    call = f"import sys; sys.path[:] = {sys.path!r}; import {module}; {module}.{name}()"
    return [sys.executable, "-c", call]


def _tail(output: Any, lines: int = 20) -> str:
    output.seek(0)
    return "\n".join(output.read().decode(errors="replace").splitlines()[-lines:])


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among the arguments that an operation writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
