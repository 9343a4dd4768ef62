r"""The regularised incomplete gamma functions, in both arguments (torch has no backward for either).

.. math:: \frac{\partial P(a, x)}{\partial x} = \frac{x^{a-1} e^{-x}}{\Gamma(a)},

and the derivative in the shape a by the series and continued fraction of `dualnn.engine.incomplete_gamma`.
"""

import torch
from torch import Tensor

from dualnn.engine.bridge import elementwise
from dualnn.engine.generic import operands
from dualnn.engine.incomplete_gamma import lower_gamma
from dualnn.engine.registry import Sample
from dualnn.engine.tangents import Tangent


def _rule(name: str, sign: float, also: list) -> None:
    def push(y: Tensor, t: dict[str, Tangent | None], input: Tensor, other: Tensor) -> Tangent | None:
        a, x = input, other
        tan: Tangent | None = None
        if t["other"] is not None:
            density = torch.exp(torch.xlogy(a - 1, x) - x - torch.lgamma(a))
            tan = t["other"].scale(sign * density, y.shape, singular=True)
        if t["input"] is not None:
            part = t["input"].scale(sign * elementwise(lower_gamma(1), torch.log(x), a), y.shape)
            tan = part if tan is None else tan.plus(part)
        return tan

    operands(
        name,
        lambda r: [
            Sample((r(3, low=0.5, high=4.0), r(3, low=0.5, high=4.0))),
            Sample((r(2, 1, low=0.5, high=4.0), r(3, low=0.5, high=4.0))),
            Sample((r(3, low=0.5, high=4.0), r(3, low=0.5, high=4.0)), constant=(0,)),
        ],
        also=also,
        reverse=False,
    )(push)


_rule("gammainc", 1.0, [torch.igamma, Tensor.igamma])
_rule("gammaincc", -1.0, [torch.igammac, Tensor.igammac])
