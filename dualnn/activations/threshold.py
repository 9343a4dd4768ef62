r"""The threshold of a row: the one number tau that a scalar equation F(tau, x, ...) = 0 of a whole row defines.

Shared by `entmax` and `soft_topk`. How tau is found does not matter: the implicit function theorem gives

.. math:: \dot\tau = \sum_j w_j \dot x_j + \sum_p v_p \dot p, \qquad w_j = -F_{x_j} / F_\tau

whose weights a `Threshold` states in closed form, in plain code on (tau, x, p), which is differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge_linear import linear


@dataclass
class Threshold:
    """A threshold's equation, as a rule for `dualnn.engine.bridge_linear.linear`.

    Attributes:
        name: For messages.
        solve: ``solve(x, *parameters) -> tau``, by any code.
        weights: ``weights(tau, x, *parameters)``: the derivatives of tau in x (a row) and in every parameter.

    Shape:
        x: (*, n); parameters: () -> tau: (*, 1).

    Example:
        >>> half_sum = Threshold("half", lambda x: x.sum(-1, keepdim=True) / 2, lambda t, x: (torch.ones_like(x) / 2,))
        >>> half_sum(torch.tensor([1.0, 3.0]))
        tensor([2.])
    """

    name: str
    solve: Callable[..., Tensor]
    weights: Callable[..., Sequence[Tensor]]
    batched: bool = True

    # Solvers with data-dependent stops do not trace: one clean graph break instead.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Tau, differentiably in every mode."""
        return linear(self, x, *parameters)[0]

    def value(self, *args: Any) -> tuple[Tensor, ...]:
        """The solution."""
        return (self.solve(*args),)

    def push(self, primals: tuple, tangents: tuple, out: tuple) -> Sequence[Tensor]:
        """How tau moves with its arguments."""
        total: Any = 0
        for i, (w, t) in enumerate(zip(self.weights(out[0], *primals), tangents, strict=True)):
            if t is not None:
                moved = w * t.reshape(t.shape[:1] + (1,) * (w.dim() - t.dim() + 1) + t.shape[1:])
                total = total + (moved.sum(-1, keepdim=True) if i == 0 else moved)
        return (total,)

    def pull(self, primals: tuple, grads: tuple, out: tuple, wanted: Sequence[int]) -> Sequence[Tensor]:
        """The transposed map."""
        weights = self.weights(out[0], *primals)
        return [(grads[0] * weights[i]).sum_to_size(primals[i].shape) for i in wanted]
