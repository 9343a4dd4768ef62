"""Activity perturbation: perturb what layers put out, not their weights, and take each layer's own derivative."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, make
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.engine.levels import fresh_level
from dualnn.engine.patching import patched_forwards
from dualnn.engine.per_sample import keep_samples
from dualnn.engine.tangents import Dense, PerSample
from dualnn.signals.base import Signal, Step, dual_loss, inject, loss_of, trainable, with_loss
from dualnn.signals.directions import Directions, check_sampler, mixed
from dualnn.signals.forward_gradient import warn_unused


class SampleMixingWarning(UserWarning):
    """Samples influence one another before the loss, so derivatives per sample are biased."""


@dataclasses.dataclass
class _Record:
    """One perturbed output: its one-layer graph, which block of directions it got, and the layer's parameters."""

    output: Tensor
    index: int
    offset: int
    parameters: list[nn.Parameter]


class ActivityPerturbation(Signal):
    r"""Estimate gradients from K directional derivatives along random directions of the layers' outputs.

    Every module that owns parameters has its output :math:`z = f_w(x)` perturbed, :math:`z + \varepsilon_k u_k`. The
    derivative of the loss along :math:`u_k` estimates the gradient at z, and the layer's own derivative (known
    exactly: the graph of one layer) takes it to the weights:

    .. math:: \hat g_z = \frac1K \sum_k (\nabla_z L \cdot u_k)\,u_k, \qquad \hat g_w = J_w f_w(x)^T \hat g_z.

    Unbiased. Only activities are perturbed, not weights; with ``per_sample`` each sample's own derivative is used, so
    n in the relative squared error (n + 1)/K counts one sample's activities instead of a batch's. Memory: each
    layer's input is stored, as in backprop, and nothing else.

    Args:
        tangents: K.
        per_sample: Use d(loss of sample b) along sample b's directions. Right only if samples do not mix before the
            loss (BatchNorm in training does mix them); a masked direction probes for it and a warning says so. False
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
        """The step count, which schedules the probes: an extra direction changes how a GEMM rounds."""
        return {"steps": self._steps, "mixing_said": self._mixing_said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the schedule of the probes."""
        self._steps, self._mixing_said = state["steps"], state["mixing_said"]

    def loss(self, step: Step, module: nn.Module, key: int) -> Any:
        """Run the step once with perturbed activities."""
        parameters = trainable(module)
        probing = self.per_sample and self._steps % self.probe_every == 0
        self._steps += 1
        directions = Directions(self.sampler, self.tangents, key)
        with fresh_level() as level:
            run = _Run(directions, level, self.per_sample, probing)
            with torch.no_grad(), run.perturbing(module):
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
        return with_loss(output, inject(loss.detach(), gradients))

    def _checked(self, slopes: Tensor, run: _Run) -> Tensor:
        """Use and drop the probing direction: it perturbs some samples only, the others' loss must not move."""
        probe, slopes = slopes[-1], slopes[:-1]
        leak = probe[~run.chosen].abs().max() if bool((~run.chosen).any()) else probe.new_zeros(())
        scale = probe.abs().max()
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


class _Run:
    """One pass with perturbed outputs."""

    def __init__(self, directions: Directions, level: int, per_sample: bool, probing: bool) -> None:
        self.directions, self.level = directions, level
        self.per_sample, self.probing = per_sample, probing
        self.records: list[_Record] = []
        self.offset = 0
        self.batch = 0
        self.chosen = torch.zeros(0, dtype=torch.bool)
        self._keeping: Any = None

    @contextmanager
    def perturbing(self, module: nn.Module) -> Iterator[None]:
        """Patch ``forward`` of every module that owns trainable parameters."""
        owners = [m for m in module.modules() if any(p is not None and p.requires_grad for p in m._parameters.values())]
        try:
            with patched_forwards({m: self._perturbed(m, m.forward) for m in owners}):
                yield
        finally:
            if self._keeping is not None:
                self._keeping.__exit__(None, None, None)

    def _perturbed(self, module: nn.Module, forward: Callable) -> Callable:
        parameters = [p for p in module.parameters() if p.requires_grad]

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():  # the graph of this one layer: inputs carry none
                output = forward(*args, **kwargs)
            return pytree.tree_map_only(Tensor, lambda z: self._perturb(z, parameters), output)

        return run

    def _perturb(self, z: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        value = z._primal if isinstance(z, DualTensor) and z._level == self.level else z
        if not value.dtype.is_floating_point:
            return z
        if self.per_sample:
            self._see_batch(value)
        shape = self._shape(value)
        record = _Record(value, len(self.records), self.offset, parameters)
        self.records.append(record)
        self.offset += shape.numel()
        u = self._directions(record)
        if self.probing:
            rows = self.chosen.repeat_interleave(len(value) // self.batch).reshape(-1, *(1,) * (value.dim() - 1))
            u = torch.cat([u, (u[:1] * rows.to(u.dtype))])
        if value is not z and not z._tan.is_zero:  # type: ignore[attr-defined]
            u = u + z._tan.dense().detach()  # type: ignore[attr-defined]
        return make(value.detach(), Dense(u), self.level)

    def _see_batch(self, value: Tensor) -> None:
        """The first perturbed output tells the batch size; later ones must be whole multiples of it."""
        if not self.batch:
            if value.dim() == 0:
                raise StructureError("a perturbed output is a scalar: there is no sample axis. Use per_sample=False.")
            self.batch = len(value)
            generator = torch.Generator().manual_seed(mixed(self.directions.key, -1))
            self.chosen = torch.rand(self.batch, generator=generator).argsort() < (self.batch + 1) // 2
            self.chosen = self.chosen.to(value.device)
            self._keeping = keep_samples(self.level, self.batch)
            self._keeping.__enter__()
        if value.dim() == 0 or len(value) % self.batch:
            raise StructureError(
                f"a perturbed output has shape {tuple(value.shape)}, but the batch has {self.batch} samples: its first "
                "axis is not the batch. Use per_sample=False."
            )

    def _shape(self, value: Tensor) -> torch.Size:
        """Shape of the perturbed entries: those of one sample, or of the whole output."""
        if not self.per_sample:
            return value.shape
        return torch.Size((len(value) // self.batch if self.batch else 0, *value.shape[1:]))

    def _directions(self, record: _Record) -> Tensor:
        """Directions ``(K, *output.shape)``: independent for every sample, or unit vectors shared by all samples."""
        value = record.output
        if self.per_sample and self.directions.sampler == "basis":
            one = self.directions.draw(record.index, record.offset, tuple(self._shape(value)), value)
            return one.unsqueeze(1).expand(-1, self.batch, *one.shape[1:]).reshape(-1, *value.shape)
        return self.directions.draw(record.index, record.offset, tuple(value.shape), value)

    def slopes(self, loss: DualTensor) -> Tensor:
        """Derivatives of the loss: ``(K,)``, or ``(K, B)`` per sample."""
        tan = loss._tan
        if not self.per_sample:
            return tan.dense().reshape(-1)
        if not isinstance(tan, PerSample):
            raise StructureError(
                "the loss lost the batch axis by an operation that does not keep samples apart (only sums, means and "
                "torch's losses do). Use per_sample=False."
            )
        return tan.samples().reshape(-1, tan.batch)

    def gradients(self, slopes: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
        """Each layer's vector-Jacobian product with its estimated output gradient, one layer at a time."""
        wanted = set(parameters)
        sums: dict[nn.Parameter, Tensor | None] = dict.fromkeys(parameters)
        while self.records:
            record = self.records.pop()
            z = record.output
            if not z.requires_grad:
                continue
            u = self._directions(record)
            weights = slopes.to(u.dtype)
            if self.per_sample:
                weights = weights.repeat_interleave(len(z) // self.batch, 1)
                estimate = torch.einsum("kb,kb...->b...", weights, u)
            else:
                estimate = torch.tensordot(weights, u, dims=1)
            own = [p for p in record.parameters if p in wanted]
            for p, g in zip(own, torch.autograd.grad(z, own, estimate, allow_unused=True), strict=True):
                if g is not None:
                    seen = sums[p]
                    sums[p] = g if seen is None else seen + g
        return sums
