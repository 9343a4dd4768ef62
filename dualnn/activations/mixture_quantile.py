"""The quantile function of a learned mixture of logistic distributions."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualnn.activations.base import Activation, Sample, inverse_softplus
from dualnn.activations.monotone import increasing_root
from dualnn.activations.registry import register
from dualnn.engine.bridge import Equation
from dualnn.engine.errors import DualInputError

#: The scales stay above this.
MINIMUM = 1e-3


def _logs(y: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """log(w F) and log(w (1 - F)) of every component, stacked in front, and the scales."""
    n = len(parameters) // 3
    logits, means, scales = (torch.stack(parameters[i * n : (i + 1) * n]) for i in range(3))
    u = (y - means) / scales
    return logits + F.logsigmoid(u), logits + F.logsigmoid(-u), scales


def residual(y: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    """log(F / (1 - F))(y) - x, F the mixture's distribution function: without cancellation in either tail."""
    parameters = torch.broadcast_tensors(*parameters, y)[:-1]  # type: ignore[assignment]
    below, above, _ = _logs(y, parameters)
    return torch.logsumexp(below, 0) - torch.logsumexp(above, 0) - x


def solve(x: Tensor, *parameters: Tensor, max_steps: int = 100) -> Tensor:
    """The y with F(y) = sigmoid(x): value only, data-dependent stop.

    Args:
        x: The log-odds of the probability.
        parameters: All log-weights (their sum does not matter), then all means, then all scales, > 0.
        max_steps: Number of steps after which to give up.

    Shape:
        x, parameters: broadcastable to (*) -> y: (*). A NaN entry gives NaN there and disturbs no other.

    Raises:
        ConvergenceError: not converged after `max_steps`.
    """
    x, *rest = torch.broadcast_tensors(x, *parameters)  # type: ignore[assignment]
    n = len(rest) // 3
    means, scales = torch.stack(rest[n : 2 * n]), torch.stack(rest[2 * n :])
    single = means + scales * x  # every component's own quantile: the mixture's lies between them
    slack = 8 * torch.finfo(x.dtype).eps * (means.abs() + (scales * x).abs()).amax(0)

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below, above, _ = _logs(y, tuple(rest))
        low, high = torch.logsumexp(below, 0), torch.logsumexp(above, 0)
        u = (y - means) / scales
        share = torch.softmax(below, 0) * torch.sigmoid(-u) + torch.softmax(above, 0) * torch.sigmoid(u)
        # The rounding of y - mean enters through the slope.
        size = low.abs() + high.abs() + x.abs() + (share * (y.abs() + means.abs()) / scales).sum(0)
        return low - high - x, (share / scales).sum(0), size

    lower, upper = single.amin(0) - slack, single.amax(0) + slack
    return increasing_root(evaluate, lower, upper, (lower + upper) / 2, max_steps=max_steps, name="mixture_quantile")


def _reference(x: Any, *parameters: Any) -> Any:
    import mpmath as mp

    n = len(parameters) // 3
    parts = list(zip(parameters[:n], parameters[n : 2 * n], parameters[2 * n :], strict=True))

    def odds(y: Any) -> Any:
        below = mp.fsum(mp.exp(w) / (1 + mp.exp((m - y) / s)) for w, m, s in parts)
        above = mp.fsum(mp.exp(w) / (1 + mp.exp((y - m) / s)) for w, m, s in parts)
        return mp.log(below / above) - x

    ends = [m + s * x for _, m, s in parts]
    if n == 1:
        return ends[0]
    return mp.findroot(odds, (min(ends), max(ends)), solver="anderson", verify=False)


@register("mixture_quantile")
class MixtureQuantile(Activation):
    r"""The quantile function of a learned distribution, a mixture of logistics, per channel.

    .. math:: F(y) = \sum_{j=1}^{m} w_j \, \sigma\left(\frac{y - \mu_j}{s_j}\right) = \sigma(x), \qquad
       w = \mathrm{softmax}(\ell)

    A logistic x (the log-odds of a uniform) is turned into a sample of the mixture, so that noise becomes data of a
    learned, many-peaked shape, with gradients to weights, places and widths. As an activation: increasing, steep
    between the peaks, flat at them, linear far out. One component is the affine map mu + s x.

    Why it exists: sampling from a mixture has no pathwise gradient in torch (`MixtureSameFamily` has no `rsample`),
    since its quantile has no closed form. It is solved in log-odds, so that both tails keep their digits.

    Args:
        components: m >= 1; they start evenly spaced on [-spread, spread].
        spread: See `components`.
        scale: Initial s_j, > 0.001.
        num_channels: 1, or the input's number of channels (dimension 1; dimension 0 of a 1-D input).
        max_steps: Newton or bisection steps after which `ConvergenceError` is raised.

    Shape:
        x: (*) or (N, num_channels, *) -> y: the same. A NaN input gives NaN at that entry only. bfloat16 and float16
        are computed in float32.

    Raises:
        DualInputError: integer input; components or scale out of range.
        ConvergenceError: see `max_steps`.

    Reference:
        Figurnov, Mohamed, Mnih, "Implicit reparameterization gradients", 2018, arXiv 1805.08498. Ho et al., "Flow++",
        2019, arXiv 1902.00275 (mixtures of logistics).

    Example:
        >>> MixtureQuantile(components=2, spread=3.0)(torch.tensor([-1.0, 0.0, 1.0])).detach()
        tensor([-2.8596,  0.0000,  2.8596])
    """

    def __init__(
        self,
        components: int = 2,
        spread: float = 2.0,
        scale: float = 1.0,
        num_channels: int = 1,
        max_steps: int = 100,
    ) -> None:
        """Start every channel at the same distribution."""
        super().__init__(num_channels)
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise DualInputError(f"mixture_quantile: components must be an integer >= 1, got {components!r}")
        if not scale > MINIMUM:
            raise DualInputError(f"mixture_quantile: scale must exceed {MINIMUM}, got {scale}")
        self.components, self.max_steps = components, max_steps
        places = [0.0] if components == 1 else [spread * (2 * j / (components - 1) - 1) for j in range(components)]
        self.logits = nn.Parameter(self.per_channel_row([0.0] * components))
        self.means = nn.Parameter(self.per_channel_row(places))
        self.raw_scales = nn.Parameter(self.per_channel_row([inverse_softplus(scale - MINIMUM)] * components))

    @property
    def local(self) -> Equation:
        """The equation and its solver."""
        return Equation(partial(solve, max_steps=self.max_steps), residual)

    def natural(self) -> tuple[Tensor, ...]:
        """All log-weights, all means, all scales, each of shape (num_channels,)."""
        scales = MINIMUM + F.softplus(self.raw_scales)
        return (*self.logits.unbind(-1), *self.means.unbind(-1), *scales.unbind(-1))

    def describe(self) -> str:
        """Arguments for the repr."""
        return f"components={self.components}, max_steps={self.max_steps}"

    @classmethod
    def samples(cls) -> list[Sample]:
        """Inputs and oracles for the standard tests."""
        return [
            Sample({}, (-40.0, -0.3, 2.0), _reference),
            Sample({"spread": 3.0, "scale": 0.4}, (-1.5, 0.2), _reference),
        ]
