"""`Smoothed`: a function without a derivative, averaged over Gaussian noise, with an unbiased gradient estimate."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.bridge_linear import Once, linear
from dualnn.engine.errors import DualInputError, StructureError, UnsupportedOpError
from dualnn.layers.given_jacobian import (
    check_apart,
    check_arguments,
    check_output,
    check_structure,
    refuse_bad_numbers,
    sample_shape,
    with_jacobian,
)
from dualnn.layers.held import HoldsFunctions

ADVICE = (
    "only value and gradient of the smoothed function are estimated. Smooth the whole function whose second derivative "
    "is wanted, or use layers.Surrogate."
)


class Smoothed(HoldsFunctions):
    r"""Gaussian smoothing of any function, by sampling.

    .. math:: f_\sigma(x) = E[f(x + \sigma z)], \qquad
       \nabla f_\sigma(x) = E\left[\frac{f(x + \sigma z) - f(x - \sigma z)}{2 \sigma} z\right], \qquad z \sim N(0, I)

    Value and Jacobian are means over the same samples: unbiased for :math:`f_\sigma`, which is smooth whatever f is,
    and is *not* f (a bias of order :math:`\sigma^2` where f is smooth). ``antithetic=True`` uses the pairs of the
    equation (2 calls of f for each sample); otherwise :math:`(f(x + \sigma z) - f(x)) z / \sigma`, with f(x) as control
    variate.

    **Variance.** With n perturbed numbers on which an output depends (1 elementwise, the last dimension for a block,
    all for dense) the estimated gradient g has, where f is linear at the scale of sigma,

    .. math:: \mathrm{Var}[\hat g_j] = \frac{|g|^2 + g_j^2}{samples}, \qquad
       \frac{E|\hat g - g|^2}{|g|^2} = \frac{n + 1}{samples},

    and more at a jump: for a step of height a at distance c sigma, elementwise and antithetic,

    .. math:: \mathrm{Var}[\hat g] = \frac{1}{samples}
       \left[\frac{a^2}{2 \sigma^2} (c \varphi(c) + 1 - \Phi(c)) - g^2\right], \qquad g = \frac{a}{\sigma} \varphi(c).

    A warning says so once if :math:`(n + 1) / samples > 1`.

    The noise comes from a key, never from the global random state: ``key=`` of the call if given; else in training mode
    the seed and the number of calls so far (a buffer, so a resumed run goes on with the same noise); in eval mode the
    seed alone. The samples of the backward pass are those of the forward pass. Ranks of a distributed run draw alike
    unless their seeds differ; so do, for ``"dense"``, the samples of a ``torch.func.vmap``.

    Args:
        fn: Function of one tensor, any code; it gets a tensor of its own (with one more leading axis under
            ``torch.func.vmap``, unless ``"dense"``).
        sigma: Standard deviation of the noise, in units of the input.
        samples: Number of samples (pairs, if antithetic).
        antithetic: See above.
        structure: What f mixes: ``"elementwise"`` (least variance), ``"block"`` (the last dimension) or ``"dense"``.
        seed: Of the noise.
        probe_every: The structure is probed at the first call and every so many calls.

    Shape:
        Elementwise: x: (*) -> y: (*). Block: x: (*batch, n) -> y: (*batch, *rest). Dense: any -> any.

    Raises:
        DualInputError: An argument out of range; input that is not floating point or not finite.
        StructureError: f returns another shape than the structure says, or mixes what it should not.
        UnsupportedOpError: (in a second derivative), or inside activation checkpointing without ``key=``.
        UnknownNameError: An unknown structure.

    Reference:
        Nesterov, Spokoiny, "Random gradient-free minimization of convex functions", 2017. Berthet et al., "Learning
        with differentiable perturbed optimizers", 2020, arXiv 2002.08676.

    Example:
        >>> step = Smoothed(torch.sign, sigma=1.0, samples=1000, structure="elementwise")
        >>> x = torch.tensor([0.0], requires_grad=True)
        >>> step(x, key=1).sum().backward()
        >>> abs(float(x.grad) - (2 / torch.pi) ** 0.5) < 0.1  # the derivative of erf(x / sqrt(2)) at 0
        True
    """

    estimates = True  # its gradient
    calls: Tensor

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        sigma: float,
        samples: int,
        antithetic: bool = True,
        structure: str = "block",
        seed: int = 0,
        probe_every: int = 1000,
    ) -> None:
        super().__init__(fn)
        if not 0 < sigma < math.inf:
            raise DualInputError(f"Smoothed: sigma must be positive, got {sigma}")
        for what, number in (("samples", samples), ("probe_every", probe_every)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise DualInputError(f"Smoothed: {what} must be an integer >= 1, got {number!r}")
        self.sigma, self.samples, self.antithetic = sigma, samples, antithetic
        self.structure, self.seed, self.probe_every = check_structure(structure), seed, probe_every
        self._probes, self._warned = 0, False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """The function, and of what its smoothing is made."""
        pairs = "antithetic pairs" if self.antithetic else "samples"
        return f"{self.label}, sigma={self.sigma}, {self.samples} {pairs}, structure={self.structure!r}"

    def relative_variance(self, n: int) -> float:
        """The expected squared error over the squared norm, of the gradient of a linear function of n numbers."""
        return (n + 1) / self.samples

    # Sampling does not trace: one clean graph break instead.
    @torch.compiler.disable
    def forward(self, x: Tensor, key: int | None = None) -> Tensor:
        """Estimate the smoothed function, and its gradient in backward.

        Args:
            x: Input.
            key: Determines the noise. None: see the class.
        """
        check_arguments(self.name, (x,))
        self._warn(x)
        draws = _Draws(self, self._key(key), torch.is_grad_enabled())

        def jacobian(wanted: Sequence[int], x: Any) -> Sequence[Tensor]:
            once = Once(f"the estimated gradient of {self.name}", draws.jacobian, ADVICE, self.structure != "dense")
            return linear(once, x)

        return with_jacobian(self.name, self.structure, draws.value, jacobian, x, batched=True)

    def _key(self, key: int | None) -> int:
        if key is not None:
            return _seed(int(key), 0)
        if not self.training:
            return _seed(self.seed, 0)
        if torch._C._current_graph_task_id() != -1:
            # Recomputation: this call would draw other noise than the one whose gradient is being computed.
            raise UnsupportedOpError(
                f"{self.name} is recomputed in the backward pass (activation checkpointing), where it would draw other "
                "samples than in the forward pass. Pass it a key: layer(x, key=…)."
            )
        self.calls += 1
        return _seed(self.seed, int(self.calls))

    def _warn(self, x: Tensor) -> None:
        n = {"elementwise": 1, "block": x.shape[-1] if x.dim() else 1, "dense": x.numel()}[self.structure]
        if not self._warned and self.relative_variance(n) > 1:
            self._warned = True
            warnings.warn(
                f"{self.name}: with {self.samples} samples for {n} numbers the estimated gradient has relative "
                f"variance {self.relative_variance(n):.3g}. Take more samples, or structure='elementwise' if it is.",
                stacklevel=3,
            )


class _Draws:
    """The evaluations of one call: a pure function of the key and the input."""

    def __init__(self, of: Smoothed, key: int, graph: bool) -> None:
        self.of, self.key, self.graph = of, key, graph
        self.kept: tuple[Tensor, Tensor] | None = None  # input and Jacobian of the forward pass

    def value(self, x: Tensor) -> Tensor:
        """The mean over the samples."""
        refuse_bad_numbers(self.of.name, (x,))
        y, jac = self._means(x, self.graph)
        if jac is not None:
            self.kept = (x.detach().clone(), jac)
        return y

    def jacobian(self, x: Tensor) -> tuple[Tensor]:
        """The mean Jacobian; that of the forward pass where the input is the same."""
        if self.kept is not None and self.kept[0].shape == x.shape and torch.equal(self.kept[0], x):
            return (self.kept[1],)
        jac = self._means(x, True)[1]
        assert jac is not None
        return (jac,)

    def _means(self, x: Tensor, graph: bool) -> tuple[Tensor, Tensor | None]:
        of = self.of
        # Half precision would round the noise and the mean.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        generator = torch.Generator().manual_seed(self.key)
        total: Any = 0.0
        slope: Any = 0.0
        centre = self._call(wide.clone()) if graph and not of.antithetic else None
        for _ in range(of.samples):
            # On the CPU, whatever the device: the same key gives the same noise.
            z = torch.randn(x.shape, generator=generator, dtype=wide.dtype).to(x.device)
            up = self._call(wide + of.sigma * z)
            if not of.antithetic:
                total = total + up
                change = up - centre if centre is not None else None
            else:
                down = self._call(wide - of.sigma * z)
                total = total + (up + down) / 2
                change = (up - down) / 2
            if graph and change is not None:
                slope = slope + self._outer(change, z)
        y = total / of.samples
        check_output(of.name, of.structure, (x,), y.shape)
        if of._probes % of.probe_every == 0:
            size = of.sigma * (1 + torch.rand(x.shape, generator=generator, dtype=wide.dtype).to(x.device))
            base = wide.clone()
            check_apart(of.name, of.structure, self._call, (base,), (size,), self._call(base.clone()))
        of._probes += 1
        return y.to(x.dtype), (slope / (of.samples * of.sigma)).to(x.dtype) if graph else None

    def _call(self, x: Tensor) -> Tensor:
        y = self.of.fn(x)
        if not isinstance(y, Tensor):
            raise StructureError(f"{self.of.name} must return one tensor, got {type(y).__name__}")
        return y.to(x.dtype)

    def _outer(self, change: Tensor, z: Tensor) -> Tensor:
        """One sample of the Jacobian, in the layout of the structure."""
        check_output(self.of.name, self.of.structure, (z,), change.shape)
        if self.of.structure == "elementwise":
            return change * z
        if self.of.structure == "dense":
            return change.reshape(*change.shape, *(1,) * z.dim()) * z
        batch = sample_shape("block", (z,))
        return change.unsqueeze(-1) * z.reshape(*batch, *(1,) * (change.dim() - len(batch)), z.shape[-1])


def _seed(key: int, index: int) -> int:
    """A 63-bit seed from two numbers; neighbouring ones give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(f"{key} {index}".encode(), digest_size=8).digest(), "big") >> 1
