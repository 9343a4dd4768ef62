"""LSTM, GRU and plain recurrent networks: torch's kernels in plain code, cell by cell.

The products with the input are made for all steps at once; each step then costs one product with the state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.decompose import with_values
from dualnn.engine.registry import OpSpec, Sample, register

State = tuple[Tensor, ...]


def _lstm_step(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    i, f, g, o = (x + F.linear(state[0], w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_projected(x: Tensor, state: State, w: Tensor, b: Tensor | None, projection: Tensor) -> State:
    h, c = _lstm_step(x, state, w, b)
    return F.linear(h, projection), c


def _gru_step(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = F.linear(state[0], w, b).chunk(3, -1)
    reset, update = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    new = torch.tanh(xn + reset * hn)
    return (new + update * (state[0] - new),)


def _plain_step(activation: Callable) -> Callable[..., State]:
    def step(x: Tensor, state: State, w: Tensor, b: Tensor | None) -> State:
        return (activation(x + F.linear(state[0], w, b)),)

    return step


STEPS: dict[str, Callable[..., State]] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}


def _scan(step: Callable, xs: Sequence[Tensor], state: State, reverse: bool) -> tuple[list[Tensor], State]:
    """Run over inputs whose batch may shrink from step to step (packed sequences)."""
    outputs: list[Any] = [None] * len(xs)
    first = state
    order = range(len(xs))
    if reverse:
        # Short sequences enter late: they start from the initial state when their last step comes up.
        state = tuple(s[: xs[-1].shape[0]] for s in first) if xs else first
        for t in reversed(order):
            size = xs[t].shape[0]
            have = state[0].shape[0]
            if size > have:
                state = tuple(torch.cat([s, f[have:size]]) for s, f in zip(state, first, strict=True))
            state = step(xs[t], state)
            outputs[t] = state[0]
        return outputs, state
    ended: list[State] = []
    for t in order:
        size = xs[t].shape[0]
        if size < state[0].shape[0]:
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        state = step(xs[t], state)
        outputs[t] = state[0]
    for tail in reversed(ended):
        state = tuple(torch.cat([s, e]) for s, e in zip(state, tail, strict=True))
    return outputs, state


def _layers(
    kind: str,
    xs: list[Tensor],
    hidden: Sequence[Tensor],
    params: Sequence[Tensor],
    biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[list[Tensor], State]:
    directions = 2 if bidirectional else 1
    projected = kind == "lstm" and len(hidden) == 2 and hidden[0].shape[-1] != hidden[1].shape[-1]
    each = (4 if biases else 2) + projected
    finals: list[list[Tensor]] = [[] for _ in hidden]
    for layer in range(num_layers):
        found = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *rest = params[index * each : (index + 1) * each]
            b_ih, b_hh = rest[:2] if biases else (None, None)
            sizes = [x.shape[0] for x in xs]
            inputs = F.linear(torch.cat(xs), w_ih, b_ih).split(sizes)

            def step(x: Tensor, s: State, w: Tensor = w_hh, b: Any = b_hh, rest: Any = rest) -> State:
                return _lstm_projected(x, s, w, b, rest[-1]) if projected else STEPS[kind](x, s, w, b)

            outputs, final = _scan(step, inputs, tuple(h[index] for h in hidden), direction == 1)
            found.append(outputs)
            for store, f in zip(finals, final, strict=True):
                store.append(f)
        xs = [torch.cat(o, -1) if len(o) > 1 else o[0] for o in zip(*found, strict=True)]
        if dropout and train and layer < num_layers - 1:
            mixed = torch.dropout(torch.stack(xs) if len({x.shape for x in xs}) == 1 else torch.cat(xs), dropout, True)
            xs = list(mixed.unbind(0) if mixed.dim() > xs[0].dim() else mixed.split([x.shape[0] for x in xs]))
    return xs, tuple(torch.stack(store) for store in finals)


def _network(kind: str) -> Callable:
    def run(*args: Any, **_: Any) -> tuple[Tensor, ...]:
        packed = isinstance(args[3], (list, tuple))
        if packed:
            data, sizes, hidden, params, biases, num_layers, dropout, train, bidirectional = args
            xs = list(data.split(sizes.tolist()))
        else:
            data, hidden, params, biases, num_layers, dropout, train, bidirectional, batch_first = args
            xs = list(data.unbind(1 if batch_first else 0))
        states = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden]
        out, final = _layers(kind, xs, states, params, biases, num_layers, dropout, train, bidirectional)
        if packed:
            return (torch.cat(out), *final)
        return (torch.stack(out, 1 if batch_first else 0), *final)

    return run


def _network_rule(run: Callable) -> Callable:
    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        out = run(*args, **kwargs)
        dropout, train = args[6:8] if isinstance(args[3], (list, tuple)) else args[5:7]
        # With dropout the value and the directions must see one mask: both from one run.
        return out if dropout and train else with_values(func, args, kwargs, out)

    return rule


def _samples(kind: str, gates: int) -> Callable:
    def make(r: Any) -> list[Sample]:
        def weights(inputs: int, hidden: int) -> list[Tensor]:
            return [r(gates * hidden, inputs), r(gates * hidden, hidden), r(gates * hidden), r(gates * hidden)]

        def states() -> Any:
            found = [r(2, 2, 3), r(2, 2, 3)] if kind == "lstm" else r(2, 2, 3)
            return found

        return [
            Sample((r(4, 2, 2), states(), [*weights(2, 3), *weights(3, 3)], True, 2, 0.0, False, False, False)),
            Sample((r(2, 4, 2), states(), [*weights(2, 3), *weights(2, 3)], True, 1, 0.0, False, True, True)),
        ]

    return make


for _kind, _gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
    _functions = dict.fromkeys([getattr(torch._VF, _kind), getattr(torch, _kind)])
    _spec = OpSpec(_kind, getattr(torch._VF, _kind), _samples(_kind, _gates))
    register(*_functions, rule=_network_rule(_network(_kind)), spec=_spec)


def _cell(kind: str) -> Callable:
    def run(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        new = STEPS[kind](F.linear(input, w_ih, b_ih), state, w_hh, b_hh)
        return new if kind == "lstm" else new[0]

    return run


def _cell_rule(run: Callable) -> Callable:
    return lambda func, args, kwargs: run(*args, **kwargs)


for _kind in STEPS:
    _name = f"{_kind}_cell"
    _cells = dict.fromkeys([getattr(torch._VF, _name), getattr(torch, _name)])
    register(*_cells, rule=_cell_rule(_cell(_kind)))
