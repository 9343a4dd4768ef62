"""`Dual`: any function or module, differentiated by duals inside ordinary backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dualnn.engine.errors import DualInputError
from dualnn.layers.local import LocalCall


class Dual(nn.Module):
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
        seed: Of the random directions; they follow from it and the number of the call.
        max_relative_variance: Raise where a random estimate is predicted to be noisier than this.

    Raises:
        StructureError: The claimed structure does not hold.
        TangentLostError: The function's value does not depend on its inputs.
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

    one_layer = True  # signals perturb its result as a whole

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
        super().__init__()
        if not callable(fn_or_module):
            raise DualInputError(f"Dual wraps a function or module, got {fn_or_module!r}")
        self.fn = fn_or_module
        self.local = LocalCall(structure, tangents, probe_every, batch_dims, seed, max_relative_variance)

    def extra_repr(self) -> str:
        """The structure, and the function where it is not a module (which torch prints itself)."""
        name = "" if isinstance(self.fn, nn.Module) else f"{getattr(self.fn, '__name__', self.fn)}, "
        estimate = "" if self.local.tangents is None else f", tangents={self.local.tangents}"
        return f"{name}structure={self.local.structure!r}{estimate}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.local(self.fn, self.fn if isinstance(self.fn, nn.Module) else None, args, kwargs)
