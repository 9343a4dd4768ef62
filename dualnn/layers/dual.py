"""`Dual`: any function or module, differentiated by duals inside ordinary backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dualnn.layers.held import HoldsFunctions
from dualnn.layers.local import LocalCall


class Dual(HoldsFunctions):
    r"""Run a function or module on duals in the forward pass, and multiply by its local Jacobian in backward.

    Loops, in-place updates, ``no_grad``, data-dependent stops: what autograd cannot follow, or follows only by storing
    every iteration, is followed by duals; the memory kept does not depend on the number of operations. Works under
    ``loss.backward()``, double backward, ``torch.func``, and with DualTensors.

    Args:
        fn_or_module: What to call. A module's own parameters are differentiated too.
        structure: What the local Jacobian looks like.

            - ``"elementwise"``: output i depends on entry i of the (broadcast) inputs; one tangent per argument, keeps
              one number per output and argument.
            - ``"block"``: the last dimension mixes, samples (all leading axes, or ``batch_dims`` of them) do not; one
              tangent per number of a sample, shared by all samples, and one per parameter.
            - ``"dense"``: everything may depend on everything; one tangent per input number, for few inputs and
              parameters.
            - ``"random"``: no structure, many inputs: K random local tangents give an unbiased estimate of the
              gradient, of relative variance (n + 1)/K with n this module's own inputs (of one sample, where samples
              do not mix) and parameters. Forward derivatives stay exact.
            - ``"auto"``: probes, and takes the first exact one that holds (``local.chosen`` says which).
        tangents: K, for ``"random"``; with ``"auto"`` it allows a random estimate where nothing exact fits.
        probe_every: A claimed or found structure is checked at the first call and every so many calls (finite entries
            only).
        batch_dims: Number of leading batch axes, for ``"block"`` (all but the last) and ``"random"`` (one).
        seed: Of the random directions; they follow from it, the number of the call (which the state dict keeps as
            ``calls`` where ``tangents`` is given, so that a resumed run goes on with the same) and the process's rank.
            Two estimates in a row draw independent ones whatever their seeds; under ``torch.func`` and reentrant
            checkpointing, where they cannot see one another, give each its own seed.
        max_relative_variance: Raise where a random estimate is predicted to be noisier than this.

    Raises:
        StructureError: The claimed structure does not hold.
        TangentLostError: The function's value does not depend on its inputs, or is no floating point tensor.
        DualInputError: No floating point input, or all outputs are nan where the structure is to be probed.
        UnpicklableError: (where processes are spawned) The function is a lambda or a closure.
        UnknownNameError: An unknown structure.

    Shape:
        As the function's own.

    Example:
        >>> import torch
        >>> from dualnn.layers import Dual
        >>> def cube_root(a):
        ...     with torch.no_grad():  # autograd would lose the derivative here
        ...         x = torch.ones_like(a)
        ...         while True:
        ...             step = (x**3 - a) / (3 * x**2)
        ...             x = x - step
        ...             if float(step.abs().max()) < 1e-6:
        ...                 return x
        >>> a = torch.tensor([8.0, 27.0], requires_grad=True)
        >>> Dual(cube_root, structure="elementwise")(a).sum().backward()
        >>> a.grad
        tensor([0.0833, 0.0370])
    """

    def __init__(
        self,
        fn_or_module: Callable,
        structure: str = "auto",
        tangents: int | None = None,
        probe_every: int = 1000,
        batch_dims: int | None = None,
        seed: int = 0,
        max_relative_variance: float | None = None,
    ) -> None:
        super().__init__(fn_or_module, "a function or module")
        self.local = LocalCall(structure, tangents, probe_every, batch_dims, seed, max_relative_variance)

    @property
    def estimates(self) -> bool:
        """Whether its gradient is an estimate (known after the first call, with ``"auto"``)."""
        return self.local.structure == "random" or self.local.chosen == "random"

    def extra_repr(self) -> str:
        """The structure, and the function where it is not a module (which torch prints itself)."""
        name = "" if isinstance(self.fn, nn.Module) else f"{self.label}, "
        estimate = "" if self.local.tangents is None else f", tangents={self.local.tangents}"
        return f"{name}structure={self.local.structure!r}{estimate}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.local(self.fn, self.fn if isinstance(self.fn, nn.Module) else None, args, kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.local.tangents is not None:
            destination[prefix + "calls"] = torch.tensor(self.local.calls)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Taken out: a layer with another structure loads the same state dict, and needs no counter in it.
        calls = state_dict.pop(prefix + "calls", None)
        if calls is not None and self.local.tangents is not None:
            self.local.calls = int(calls)
        super()._load_from_state_dict(state_dict, prefix, *args)
