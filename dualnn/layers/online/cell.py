"""The base of the online cells: recurrent layers whose units meet one another only through their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualnn.engine.compiling import compile
from dualnn.engine.dual_tensor import top_level
from dualnn.engine.errors import DualInputError, DualShapeError, UnsupportedOpError
from dualnn.engine.untraced import untraced
from dualnn.layers.online.node import Rows, Window, ahead, back
from dualnn.layers.online.partials import partials
from dualnn.layers.online.scan import matrices, scan
from dualnn.layers.online.state import OnlineState


class OnlineCell(nn.Module):
    r"""A recurrent layer with a diagonal recurrence, in two modes that give the same numbers.

    .. math:: u_t = W x_t + b, \qquad s_t = f(s_{t-1}, u_t, \theta), \qquad y_t = g(s_t)

    f and g work unit by unit: a unit's S numbers of state depend on its own drives, parameters and past only. Then a
    parameter moves one unit, and the exact sensitivities :math:`\partial s_t/\partial(W, b, \theta)` are S numbers a
    parameter and sample, which can be carried along (real-time recurrent learning, exact and cheap).

    - **Online**: ``y, state = cell.step(x, state)`` for a step, ``cell.window(x, state)`` for several. y carries one
      node of graph; ``loss.backward()`` adds the loss's gradient over the *whole past* to ``.grad``. Nothing of the
      past is kept but the state: memory does not depend on how long the stream is, and an optimizer may step after
      every window. A window costs few operations, whatever its length; a single step costs as many: of long windows
      a step is cheap.
    - **Recorded** (backpropagation through time): ``cell(x)`` for a whole sequence, plain torch code, for every kind of
      derivative (``torch.func``, DualTensors, second order).

    What is exact online: the gradient of every parameter of this cell, and of whatever stands above it, at parameters
    that stay fixed. The gradient with respect to x is that of the same window: of a stack of online cells the last one
    is exact, those below lose the credit that a later window of the layers above owes to their earlier outputs
    (longer windows lose less; where x is data nothing is lost). If an optimizer steps between windows the sensitivities
    of the past stay those at the parameters of their time, as online learning does; they fade as the recurrence
    forgets. ``step(x, state.without_traces())`` is plain inference.

    A subclass sets the class variables and gives `advance`, and `output` where it is not the first state. Derivatives
    come from duals unless it gives `linearise` and `pull`; `coefficients` says that f is affine in s. Where states and
    derivatives are cheaper found together it gives `along`, and for a window in closed form `ahead` and `back`.

    Args:
        input_size: I, inputs.
        hidden_size: N, units.

    Shape:
        ``step``: x: (B, I) -> y: (B, N); ``window`` and ``forward``: x: (T, B, I) -> y: (T, B, N).

    Raises:
        DualInputError: Integer inputs, an empty window, sizes below 1.
        DualShapeError: Inputs or a state of another shape, dtype or device.
        UnsupportedOpError: Online steps on DualTensors or within ``torch.func``.
        RuntimeError: (torch's own) a second derivative of the online node; backward after an optimizer has changed the
            weights in place since that window.

    Reference:
        Mozer, "A focused backpropagation algorithm for temporal pattern recognition", Complex Systems 3, 1989. Zucchet,
        Meier, Schug, Mujika, Sacramento, "Online learning of long-range dependencies", 2023, arXiv 2305.15947.
    """

    states: ClassVar[int] = 1
    gates: ClassVar[int] = 1
    rows: ClassVar[int] = 1  # of the weight, for each unit
    own_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise DualInputError(f"{type(self).__name__}: {name} must be an integer >= 1, got {size!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.chunk = 0
        self.compiled: Callable[..., tuple[Tensor, ...]] | None = None
        self.weight = nn.Parameter(torch.empty(self.rows * hidden_size, input_size))
        self.bias = nn.Parameter(torch.zeros(self.rows * hidden_size))
        nn.init.normal_(self.weight, std=input_size**-0.5)

    # -- what a subclass says -----------------------------------------------------------------------------------------

    def advance(self, state: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]) -> Sequence[Tensor]:
        """The next state, ``(…, B, N)`` each: elementwise torch code."""
        raise NotImplementedError

    def coefficients(self, drives: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Rows, Sequence[Tensor]] | None:
        """(A, b) of ``A s + b``, the next state, if f is that; ``(T, B or 1, N)`` each."""
        return None

    def linearise(
        self, before: Sequence[Tensor], after: Sequence[Tensor], drives: Sequence[Tensor], own: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor | None]]:
        """The steps' local derivatives, all steps at once: by duals, if a subclass has no closed form.

        Returns:
            The Jacobian in the state, S rows of S tensors ``(T, B or 1, N)``; and what `pull` needs.
        """
        s, g = len(before), len(drives)
        rows = partials(lambda *a: self.advance(a[:s], a[s : s + g], a[s + g :]), [*before, *drives, *own])
        return [r[:s] for r in rows], [t for r in rows for t in r[s:]]

    def pull(self, kept: Sequence[Any], vector: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A vector times the derivatives in the drives and, summed over the steps, in the own parameters.

        Args:
            kept: From `linearise`.
            vector: S tensors ``(T, B or 1, N)``.
            own: The own parameters.

        Returns:
            ``(T, B or 1, G, N)`` and ``(B or 1, P, N)``.
        """
        columns = self.gates + len(own)
        found = []
        for c in range(columns):
            total: Tensor | None = None
            for v, f in zip(vector, kept[c::columns], strict=True):
                if f is not None:
                    total = v * f if total is None else torch.addcmul(total, v, f)
            found.append(torch.zeros_like(vector[0]) if total is None else total)
        drives, mine = torch.stack(found[: self.gates], 2), [f.sum(0) for f in found[self.gates :]]
        return drives, torch.stack(mine, 1) if mine else drives.new_zeros(drives.shape[1], 0, drives.shape[3])

    def output(self, state: Sequence[Tensor]) -> Tensor:
        """What the layers above see."""
        return state[0]

    def output_adjoint(self, grad: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Cotangents of the states from that of the output."""
        return [grad, *[None] * (len(state) - 1)]

    def drives(self, projected: Tensor) -> tuple[Tensor, ...]:
        """``W x + b``, ``(…, R N)``, as G tensors ``(…, N)``."""
        return projected.chunk(self.gates, -1)

    def packed(self, drives: Tensor) -> Tensor:
        """The transpose of `drives`: cotangents ``(…, G, N)`` as ``(…, R N)``."""
        return drives.flatten(-2)

    def along(
        self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, list[Tensor | None]]:
        """The states after every step of a window, the Jacobians ``(T, S, S, B or 1, N)``, and what `pull` needs."""
        before, after = self.run(start, projected, own)
        rows, kept = self.linearise(before, after, self.drives(projected), own)
        return after, matrices(rows, after[0]), kept

    def ahead(
        self, state: OnlineState, x: Tensor, weight: Tensor, bias: Tensor, *own: Tensor
    ) -> tuple[Sequence[Tensor], list[Tensor | None], Tensor, Tensor]:
        """A window's states, what `back` needs, and the new sensitivities; see `node` for what they are."""
        return ahead(self, state, x, weight, bias, *own)

    def back(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor],
        traces: Sequence[Tensor],
        after: Sequence[Tensor],
        kept: list[Tensor | None],
        wants_x: bool,
    ) -> list[Tensor | None]:
        """Gradients of x and of the parameters from the output's cotangent."""
        return back(self, grad, x, parameters, traces, after, kept, wants_x)

    # -- what they share ----------------------------------------------------------------------------------------------

    @property
    def own(self) -> list[Tensor]:
        """The parameters of the recurrence."""
        return [getattr(self, name) for name in self.own_names]

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the state."""
        return self.weight.dtype

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.input_size}, {self.hidden_size}"

    def start(self, batch_size: int, traces: bool = True) -> OnlineState:
        """The state before the first step: zeros.

        Args:
            batch_size: B; zero is allowed.
            traces: Whether sensitivities are carried.
        """
        like, dtype = self.weight, self.state_dtype
        shape = (batch_size, self.hidden_size)
        values = tuple(like.new_zeros(shape, dtype=dtype) for _ in range(self.states))
        if not traces:
            return OnlineState(values)
        n, s = self.hidden_size, self.states
        return OnlineState(
            values,
            like.new_zeros((batch_size, self.input_size + 1, s, self.gates, n), dtype=dtype),
            like.new_zeros((batch_size, s, len(self.own_names), n), dtype=dtype),
        )

    def fuse(self, chunk: int = 16) -> None:
        """Compile the part of a window that must go step by step: ``chunk`` steps become one program.

        For cells that are not linear in their state, in windows of several chunks. The first window then takes some ten
        seconds, later ones of any length a fraction (`dualnn.compile`); results change by rounding. A copy of the cell
        is not fused.

        Args:
            chunk: Steps in one program; 0 goes back.

        Raises:
            DualInputError: A negative chunk.
        """
        if chunk < 0:
            raise DualInputError(f"chunk must be >= 0, got {chunk}")
        self.chunk = chunk
        # A lambda: the parameters are arguments already, not the module's to be found.
        self.compiled = compile(lambda *a: self._chunk(*a)) if chunk else None

    def __getstate__(self) -> Any:
        return {**self.__dict__, "chunk": 0, "compiled": None}

    def step(self, x: Tensor, state: OnlineState | None = None) -> tuple[Tensor, OnlineState]:
        """One step online.

        Args:
            x: Input.
            state: From the step before; None starts anew, with traces.

        Returns:
            The output, whose backward pass gives the gradient over the whole past, and the next state.
        """
        if isinstance(x, Tensor) and x.dim() != 2:
            raise DualShapeError(f"step needs x of shape (B, {self.input_size}), got {tuple(x.shape)}: see window")
        y, state = self.window(x.unsqueeze(0) if isinstance(x, Tensor) else x, state)
        return y[0], state

    @untraced
    def window(self, x: Tensor, state: OnlineState | None = None) -> tuple[Tensor, OnlineState]:
        """Several steps online, at the cost of few: within a window everything is done for all steps at once.

        Args:
            x: Inputs.
            state: From the window before; None starts anew, with traces.

        Returns:
            The outputs and the next state.
        """
        self._check(x)
        if state is None:
            state = self.start(x.shape[1])
        self._check_state(x, state)
        if top_level((x, *self.parameters())):
            raise UnsupportedOpError(
                "online steps carry sensitivities of their own, which do not take DualTensors: call the cell itself, "
                "cell(x), which keeps nothing on duals either"
            )
        with torch.autocast(x.device.type, enabled=False):  # sensitivities of bf16 would not be worth carrying
            if state.weight is None:
                with torch.no_grad():
                    _, after = self.run(state.values, self._projected(x), self.own)
                    return self.output(after), OnlineState(tuple(a[-1].clone() for a in after))
            y, *new = Window.apply(self, state, x, self.weight, self.bias, *self.own)  # type: ignore[no-untyped-call]
        return y, OnlineState(tuple(new[: self.states]), new[-2], new[-1])

    def forward(self, x: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A whole sequence, as autograd records it.

        Args:
            x: Inputs.
            state: S tensors ``(B, N)``; None for zeros. Detach them to truncate.

        Returns:
            The outputs and the last state.
        """
        self._check(x)
        values = self.start(x.shape[1], traces=False).values if state is None else tuple(state)
        after = self.recorded(values, self._projected(x), self.own)
        return self.output(after), tuple(a[-1] for a in after)

    def recorded(self, values: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """The states after every step, one step after the other; a subclass may know quicker code."""
        now, seen = tuple(values), []
        for drives in zip(*(u.unbind(0) for u in self.drives(projected)), strict=True):
            now = tuple(self.advance(now, drives, own))
            seen.append(now)
        return [torch.stack(s) for s in zip(*seen, strict=True)]

    def values(self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """As `recorded`, where nothing is recorded: a subclass may leave out what matters to derivatives only."""
        return self.recorded(start, projected, own)

    def run(
        self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The states before and after every step of a window."""
        found = self.coefficients(self.drives(projected), own)
        if found is not None:
            rates, added = found
            after = list(
                scan(matrices(rates, added[0]), torch.stack(list(added), 1), torch.stack(list(start))).unbind(1)
            )
        elif self.compiled is not None:
            after = self._in_chunks(start, projected, own)
        else:
            after = self.values(start, projected, own)
        return [torch.cat([v.unsqueeze(0), a[:-1]]) for v, a in zip(start, after, strict=True)], after

    def _in_chunks(self, start: Sequence[Tensor], projected: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """Several steps a call of one compiled program; what remains, step by step."""
        steps, now, seen = self.chunk, list(start), []
        for part in projected.split(steps):
            run = self.compiled if len(part) == steps else self._chunk
            found = run(part.contiguous(), *(n.contiguous() for n in now), *own)  # type: ignore[misc]
            now = [f[-1] for f in found]
            seen.append(found)
        return [torch.cat(s) for s in zip(*seen, strict=True)]

    def _chunk(self, projected: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.values(rest[: self.states], projected, rest[self.states :]))

    def _projected(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def _check(self, x: Any) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DualInputError(f"{name} needs a floating point tensor, got {got}: convert it (x.float())")
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise DualShapeError(f"{name} needs x of shape (T, B, {self.input_size}), got {tuple(x.shape)}")
        if x.shape[0] == 0:
            raise DualInputError(f"{name} needs at least one step, got x of shape {tuple(x.shape)}")

    def _check_state(self, x: Tensor, state: Any) -> None:
        name = type(self).__name__
        if not isinstance(state, OnlineState):
            raise DualInputError(f"{name}: state must come from start, step or window, got {type(state).__name__}")
        if x.dtype != self.weight.dtype or x.device != self.weight.device:
            raise DualShapeError(
                f"{name}: x is {x.dtype} on {x.device}, the weights {self.weight.dtype} on {self.weight.device}"
            )
        expected = self._shapes(x.shape[1], state.weight is not None)
        given = [None if t is None else (tuple(t.shape), t.dtype, t.device) for t in self._tensors(state)]
        if given != expected:
            pairs = zip(given, expected, strict=False)
            wrong = next((p for p in pairs if p[0] != p[1]), (f"{len(given)} tensors", f"{len(expected)}"))
            raise DualShapeError(
                f"{name}: this state is not of this cell, or of another batch: got {wrong[0]}, expected {wrong[1]} "
                "(start(batch_size) makes one, state.reset(ended) begins single samples anew)"
            )

    def _tensors(self, state: OnlineState) -> list[Tensor | None]:
        return [*state.values, state.weight, state.own]

    def _shapes(self, batch: int, traces: bool) -> list[Any]:
        n, s, dtype, device = self.hidden_size, self.states, self.state_dtype, self.weight.device
        found: list[Any] = [((batch, n), dtype, device)] * s
        if not traces:
            return [*found, None, None]
        weight = (batch, self.input_size + 1, s, self.gates, n)
        return [*found, (weight, dtype, device), ((batch, s, len(self.own_names), n), dtype, device)]
