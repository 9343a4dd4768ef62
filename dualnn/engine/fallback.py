"""Guarded fallback: torch's own forward AD for one op at a time, where it is verified, at first order only.

An op in this table has no rule of ours. Its directions are pushed by ``torch.func.vmap`` of ``torch.func.jvp`` of that
one op. Each entry brings samples, and the standard tests compare its first derivative with finite differences on every
torch release in `TESTED`; on another release the table is empty. Second order is not verified (torch is wrong there
for some ops, see THEORY.md), so nested duals and values that autograd records raise.

Not in the table, though torch offers forward AD: ``cholesky_solve`` and ``scatter_reduce("prod")``, whose first
derivative is wrong in torch 2.15.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from dualnn.engine.dual_tensor import DualTensor, count, make, split, top_level
from dualnn.engine.errors import StructureError
from dualnn.engine.registry import RULES, OpSpec, Rule, Sample, add_spec, spellings, unsupported
from dualnn.engine.releases import TESTED, release, warn_untested
from dualnn.engine.rules import trusted  # noqa: F401  (rules come first: what they serve needs no fallback)
from dualnn.engine.tangents import Dense, PerSample, Tangent, Zero

Rand = Callable[..., Tensor]

VERIFIED: set[Callable] = set()


def fallback_rule(func: Callable) -> Rule | None:
    """The rule of a verified op; None for others, and on a torch release that the table does not cover."""
    if func not in VERIFIED:
        return None
    if release() not in TESTED:
        warn_untested(torch.__version__)
        return None
    return _push


@functools.cache
def _load_decompositions() -> None:
    """Torch loads parts of its forward AD at first use, with a deprecation warning about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))


def _push(func: Callable, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("out") is not None:
        raise unsupported(func, "has no dual rule with out=")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    level = top_level(leaves)
    num = count(level, leaves)
    parts = [split(x, level) for x in leaves]
    values = [p for p, _ in parts]
    where = [i for i, (_, t) in enumerate(parts) if t is not None]
    tangents = [parts[i][1].dense() for i in where]  # type: ignore[union-attr]
    kinds = {t.batch if isinstance(t, PerSample) else 0 for _, t in parts if t is not None}
    if len(kinds) > 1:
        raise StructureError(f"{func} combines a value reduced over the batch with one that is not: samples mix")
    for x in [*values, *tangents]:
        _refuse_higher_order(func, x)

    def call(*moved: Tensor) -> Any:
        filled = list(values)
        for i, x in zip(where, moved, strict=True):
            filled[i] = x
        call_args, call_kwargs = pytree.tree_unflatten(filled, spec)
        return func(*call_args, **call_kwargs)

    value = call(*[values[i] for i in where])
    outputs = [value] if isinstance(value, Tensor) else list(value)
    pushed: list[Tangent | None]
    if not where:
        pushed = [Zero(num) if _differentiable(v) else None for v in outputs]
    else:
        batch = kinds.pop()
        dense = _directions(call, [values[i] for i in where], tangents, outputs)
        pushed = [d if d is None else PerSample(d, batch) if batch else Dense(d) for d in dense]
    duals = [v if t is None else make(v, t, level) for v, t in zip(outputs, pushed, strict=True)]
    return duals[0] if isinstance(value, Tensor) else type(value)(duals)


def _directions(call: Callable, primals: list[Tensor], tangents: list[Tensor], outputs: list) -> list[Tensor | None]:
    """The directions of every output, None for integer ones."""
    kept = [i for i, v in enumerate(outputs) if _differentiable(v)]
    if tangents[0].shape[0] == 0:
        return [v.new_zeros((0, *v.shape)) if i in kept else None for i, v in enumerate(outputs)]

    def flat(*moved: Tensor) -> tuple[Tensor, ...]:
        out = call(*moved)
        return (out,) if isinstance(out, Tensor) else tuple(out[i] for i in kept)

    _load_decompositions()
    found = iter(torch.func.vmap(lambda *t: torch.func.jvp(flat, tuple(primals), t)[1])(*tangents))
    return [next(found) if i in kept else None for i in range(len(outputs))]


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def _refuse_higher_order(func: Callable, x: Any) -> None:
    if not isinstance(x, Tensor):
        return
    if isinstance(x, DualTensor) or is_functorch_wrapped_tensor(x) or (torch.is_grad_enabled() and x.requires_grad):
        raise unsupported(
            func,
            "is differentiated by torch's own forward AD, which dualnn has verified at first order only: it cannot be "
            "differentiated twice (nested duals, or duals of tensors that autograd records)",
        )


def verified(
    name: str,
    samples: Callable[[Rand], Iterable[Sample]],
    *,
    functions: Iterable[Callable] = (),
    op: Callable | None = None,
) -> None:
    """Add an op to the table.

    Args:
        name: Its name in torch.
        samples: As in `OpSpec`.
        functions: Its callables, where they are not simply every spelling of the name.
        op: What the samples call, where the op asks for structured inputs (symmetric, triangular).
    """
    found = list(functions) or spellings(name)
    VERIFIED.update(f for f in found if f not in RULES)  # a rule comes first, and goes to any order
    add_spec(OpSpec(f"fallback.{name}", op or found[0], samples, first_order_only=found[0] not in RULES))


def _calls(*calls: tuple, low: float = -2.0) -> Callable[[Rand], list[Sample]]:
    """Samples from tuples whose shapes (tuples in a list of one) stand for random tensors."""
    return lambda rand: [Sample(tuple(_filled(a, rand, low) for a in call)) for call in calls]


class _Shape(tuple):
    """The shape of a random tensor in a sample."""


def _of(*shape: int) -> _Shape:
    return _Shape(shape)


def _filled(a: Any, rand: Rand, low: float) -> Any:
    if isinstance(a, _Shape):
        return rand(*a, low=low)
    return [_filled(x, rand, low) for x in a] if isinstance(a, list) else a


def _regular(rand: Rand, *shape: int) -> Tensor:
    """Matrices far from singular, with singular values apart."""
    return rand(*shape) + torch.diag_embed(torch.arange(3.0, 3.0 + shape[-1], dtype=torch.float64))


L, V = torch.linalg, _of(3)

# Elementwise and special functions.
for _name in ("i0", "i0e", "i1", "i1e"):
    verified(_name, _calls((_of(2, 3),)))
verified("entr", _calls((V,), low=0.2))
verified("xlog1py", lambda rand: [Sample((rand(3), rand(3, low=-0.5)))])
verified("logaddexp2", _calls((V, _of(2, 3))))
verified("multigammaln", lambda rand: [Sample((rand(3, low=3.0, high=5.0), 2))], functions=[torch.special.multigammaln])
verified("fmod", lambda rand: [Sample((rand(3), 0.7)), Sample((rand(3), rand(3, low=2.5, high=3.0)))])
verified("prelu", _calls((_of(2, 3), _of(3)), (_of(2, 3), _of(1))), functions=[torch.nn.functional.prelu, torch.prelu])

# Products, scans and reductions (of products also where factors vanish).
_ZEROS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
verified("prod", lambda rand: [Sample((rand(2, 3),)), Sample((rand(2, 3), 1)), Sample((_ZEROS.clone(), 1))])
verified("cumprod", lambda rand: [Sample((rand(2, 3), 1)), Sample((_ZEROS.clone(), 1))])
verified("logcumsumexp", _calls((_of(2, 3), 1)))
for _name in ("nansum", "nanmean"):
    verified(_name, _calls((_of(2, 3),), (_of(2, 3), 1)))
for _name in ("std_mean", "var_mean"):
    verified(_name, _calls((_of(2, 3), 1)), functions=[getattr(torch, _name)])
for _name in ("median", "nanmedian"):
    verified(_name, _calls((_of(5),), (_of(2, 5), 1)))
verified("kthvalue", _calls((_of(2, 5), 2)))
verified("quantile", _calls((_of(2, 5), 0.3, 1)))
verified("diff", _calls((_of(5),), (_of(2, 4), 2, 1)))
verified("trapezoid", _calls((_of(5),), (_of(5), _of(5))), functions=[torch.trapezoid, torch.trapz])
verified("cumulative_trapezoid", _calls((_of(5),)))
verified("cov", _calls((_of(2, 4),)))
verified("corrcoef", _calls((_of(2, 4),)))
verified("dist", _calls((V, V)))
verified("renorm", _calls((_of(3, 4), 2, 0, 1.0)))
verified("cosine_similarity", _calls((_of(2, 3), _of(2, 3))), functions=[torch.cosine_similarity])
verified("pairwise_distance", _calls((_of(2, 3), _of(2, 3))), functions=[torch.pairwise_distance])

# Entries moved and written.
_ROWS = torch.tensor([0, 2])
verified("index_add", _calls((_of(3, 4), 0, torch.tensor([0, 2, 2]), _of(3, 4))))
verified("index_copy", _calls((_of(3, 4), 0, _ROWS, _of(2, 4))))
verified("index_fill", _calls((_of(3, 4), 0, _ROWS, 1.5)))
verified("index_put", _calls((_of(3, 4), (_ROWS,), _of(2, 4))))
verified("select_scatter", _calls((_of(2, 3), _of(2), 1, 0)))
verified("slice_scatter", _calls((_of(4, 3), _of(2, 3), 0, 1, 3)))
verified("diagonal_scatter", _calls((_of(3, 3), _of(3))))
for _name in ("vstack", "hstack", "dstack"):
    verified(_name, _calls(([_of(2, 3), _of(2, 3)],)))
verified("column_stack", _calls(([_of(2, 3), _of(2)],)))
for _name in ("rot90", "fliplr", "flipud", "diagflat"):
    verified(_name, _calls((_of(2, 3),)))
verified("vander", _calls((V,)), functions=[torch.vander, L.vander])
verified("channel_shuffle", _calls((_of(1, 4, 2, 2), 2)))
verified("im2col", _calls((_of(1, 2, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1))))
verified("col2im", _calls((_of(1, 8, 9), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1))))

# Linear algebra.
verified("trace", _calls((_of(3, 3),)))
verified("kron", _calls((_of(2, 2), _of(2, 3))))
verified("cross", _calls((_of(2, 3), _of(2, 3), 1)))
verified("linalg.cross", _calls((_of(2, 3), _of(2, 3))), functions=[L.cross])
verified("inner", _calls((_of(2, 3), _of(4, 3))))
verified("vdot", _calls((V, V)))
verified("linalg.vecdot", _calls((_of(2, 3), _of(2, 3))), functions=[L.vecdot])
verified("addbmm", _calls((_of(2, 4), _of(5, 2, 3), _of(5, 3, 4))))
verified("linalg.multi_dot", _calls(([_of(2, 3), _of(3, 4), _of(4, 2)],)), functions=[L.multi_dot])
verified("matrix_power", _calls((_of(3, 3), 3)), functions=[torch.matrix_power, Tensor.matrix_power, L.matrix_power])
verified("matrix_exp", _calls((_of(3, 3),)), functions=[torch.matrix_exp, Tensor.matrix_exp, L.matrix_exp])
verified("linalg.matrix_norm", _calls((_of(3, 4),), (_of(3, 4), 2), (_of(3, 4), "nuc")), functions=[L.matrix_norm])
verified("linalg.norm", _calls((_of(3, 4),), (V, 3)), functions=[L.norm])
verified("linalg.pinv", _calls((_of(4, 3),)), functions=[L.pinv, torch.pinverse, Tensor.pinverse])
for _name, _functions in {
    "inv": [L.inv, torch.inverse, Tensor.inverse],
    "det": [L.det, torch.det, Tensor.det],
    "slogdet": [L.slogdet, torch.slogdet, Tensor.slogdet],
    "logdet": [torch.logdet, Tensor.logdet],
    "lu": [L.lu],
    "svdvals": [L.svdvals],
}.items():
    verified(f"linalg.{_name}", lambda rand: [Sample((_regular(rand, 2, 3, 3),))], functions=_functions)
verified("linalg.qr", lambda rand: [Sample((_regular(rand, 3, 3),)), Sample((rand(4, 3),))], functions=[L.qr])
verified(
    "linalg.solve",
    lambda rand: [Sample((_regular(rand, 3, 3), rand(3, 2))), Sample((_regular(rand, 3, 3), rand(3)))],
    functions=[L.solve],
)
verified(
    "linalg.solve_triangular",
    lambda rand: [Sample((_regular(rand, 3, 3), rand(3, 2)), {"upper": True})],
    functions=[L.solve_triangular],
)
# Symmetric arguments: LAPACK reads one triangle, torch's derivative assumes that the direction is symmetric too.
for _name in ("cholesky", "eigvalsh"):
    _op = getattr(L, _name)
    verified(
        f"linalg.{_name}",
        lambda rand: [Sample((_regular(rand, 3, 3) * 2,))],
        functions=[_op] + ([torch.cholesky, Tensor.cholesky] if _name == "cholesky" else []),
        op=lambda a, op=_op: op((a + a.mT) / 2),
    )
