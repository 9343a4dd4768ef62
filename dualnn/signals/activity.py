"""Activity perturbation: perturb what layers put out, not their weights, and take each layer's own derivative."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dualnn.engine.directions import Directions, check_sampler
from dualnn.engine.errors import DualInputError
from dualnn.engine.levels import fresh_level
from dualnn.signals.base import Signal, Step, dual_loss, inject, loss_of, trainable, with_loss
from dualnn.signals.forward_gradient import warn_unused
from dualnn.signals.outside import OutsideUse
from dualnn.signals.perturbed_run import PerturbedRun


class SampleMixingWarning(UserWarning):
    """Samples influence one another before the loss, so derivatives per sample are biased."""


class ActivityPerturbation(Signal):
    r"""Estimate gradients from K directional derivatives along random directions of the layers' outputs.

    Every module that owns parameters has its output :math:`z = f_w(x)` perturbed, :math:`z + \varepsilon_k u_k`. The
    derivative of the loss along :math:`u_k` estimates the gradient at z, and the layer's own derivative (known
    exactly: the graph of one layer) takes it to the weights:

    .. math:: \hat g_z = \frac1K \sum_k (\nabla_z L \cdot u_k)\,u_k, \qquad \hat g_w = J_w f_w(x)^T \hat g_z.

    Unbiased. Only activities are perturbed, not weights; with ``per_sample`` each sample's own derivative is used, so
    n in the relative squared error (n + 1)/K counts one sample's activities instead of a batch's. Memory: each
    layer's input is stored, as in backprop, and nothing else.

    A parameter used outside of its module's ``forward`` (a penalty on the weights) is left out there; a warning says
    so. A module whose class says ``one_layer = True`` (`dualnn.layers.Dual`, `FixedPoint`) is perturbed as a whole.

    Args:
        tangents: K.
        per_sample: Use d(loss of sample b) along sample b's directions. Right only if samples do not mix before the
            loss (BatchNorm in training does mix them); masked directions probe for it and a warning says so. False
            uses the scalar loss: unbiased in any case, with a variance B times larger.
        sampler: ``"rademacher"``, ``"gaussian"`` or ``"basis"`` (all unit vectors: exact).
        probe_every: Probe for mixing at the first step and every so many steps.

    Raises:
        DualInputError: K is less than 1, or too small for ``"basis"``.
        StructureError: ``per_sample``, but an output has no batch axis of the size that the first one had.

    Reference:
        Ren, Kornblith, Liao, Hinton, "Scaling forward gradient with local losses", 2023, arXiv 2210.03310.

    Example:
        >>> import torch
        >>> from dualnn.signals import ActivityPerturbation, signal_loss
        >>> net, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
        >>> loss = signal_loss(lambda: net(x).square().mean(), net, ActivityPerturbation(tangents=4), key=0)
        >>> loss.backward()
        >>> net.bias.grad.shape
        torch.Size([2])
    """

    def __init__(
        self, tangents: int = 1, per_sample: bool = True, sampler: str = "rademacher", probe_every: int = 1000
    ) -> None:
        if tangents < 1:
            raise DualInputError(f"tangents must be at least 1, got {tangents}")
        if probe_every < 1:
            raise DualInputError(f"probe_every must be at least 1, got {probe_every}")
        self.tangents, self.per_sample, self.probe_every = tangents, per_sample, probe_every
        self.sampler = check_sampler(sampler)
        self._steps = 0
        self._mixing_said = False

    def __repr__(self) -> str:  # noqa: D105
        return f"ActivityPerturbation(tangents={self.tangents}, per_sample={self.per_sample}, sampler={self.sampler!r})"

    def state_dict(self) -> dict[str, Any]:
        """The step count, which schedules the probes: extra directions change how a GEMM rounds."""
        return {"steps": self._steps, "mixing_said": self._mixing_said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the schedule of the probes."""
        self._steps, self._mixing_said = state["steps"], state["mixing_said"]

    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run the step once with perturbed activities."""
        parameters = trainable(module)
        checking = self._steps % self.probe_every == 0
        probing = checking and self.per_sample
        self._steps += 1
        directions = Directions(self.sampler, self.tangents, key)
        with fresh_level() as level:
            outside = OutsideUse(parameters) if checking else None
            run = PerturbedRun(directions, level, self.per_sample, probing, outside)
            with torch.no_grad(), run.perturbing(module), outside or nullcontext():
                output = step()
            loss = loss_of(output)
            if loss is None:
                return output
            if not run.records:
                raise DualInputError(f"the step called no submodule of {type(module).__name__} that owns parameters")
            slopes = run.slopes(dual_loss(output, level))
        if self.sampler == "basis" and self.tangents < run.offset:
            raise DualInputError(f"sampler='basis' needs tangents={run.offset} for this step, got {self.tangents}")
        if probing:
            slopes = self._checked(slopes, run)
        gradients = run.gradients(slopes * directions.weight, parameters)
        warn_unused(module, [p for p in parameters if gradients[p] is None], "no perturbed module used")
        if outside is not None and outside.found:
            names = [name for name, p in module.named_parameters() if id(p) in outside.found]
            warnings.warn(
                f"the step uses {', '.join(names)} outside of the modules that own them (a penalty on the weights, "
                "F.linear(x, net.weight)): ActivityPerturbation does not estimate that part of the gradient. "
                "ForwardGradient does; use .detach() on a value that is only logged.",
                UserWarning,
                stacklevel=3,
            )
        return with_loss(output, inject(loss.detach(), gradients))

    def _checked(self, slopes: Tensor, run: PerturbedRun) -> Tensor:
        """Use and drop the probing directions: each perturbs some samples only, the others' loss must not move."""
        probes, slopes = slopes[-2:].abs(), slopes[:-2]
        still = torch.stack([~run.chosen, run.chosen])
        leak, scale = (probes * still).max(), probes.max()
        if not self._mixing_said and float(leak) > 1e-5 * float(scale):
            self._mixing_said = True
            warnings.warn(
                "samples mix before the loss (BatchNorm in training, a contrastive loss, attention across samples, a "
                f"batch axis that is not the first): perturbing some samples moved the others' loss by "
                f"{float(leak / scale):.1e} of its largest change. Derivatives per sample are biased; "
                "ActivityPerturbation(per_sample=False) is not, at a variance B times larger.",
                SampleMixingWarning,
                stacklevel=4,
            )
        return slopes
