"""What a dual answers without carrying a derivative: metadata, comparisons, creation, Python's protocols."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.dual_tensor import DualTensor, make, primal_of, top_level
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.generic import plain
from dualnn.engine.inplace import write
from dualnn.engine.registry import register, spellings, unsupported
from dualnn.engine.tangents import Zero

# Comparisons, predicates and positions: their results are constants almost everywhere.
plain(
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "not_equal",
    "isnan",
    "isinf",
    "isfinite",
    "isposinf",
    "isneginf",
    "isclose",
    "allclose",
    "equal",
    "signbit",
    "is_nonzero",
    "argmax",
    "argmin",
    "argsort",
    "nonzero",
    "count_nonzero",
    "all",
    "any",
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bucketize",
    "searchsorted",
    "histc",
    "bincount",
    "multinomial",
    "is_same_size",
    functions=[
        Tensor.__eq__,
        Tensor.__ne__,
        Tensor.__lt__,
        Tensor.__le__,
        Tensor.__gt__,
        Tensor.__ge__,
        Tensor.__floordiv__,
        Tensor.__rfloordiv__,
        torch.floor_divide,
        Tensor.floor_divide,
    ],
)

# Metadata and scalars: read from the value.
plain(
    "numel",
    "dim",
    "size",
    "stride",
    "element_size",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "get_device",
    "storage_offset",
    "nelement",
    "ndimension",
    "item",
    "tolist",
    "result_type",
    "can_cast",
    "is_conj",
    "is_neg",
    "is_inference",
    "data_ptr",
    "is_pinned",
    "is_shared",
    functions=[
        Tensor.__len__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__bool__,
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.__contains__,
        Tensor.__format__,
    ],
)
for _getter in (
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_mps",
    "is_sparse",
    "is_sparse_csr",
    "is_quantized",
    "is_mkldnn",
    "is_nested",
    "is_xpu",
    "is_mtia",
    "is_maia",
    "is_ipu",
    "is_xla",
    "is_vulkan",
    "layout",
    "names",
    "grad_fn",
    "is_leaf",
    "_version",
    "output_nr",
    "itemsize",
    "nbytes",
    "retains_grad",
    "grad",
    "_backward_hooks",
    "name",
):
    _attribute = getattr(Tensor, _getter, None)
    if hasattr(_attribute, "__get__") and not callable(_attribute):
        register(_attribute.__get__, rule=lambda func, args, kw, _name=_getter: getattr(primal_of(args[0]), _name))


def _detach(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Drop the tangents of all levels and the reverse graph: a constant to every derivative, as in torch.func."""
    return args[0]._primal.detach()


register(Tensor.detach, torch.detach, Tensor.data.__get__, rule=_detach)  # type: ignore[attr-defined]


def _iterate(func: Callable, args: tuple, kwargs: dict) -> Any:
    return iter(args[0].unbind(0))


register(Tensor.__iter__, rule=_iterate)


FILLED = ("full_like", "new_full", "new_tensor")  # they take numbers, which torch would read from the dual


def _like(name: str) -> None:
    """``zeros_like``, ``new_zeros`` and their kin of a dual are dual, so that they can be written into."""

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        x = args[0] if args else kwargs["input"]
        if name in FILLED and top_level((*args[1:], *kwargs.values())) > 0:
            raise unsupported(
                func, "would copy the value of a dual and lose its tangents (to fill or copy, use x.expand or x.clone)"
            )
        value = func(*[_below(a) for a in args], **{k: _below(v) for k, v in kwargs.items()})
        if not isinstance(x, DualTensor) or not (value.dtype.is_floating_point or value.dtype.is_complex):
            return value
        return make(value, Zero(x._tan.num), x._level)

    register(*spellings(name), rule=rule)


def _below(x: Any) -> Any:
    return x._primal if isinstance(x, DualTensor) else x


for _name in (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_tensor",
    "bernoulli",
):
    _like(_name)


def _overwrite(name: str) -> None:
    """``zero_``, ``fill_``, ``copy_``, … : the destination forgets what it held."""

    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        target = args[0]
        if not isinstance(target, DualTensor):
            return write(target, None, func)
        if name == "zero_":
            return write(target, torch.zeros_like(target._primal), func)
        source = args[1]
        if not isinstance(source, Tensor):
            source = torch.full_like(target._primal, source)
        # A copy: the source may be overwritten afterwards.
        return write(target, source.to(target.dtype).expand(target.shape).clone(), func)

    register(*spellings(name), rule=rule)


for _name in ("zero_", "fill_", "copy_"):
    _overwrite(_name)


def _refuse(why: str) -> Callable:
    def rule(func: Callable, args: tuple, kwargs: dict) -> Any:
        raise UnsupportedOpError(why)

    return rule


register(
    Tensor.numpy,
    Tensor.__array__,
    rule=_refuse(
        "a DualTensor has no numpy form: its tangents would be lost. Use x.primal.numpy() (and x.tangent.numpy()), or "
        "x.detach() for the value alone."
    ),
)
register(
    Tensor.__dlpack__,  # its kernel reads the storage, which a dual has not: the process would crash
    Tensor.__dlpack_device__,
    Tensor.__cuda_array_interface__.__get__,  # type: ignore[attr-defined]
    Tensor.untyped_storage,
    Tensor.share_memory_,
    rule=_refuse(
        "a DualTensor has no storage of its own to share: its tangents would be lost. Share x.primal and x.tangent."
    ),
)
register(
    Tensor.backward,
    rule=_refuse("backward() was called on a DualTensor: its derivative is already there, in .tangent."),
)


def _broadcast(func: Callable, args: tuple, kwargs: dict) -> Any:
    tensors = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


register(torch.broadcast_tensors, torch.functional.broadcast_tensors, rule=_broadcast)
