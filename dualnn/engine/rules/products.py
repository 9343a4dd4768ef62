"""Products: matmul and its kin, linear, einsum, convolutions. Bilinear: one term per operand that has a tangent.

K is folded so that a product of K directions is one GEMM (or one convolution), never K of them; a low-rank tangent
of a weight goes through its factors, at R inner products per sample instead of a matrix product.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualnn.engine.dual_tensor import count, make, split, top_level
from dualnn.engine.errors import UnsupportedOpError
from dualnn.engine.generic import every, folded, operands
from dualnn.engine.registry import Sample, register
from dualnn.engine.tangents import Dense, LowRank, Tangent, Zero, aligned

Rand = Callable[..., Tensor]


def _plus(a: Tangent | None, b: Tangent | None) -> Tangent | None:
    return b if a is None else a.plus(b)


def _matmul_first(t: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for directions of a: ``(K, *a) -> (K, *out)``."""
    if b.dim() == 1:
        return t @ b
    if t.dim() == 2:  # a is a vector
        return t @ b if b.dim() == 2 else (aligned(t, b.dim() - 1).unsqueeze(-2) @ b).squeeze(-2)
    return aligned(t, b.dim()) @ b


def _matmul_second(a: Tensor, t: Tensor) -> Tensor:
    """``a @ b`` for directions of b."""
    if t.dim() == 2:  # b is a vector
        if a.dim() == 1:
            return t @ a
        return (a @ t.reshape(t.shape[0], *(1,) * (a.dim() - 2), -1, 1)).squeeze(-1)
    if a.dim() == 1:
        return (a.unsqueeze(0) @ t).squeeze(-2)
    return a @ aligned(t, a.dim())


def _matmul_samples(rand: Rand) -> list[Sample]:
    shapes = [
        ((2, 3), (3, 4)),
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((2, 3), (5, 3, 4)),
        ((3,), (5, 3, 4)),
        ((5, 2, 3), (3,)),
        ((5, 1, 2, 3), (6, 3, 4)),
        ((0, 3), (3, 2)),
    ]
    return [Sample((rand(*a), rand(*b))) for a, b in shapes]


@operands("matmul", _matmul_samples, also=[Tensor.__matmul__])
def _matmul(y: Tensor, t: dict, input: Tensor, other: Tensor) -> Tangent | None:
    tan = t["input"] and t["input"].map(lambda d: _matmul_first(d, other))
    return _plus(tan, t["other"] and t["other"].map(lambda d: _matmul_second(input, d)))


for _name, _shapes in {
    "mm": ((2, 3), (3, 4)),
    "bmm": ((5, 2, 3), (5, 3, 4)),
    "mv": ((2, 3), (3,)),
    "dot": ((3,), (3,)),
}.items():
    operands(_name, lambda rand, s=_shapes: [Sample((rand(*s[0]), rand(*s[1])))])(
        lambda y, t, input, other: _matmul(y, t, input, other)
    )

register(Tensor.__rmatmul__, rule=lambda func, args, kwargs: torch.matmul(args[1], args[0]))


@operands("outer", lambda rand: [Sample((rand(2), rand(3)))], also=[torch.ger, Tensor.ger])
def _outer(y: Tensor, t: dict, input: Tensor, other: Tensor) -> Tangent | None:
    tan = t["input"] and t["input"].map(lambda d: d.unsqueeze(-1) * other)
    return _plus(tan, t["other"] and t["other"].map(lambda d: input.unsqueeze(-1) * d.unsqueeze(-2)))


def _affine(name: str, shapes: tuple, product: Callable) -> None:
    """``addmm``-like: beta * input + alpha * (a @ b)."""

    def push(y: Tensor, t: dict, input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        tan = product(y, {"input": t["a"], "other": t["b"]}, a, b)
        tan = tan and tan.scale(alpha, y.shape)
        return _plus(tan, t["input"] and t["input"].scale(beta, y.shape))

    operands(name, lambda rand: [Sample(tuple(rand(*s) for s in shapes), {"beta": 0.5, "alpha": 2.0})])(push)


_affine("addmm", ((4,), (2, 3), (3, 4)), _matmul)
_affine("baddbmm", ((2, 4), (5, 2, 3), (5, 3, 4)), _matmul)
_affine("addmv", ((2,), (2, 3), (3,)), _matmul)
_affine("addr", ((2, 3), (2,), (3,)), _outer)


@operands(
    "linear",
    lambda rand: [
        Sample((rand(2, 3), rand(4, 3), rand(4))),
        Sample((rand(3), rand(4, 3))),
        Sample((rand(5, 2, 3), rand(4, 3), rand(4))),
        Sample((rand(2, 3), rand(3))),
    ],
)
def _linear(y: Tensor, t: dict, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tangent | None:
    r"""y = x W^T + b, so dy = dx W^T + x dW^T + db; for dW = sum_r a_r b_r^T, x dW^T = sum_r (x . b_r) a_r."""
    tan = t["input"] and t["input"].map(lambda d: F.linear(d, weight))
    tw = t["weight"]
    if isinstance(tw, LowRank):
        a, b = tw.factors()
        rows = input.reshape(-1, input.shape[-1])
        inner = F.linear(rows, b.flatten(0, 1)).unflatten(1, b.shape[:2]).transpose(0, 1)  # (K, rows, R)
        spread = a.to(inner.dtype)
        if type(tan) is Dense and tan.data.dtype == inner.dtype:
            data = torch.baddbmm(tan.data.reshape(tw.num, -1, weight.shape[0]), inner, spread)
            tan = Dense(data.reshape(tw.num, *y.shape))
        else:
            tan = _plus(tan, Dense((inner @ spread).reshape(tw.num, *y.shape)))
    elif tw is not None:
        dense = tw.dense()
        if weight.dim() == 1:
            tan = _plus(tan, Dense(_matmul_second(input, dense)))
        else:
            rows = input.reshape(y.shape[:-1].numel(), input.shape[-1])
            tan = _plus(tan, Dense((rows @ dense.transpose(-1, -2)).reshape(dense.shape[0], *y.shape)))
    return _plus(tan, t["bias"] and t["bias"].scale(1.0, y.shape))


@operands("bilinear", lambda rand: [Sample((rand(2, 3), rand(2, 4), rand(5, 3, 4), rand(5)))])
def _bilinear(y: Tensor, t: dict, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    tan = t["input1"] and t["input1"].map(lambda d: torch.einsum("k...i,oij,...j->k...o", d, weight, input2))
    tan = _plus(
        tan, t["input2"] and t["input2"].map(lambda d: torch.einsum("...i,oij,k...j->k...o", input1, weight, d))
    )
    tan = _plus(
        tan, t["weight"] and t["weight"].map(lambda d: torch.einsum("...i,koij,...j->k...o", input1, d, input2))
    )
    return _plus(tan, t["bias"] and t["bias"].scale(1.0, y.shape))


def _einsum(func: Callable, args: tuple, kwargs: dict) -> Any:
    """One term per operand with a tangent: the same contraction with a K index on that operand and the result."""
    equation, *tensors = args
    if not isinstance(equation, str):
        raise UnsupportedOpError("einsum on duals needs the string form: torch.einsum('ij,jk->ik', a, b)")
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = list(tensors[0])
    level = top_level(tensors)
    num = count(level, tensors)
    parts = [split(x, level) for x in tensors]
    values = [p for p, _ in parts]
    value = torch.einsum(equation, *values)
    inputs, result = _explicit(equation)
    free = next(c for c in "kKzZqQxXyYwWvVuUabcdefghij" if c not in equation)
    tan: Tangent | None = None
    for i, (_, t) in enumerate(parts):
        if t is not None:
            terms = [free + s if j == i else s for j, s in enumerate(inputs)]
            moved = f"{','.join(terms)}->{free}{result}"
            tan = _plus(tan, t.map(lambda d, i=i, eq=moved: torch.einsum(eq, *values[:i], d, *values[i + 1 :])))
    return make(value, tan or Zero(num), level)


def _explicit(equation: str) -> tuple[list[str], str]:
    """Operand subscripts and the result's (implicit: letters that occur once, sorted, after the ellipsis)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return inputs, right


register(torch.einsum, torch.functional.einsum, rule=_einsum)


def _conv_weight(conv: Callable, t: Tensor, x: Tensor, groups: int) -> Tensor:
    """Convolve x with K weights at once: K goes into the output channels (of each group)."""
    num, out, *rest = t.shape
    kernels = t.unflatten(1, (groups, out // groups)).transpose(0, 1).reshape(groups * num * (out // groups), *rest)
    y = conv(x, kernels)
    y = y.unflatten(1, (groups, num, out // groups)).movedim(2, 0)  # (K, B, groups, out/groups, ...)
    return y.flatten(2, 3)


def _conv(name: str, spatial: int, samples: Callable) -> None:
    op = getattr(torch, name)

    def push(
        y: Tensor,
        t: dict,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tangent | None:
        batched = input.dim() == spatial + 2
        x = input if batched else input.unsqueeze(0)

        def conv(a: Tensor, w: Tensor) -> Tensor:
            return op(a, w, None, stride, padding, dilation, groups)

        tan: Tangent | None = None
        if t["input"] is not None:
            tan = t["input"].map(lambda d: folded(d, lambda a: conv(a, weight)) if batched else conv(d, weight))
        tw = t["weight"]
        if isinstance(tw, LowRank) and groups == 1:
            # One kernel of a single output channel per direction and rank, then spread over the channels by a.
            a, b = tw.factors()
            inner = conv(x, b.reshape(-1, *weight.shape[1:])).unflatten(1, b.shape[:2])  # (B, K, R, ...)
            spread = torch.einsum("bkr...,kro->kbo...", inner, a.to(inner.dtype))
            tan = _plus(tan, Dense(spread.reshape(-1, *y.shape)))
        elif tw is not None:
            part = _conv_weight(conv, tw.dense(), x, groups)
            tan = _plus(tan, Dense(part if batched else part.squeeze(1)))
        if t["bias"] is not None:
            shape = (-1, *(1,) * spatial)
            tan = _plus(tan, t["bias"].map(lambda d: d.reshape(d.shape[0], *shape)).scale(1.0, y.shape))
        return tan

    operands(name, samples)(push)


_conv(
    "conv1d",
    1,
    lambda rand: [Sample((rand(2, 3, 7), rand(4, 3, 3), rand(4), 2, 1)), Sample((rand(3, 7), rand(4, 3, 3), rand(4)))],
)
_conv(
    "conv2d",
    2,
    lambda rand: [
        Sample((rand(2, 2, 5, 5), rand(3, 2, 3, 3), rand(3)), {"padding": 1}),
        Sample((rand(2, 4, 5, 5), rand(6, 2, 3, 3)), {"groups": 2, "stride": 2}),
        Sample((rand(1, 2, 5, 5), rand(2, 2, 3, 3)), {"padding": "same"}),
    ],
)
_conv("conv3d", 3, lambda rand: [Sample((rand(1, 2, 3, 3, 3), rand(2, 2, 2, 2, 2), rand(2)))])


def _conv_transpose(name: str, spatial: int, samples: Callable) -> None:
    op = getattr(torch, name)

    def push(
        y: Tensor,
        t: dict,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tangent | None:
        batched = input.dim() == spatial + 2

        def conv(a: Tensor, w: Tensor) -> Tensor:
            return op(a, w, None, stride, padding, output_padding, groups, dilation)

        tan: Tangent | None = None
        if t["input"] is not None:
            tan = t["input"].map(lambda d: folded(d, lambda a: conv(a, weight)) if batched else conv(d, weight))
        if t["weight"] is not None:
            tan = _plus(tan, t["weight"].map(lambda d: every(d, lambda w: conv(input, w), y.shape)))
        if t["bias"] is not None:
            shape = (-1, *(1,) * spatial)
            tan = _plus(tan, t["bias"].map(lambda d: d.reshape(d.shape[0], *shape)).scale(1.0, y.shape))
        return tan

    operands(name, samples)(push)


_conv_transpose("conv_transpose1d", 1, lambda rand: [Sample((rand(2, 3, 4), rand(3, 2, 3), rand(2), 2, 1))])
_conv_transpose("conv_transpose2d", 2, lambda rand: [Sample((rand(2, 2, 3, 3), rand(2, 2, 2, 2), rand(2), 2))])
_conv_transpose("conv_transpose3d", 3, lambda rand: [Sample((rand(1, 2, 2, 2, 2), rand(2, 2, 2, 2, 2), rand(2), 2))])
