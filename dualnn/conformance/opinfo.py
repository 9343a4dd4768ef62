"""PyTorch's own databases of ops and modules, as cases."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dualnn.conformance.case import Case, case_of
from dualnn.engine.parameters import swapped

# Piecewise constant or linear in an argument, with many steps: a long difference measures the staircase's slope.
STAIRCASES = frozenset({"div.trunc_rounding", "div.floor_rounding", "fmod", "remainder", "round.decimals_3"})
SMALL_STEP = 1e-7
LARGE = 20_000  # numbers: a few samples are sized for speed tests
# Arguments that the database differentiates and that are labels: the op compares them with 1.
LABELS = {"nn.functional.hinge_embedding_loss": 0, "nn.functional.cosine_embedding_loss": 1}
# Not cases of one function of its tensors' values, with the reason.
LEFT_OUT = {"as_strided.partial_views": "its arguments are views of one larger storage, which it reads beyond them"}
# In complex numbers torch itself refuses their gradient, which says which results are differentiable.
REAL_RESULT = frozenset({"to_sparse"})


def databases() -> tuple[list[Any], list[Any]]:
    """``(op_db, module_db)`` of the installed torch.

    Raises:
        ImportError: ``expecttest``, which torch's test helpers import, is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test helpers warn of packages that they could use
        try:
            from torch.testing._internal.common_methods_invocations import op_db
            from torch.testing._internal.common_modules import module_db
        except ImportError as error:
            raise ImportError(
                f"torch's op database could not be imported ({error}): pip install 'dualnn[dev]' brings expecttest"
            ) from error
    return op_db, module_db


def op_entries(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ops of the database that torch says can be differentiated, by full name."""
    found = {}
    for op in databases()[0]:
        if op.supports_autograd and dtype in op.supported_dtypes("cpu") and op.full_name not in LEFT_OUT:
            found[op.full_name] = op
    return found


def spread(cases: Sequence[Any], limit: int | None) -> list[tuple[int, Any]]:
    """At most ``limit`` of them, evenly spread, with their numbers."""
    total = len(cases)
    if limit is None or total <= limit:
        return list(enumerate(cases))
    return [(i, cases[i]) for i in sorted({round(k * (total - 1) / max(limit - 1, 1)) for k in range(limit)})]


def op_cases(op: Any, limit: int | None = None, dtype: torch.dtype = torch.float64) -> Iterator[Case]:
    """The database's samples of an op.

    ``gradcheck_wrapper`` is applied (it makes symmetric, triangular, … inputs out of any), results go through the
    sample's ``output_process_fn_grad``.
    """
    torch.manual_seed(0)
    samples = [s for s in op.sample_inputs("cpu", dtype, requires_grad=True)]
    labels = [s.args[LABELS[op.full_name]] for s in samples if op.full_name in LABELS]
    for label in labels:
        label.requires_grad_(False)
    for number, sample in spread(samples, limit):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = case_of(
                op.full_name,
                number,
                _wrapped(op, sample.output_process_fn_grad),
                ((sample.input, *sample.args), sample.kwargs),
                lambda t: t.requires_grad,
            )
        if case is not None and sum(t.numel() for t in case.tensors) <= LARGE:
            case.step = SMALL_STEP if op.full_name in STAIRCASES else case.step
            yield case


def complex_entries() -> dict[str, Any]:
    """Ops that torch differentiates in complex numbers."""
    return {name: op for name, op in op_entries(torch.complex128).items() if name not in REAL_RESULT}


def complex_cases(op: Any, limit: int | None = None) -> Iterator[Case]:
    """The database's complex samples of an op."""
    return op_cases(op, limit, torch.complex128)


def _wrapped(op: Any, process: Callable) -> Callable:
    def function(*args: Any, **kwargs: Any) -> Any:
        return process(op.gradcheck_wrapper(op.op, *args, **kwargs))

    return function


def module_entries() -> dict[str, Any]:
    """Modules of the database, by name."""
    return {info.name: info for info in databases()[1]}


def module_cases(info: Any, limit: int | None = None) -> Iterator[Case]:
    """The database's samples of a module, in both modes, with its parameters among the differentiated tensors."""
    numbers = itertools.count()
    for training in (True, False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
        for _, sample in spread(samples, limit):
            number = next(numbers)
            if sample.forward_input is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arguments = sample.constructor_input
                torch.manual_seed(0)
                module = info.module_cls(*arguments.args, **arguments.kwargs).double().train(training)
                case = _module_case(info.name, number, module, sample.forward_input)
            if case is not None:
                yield case


def _module_case(name: str, number: int, module: torch.nn.Module, inputs: Any) -> Case | None:
    parameters = dict(module.named_parameters())
    if any(is_lazy(p) for p in parameters.values()):  # without a shape yet
        return None
    buffers = {key: value.clone() for key, value in module.named_buffers()}

    def function(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for key, value in module.named_buffers():
                value.copy_(buffers[key])
        with swapped(module, {parameters[key]: w for key, w in weights.items()}):
            return module(*args, **kwargs)

    arguments = ((dict(parameters), *inputs.args), inputs.kwargs)
    return case_of(name, number, function, arguments, lambda t: t.requires_grad)
