"""The Heaviside step, trained by the derivative of a named primitive."""

from typing import Any

from torch import Tensor

from dualnn.activations.base import Sample
from dualnn.activations.hard import Hard, hard_sample
from dualnn.activations.registry import register


def _reference(x: Any) -> Any:
    return 1 if x >= 0 else 0


@register("heaviside")
class Heaviside(Hard):
    r"""The step from 0 to 1 at x = 0 (a gate), trained by the derivative of a named primitive (a surrogate).

    .. math:: y = [x \ge 0], \qquad \dot y = \beta P'(\beta x) \, \dot x

    The derivative of y itself is 0 almost everywhere: there is nothing to recover. A gradient obtained through it is
    therefore **biased**: it is that of P(beta x), which the repr names, of every order, and the same in forward and in
    reverse mode.

    Why it exists: `torch.heaviside` has no backward, `(x >= 0).float()` cuts the graph in silence, and the usual trick
    with `detach` is wrong in forward mode and at second order.

    Args:
        primitive: "sigmoid", "atan", "erf" or "triangle" rise from 0 to 1; see `dualnn.layers.Surrogate` for all.
        sharpness: beta > 0.

    Shape:
        x: (*) -> y: the same, 0 or 1; 1 at x = 0. NaN gives NaN. bfloat16 and float16 are computed in float32.

    Raises:
        DualInputError: integer input; sharpness not positive.
        UnknownNameError: another `primitive`.

    Reference:
        Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons", 2013,
        arXiv 1308.3432.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> Heaviside()(x).sum().backward()
        >>> Heaviside()(x).detach(), x.grad
        (tensor([0., 1., 1.]), tensor([0.1966, 0.2500, 0.1050]))
    """

    def __init__(self, primitive: str = "sigmoid", sharpness: float = 1.0) -> None:
        """Fix the primitive."""
        super().__init__(primitive, sharpness)

    @staticmethod
    def decide(u: Tensor) -> Tensor:
        """1 for u >= 0, else 0."""
        return (u >= 0).to(u.dtype)

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests (the derivatives are those of the primitive)."""
        points = (-9.0, -2.0, -0.6, -0.01, 0.02, 0.3, 1.4, 7.0)
        return [
            hard_sample({}, "sigmoid", points, _reference),
            hard_sample({"primitive": "erf", "sharpness": 2.0}, "erf", points, _reference),
        ]
