"""Samples for ops that `trusted` serves (or a rule without samples of its own), for the standard tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.registry import RULES, OpSpec, Sample, add_spec, spellings

Rand = Callable[..., Tensor]


def sampled(
    name: str,
    samples: Callable[[Rand], Iterable[Sample]],
    *,
    functions: Iterable[Callable] = (),
    op: Callable | None = None,
) -> None:
    """Bring samples for an op.

    Args:
        name: Its name in torch.
        samples: As in `OpSpec`.
        functions: Its callables, where they are not simply every spelling of the name.
        op: What the samples call, where the op asks for structured inputs (symmetric, triangular).

    Raises:
        ValueError: No rule serves it.
    """
    found = list(functions) or spellings(name)
    for f in found:
        if f not in RULES:
            raise ValueError(f"{f} has samples, and no rule")
    add_spec(OpSpec(f"trusted.{name}", op or found[0], samples))


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
    sampled(_name, _calls((_of(2, 3),)))
sampled("entr", _calls((V,), low=0.2))
sampled("xlog1py", lambda rand: [Sample((rand(3), rand(3, low=-0.5)))])
sampled("logaddexp2", _calls((V, _of(2, 3))))
sampled("multigammaln", lambda rand: [Sample((rand(3, low=3.0, high=5.0), 2))], functions=[torch.special.multigammaln])
sampled("fmod", lambda rand: [Sample((rand(3), 0.7)), Sample((rand(3), rand(3, low=2.5, high=3.0)))])
sampled("prelu", _calls((_of(2, 3), _of(3)), (_of(2, 3), _of(1))), functions=[torch.nn.functional.prelu, torch.prelu])

# Products, scans and reductions (of products also where factors vanish).
_ZEROS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
sampled("prod", lambda rand: [Sample((rand(2, 3),)), Sample((rand(2, 3), 1)), Sample((_ZEROS.clone(), 1))])
sampled("cumprod", lambda rand: [Sample((rand(2, 3), 1)), Sample((_ZEROS.clone(), 1))])
sampled("logcumsumexp", _calls((_of(2, 3), 1)))
for _name in ("nansum", "nanmean"):
    sampled(_name, _calls((_of(2, 3),), (_of(2, 3), 1)))
for _name in ("std_mean", "var_mean"):
    sampled(_name, _calls((_of(2, 3), 1)), functions=[getattr(torch, _name)])
for _name in ("median", "nanmedian"):
    sampled(_name, _calls((_of(5),), (_of(2, 5), 1)))
sampled("kthvalue", _calls((_of(2, 5), 2)))
sampled("quantile", _calls((_of(2, 5), 0.3, 1)))
sampled("diff", _calls((_of(5),), (_of(2, 4), 2, 1)))
sampled("trapezoid", _calls((_of(5),), (_of(5), _of(5))), functions=[torch.trapezoid, torch.trapz])
sampled("cumulative_trapezoid", _calls((_of(5),)))
sampled("cov", _calls((_of(2, 4),)))
sampled("corrcoef", _calls((_of(2, 4),)))
sampled("dist", _calls((V, V)))
sampled("renorm", _calls((_of(3, 4), 2, 0, 1.0)))
sampled("cosine_similarity", _calls((_of(2, 3), _of(2, 3))), functions=[torch.cosine_similarity])
sampled("pairwise_distance", _calls((_of(2, 3), _of(2, 3))), functions=[torch.pairwise_distance])

# Entries moved and written.
_ROWS = torch.tensor([0, 2])
sampled("index_add", _calls((_of(3, 4), 0, torch.tensor([0, 2, 2]), _of(3, 4))))
sampled("index_copy", _calls((_of(3, 4), 0, _ROWS, _of(2, 4))))
sampled("index_fill", _calls((_of(3, 4), 0, _ROWS, 1.5)))
sampled("index_put", _calls((_of(3, 4), (_ROWS,), _of(2, 4))))
sampled("select_scatter", _calls((_of(2, 3), _of(2), 1, 0)))
sampled("slice_scatter", _calls((_of(4, 3), _of(2, 3), 0, 1, 3)))
sampled("diagonal_scatter", _calls((_of(3, 3), _of(3))))
for _name in ("vstack", "hstack", "dstack"):
    sampled(_name, _calls(([_of(2, 3), _of(2, 3)],)))
sampled("column_stack", _calls(([_of(2, 3), _of(2)],)))
for _name in ("rot90", "fliplr", "flipud", "diagflat"):
    sampled(_name, _calls((_of(2, 3),)))
sampled("channel_shuffle", _calls((_of(1, 4, 2, 2), 2)))
sampled("im2col", _calls((_of(1, 2, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1))))
sampled("col2im", _calls((_of(1, 8, 9), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1))))

# Linear algebra.
sampled("trace", _calls((_of(3, 3),)))
sampled("kron", _calls((_of(2, 2), _of(2, 3))))
sampled("cross", _calls((_of(2, 3), _of(2, 3), 1)))
sampled("linalg.cross", _calls((_of(2, 3), _of(2, 3))), functions=[L.cross])
sampled("inner", _calls((_of(2, 3), _of(4, 3))))
sampled("vdot", _calls((V, V)))
sampled("linalg.vecdot", _calls((_of(2, 3), _of(2, 3))), functions=[L.vecdot])
sampled("addbmm", _calls((_of(2, 4), _of(5, 2, 3), _of(5, 3, 4))))
sampled("linalg.multi_dot", _calls(([_of(2, 3), _of(3, 4), _of(4, 2)],)), functions=[L.multi_dot])
sampled("matrix_power", _calls((_of(3, 3), 3)), functions=[torch.matrix_power, Tensor.matrix_power, L.matrix_power])
sampled("matrix_exp", _calls((_of(3, 3),)), functions=[torch.matrix_exp, Tensor.matrix_exp, L.matrix_exp])
sampled("linalg.matrix_norm", _calls((_of(3, 4),), (_of(3, 4), 2), (_of(3, 4), "nuc")), functions=[L.matrix_norm])
sampled("linalg.norm", _calls((_of(3, 4),), (V, 3)), functions=[L.norm])
sampled("linalg.pinv", _calls((_of(4, 3),)), functions=[L.pinv, torch.pinverse, Tensor.pinverse])
for _name, _functions in {
    "inv": [L.inv, torch.inverse, Tensor.inverse],
    "det": [L.det, torch.det, Tensor.det],
    "slogdet": [L.slogdet, torch.slogdet, Tensor.slogdet],
    "logdet": [torch.logdet, Tensor.logdet],
    "lu": [L.lu],
    "svdvals": [L.svdvals],
}.items():
    sampled(f"linalg.{_name}", lambda rand: [Sample((_regular(rand, 2, 3, 3),))], functions=_functions)
sampled("linalg.qr", lambda rand: [Sample((_regular(rand, 3, 3),)), Sample((rand(4, 3),))], functions=[L.qr])
sampled(
    "linalg.solve",
    lambda rand: [Sample((_regular(rand, 3, 3), rand(3, 2))), Sample((_regular(rand, 3, 3), rand(3)))],
    functions=[L.solve],
)
sampled(
    "linalg.solve_triangular",
    lambda rand: [Sample((_regular(rand, 3, 3), rand(3, 2)), {"upper": True})],
    functions=[L.solve_triangular],
)
# Symmetric arguments: LAPACK reads one triangle, torch's derivative assumes that the direction is symmetric too.
for _name in ("cholesky", "eigvalsh"):
    _op = getattr(L, _name)
    sampled(
        f"linalg.{_name}",
        lambda rand: [Sample((_regular(rand, 3, 3) * 2,))],
        functions=[_op] + ([torch.cholesky, Tensor.cholesky] if _name == "cholesky" else []),
        op=lambda a, op=_op: op((a + a.mT) / 2),
    )
