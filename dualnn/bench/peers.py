"""The others: torch.func, torch.compile, JAX. Imported when an arm is built, never before."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualnn.bench.benchmark import Arm, Run, Settings, Unavailable

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_jax: list[Any] = []


def pushed(fn: Callable[[Tensor], Any], chunk: int | None = None) -> Callable[[Tensor, Tensor], Any]:
    """``(x, t) -> J t`` for a stack of directions: vmap of torch.func.jvp, at most ``chunk`` of them at a time."""

    def push(x: Tensor, t: Tensor) -> Any:
        return torch.vmap(lambda u: torch.func.jvp(fn, (x,), (u,))[1], chunk_size=chunk)(t)

    return push


class Compiled:
    """``fn(*args)`` under torch.compile; recorded by make_fx first where dynamo cannot follow it, which is remarked."""

    def __init__(self, fn: Callable, args: tuple[Tensor, ...], backend: str) -> None:
        self.args, self.backend, self.remark = args, backend, ""
        # fullgraph: a break, or a fallback to eager at the limit of recompilations, raises instead of being timed.
        self.call: Callable = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)
        from torch._dynamo.exc import TorchDynamoException

        try:
            self.call(*args)
        except TorchDynamoException:
            from torch.fx.experimental.proxy_tensor import make_fx

            graph = make_fx(fn)(*args)
            with torch.no_grad():
                self.call = graph if backend == "eager" else torch._inductor.compile(graph, list(args))
            self.remark = "recorded by make_fx, dynamo does not follow it"

    def __call__(self) -> Any:
        """Run it."""
        return self.call(*self.args)


def torch_func(fn: Callable[[Tensor], Any], x: Tensor, t: Tensor, settings: Settings) -> Mapping[str, Arm]:
    """The two arms of torch.func for the tangents of ``fn``."""
    push = pushed(fn)
    return {
        "torch.func": Arm(lambda: lambda: push(x, t), "peer"),
        "torch.func compiled": Arm(lambda: Compiled(push, (x, t), settings.backend), "peer", compiled=True),
    }


def jax_arm(build: Callable[[Any], Callable], inputs: tuple[Tensor, ...], settings: Settings) -> Arm:
    """An arm of JAX: ``build(jax)`` makes a function of arrays, which is jitted."""

    def make() -> Run:
        jax = the_jax(settings)
        call = jax.jit(build(jax))
        arrays = tuple(jax.numpy.asarray(t.detach().cpu().numpy()) for t in inputs)
        return lambda: jax.block_until_ready(call(*arrays))

    return Arm(make, "peer", compiled=True)


def jax_pushed(jax: Any, fn: Callable) -> Callable:
    """``(x, t) -> J t`` for a stack of directions, in JAX."""
    return lambda x, t: jax.vmap(lambda u: jax.jvp(fn, (x,), (u,))[1])(t)


def the_jax(settings: Settings) -> Any:
    """JAX with float64, on one thread of the CPU or on the GPU.

    Raises:
        Unavailable: It is not installed, or sees no GPU.
    """
    if not _jax:
        with _one_core():
            jax = require("jax")
            jax.config.update("jax_enable_x64", True)
            jax.devices()  # makes the pool of threads, of the size that is allowed now
        _jax.append(jax)
    if settings.device == "cuda" and _jax[0].default_backend() != "gpu":
        raise Unavailable("this JAX sees no GPU")
    return _jax[0]


def require(name: str) -> Any:
    """A module of the ``bench`` extra.

    Raises:
        Unavailable: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise Unavailable(f"{name} is not installed (pip install 'dualnn[bench]')") from error


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """XLA sizes its pool by the cores it may use when it starts."""
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{flags or ''} {ONE_THREAD}".strip()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        if flags is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = flags


def gradients(loss: Tensor, inputs: list[Tensor]) -> dict[str, Any]:
    """A loss and its gradient by backprop."""
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, inputs)}


def checkpointed(step: Callable[..., Any], state: Any, steps: int, segment: int, *args: Tensor) -> Any:
    """Apply ``state = step(state, *args)`` ``steps`` times, keeping only every ``segment``-th state for backward."""
    from torch.utils.checkpoint import checkpoint

    def stretch(count: int, spec: Any, *flat: Any) -> Any:
        now, rest = pytree.tree_unflatten(list(flat), spec)
        for _ in range(count):
            now = step(now, *rest)
        return now

    for done in range(0, steps, segment):
        flat, spec = pytree.tree_flatten((state, args))
        state = checkpoint(stretch, min(segment, steps - done), spec, *flat, use_reentrant=False)
    return state
