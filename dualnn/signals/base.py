"""What a training signal is: it runs the user's step and returns a loss whose backward writes a gradient."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, require_tangent
from dualnn.engine.errors import DualInputError

Step = Callable[[], Any]


class Signal(abc.ABC):
    """Where a gradient comes from.

    A signal never knows ops or models: it is given the user's step as a function without arguments and the module
    whose parameters are trained. Everything random in it follows from ``key``.
    """

    @abc.abstractmethod
    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run ``step`` and return its output, with a loss whose ``backward()`` adds this signal's gradient."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit (nothing, for most signals)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (most signals keep nothing)
        """Restore `state_dict`."""


class _Inject(torch.autograd.Function):
    """A one-node graph from parameters to the loss whose backward hands each parameter its ready gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        # On other devices, looking would wait.
        if grad.is_cpu and not torch.is_grad_enabled() and grad.item() == 1.0:
            # As they are: saved tensors are released before they reach .grad (unless the graph is retained), which
            # then takes the tensor instead of a copy.
            return None, None, *ctx.saved_tensors
        return None, None, *[None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]


def inject(value: Tensor, gradients: Mapping[nn.Parameter, Tensor | None]) -> Tensor:
    """A plain scalar loss whose ``backward()`` adds ``gradients`` (times the incoming factor) to ``.grad``."""
    parameters = list(gradients)
    ready = [None if g is None else g.to(p.dtype) for p, g in gradients.items()]
    with torch.enable_grad():
        return _Inject.apply(value.detach(), ready, *parameters)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a signal trains, each once.

    Raises:
        DualInputError: There are none.
    """
    found = [p for p in module.parameters() if p.requires_grad]
    if not found:
        raise DualInputError(f"{type(module).__name__} has no parameter with requires_grad=True: nothing to train")
    return found


def loss_of(output: Any) -> Any:
    """The loss in a step's output: the output itself, or its ``"loss"``; None where the step skipped the batch."""
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise DualInputError(f"the step returned a dict without 'loss': keys are {sorted(map(str, output))}")
        return output["loss"]
    return output


def dual_loss(output: Any, level: int) -> DualTensor:
    """The dual scalar loss of a step.

    Raises:
        TangentLostError: It carries no tangent.
        DualInputError: It is not a scalar tensor.
    """
    loss = loss_of(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DualInputError(f"a training step must return a scalar loss tensor, got {what}")
    return require_tangent(loss, level, "the loss")


def with_loss(output: Any, loss: Tensor) -> Any:
    """The step's output with its loss replaced, and every other dual reduced to its value."""
    if not isinstance(output, Mapping):
        return loss
    others = {k: None if k == "loss" else v for k, v in output.items()}
    return pytree.tree_map_only(DualTensor, Tensor.detach, others) | {"loss": loss}
