"""Arithmetic on entries as one C++ function: no array between the operations, one loop over the samples.

Where there is a batch, eight samples go side by side in vector variables. Functions without a vector form are called
for one after the other.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = {torch.float64: "D", torch.float32: "F", torch.int64: "I", torch.bool: "M"}
TYPES = {"D": "double", "F": "float", "I": "int64_t", "M": "bool"}

PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
"""
SCALAR = """
typedef double D; typedef float F; typedef int64_t I; typedef bool M;
template <class T> static inline T sel(M m, T a, T b) { return m ? a : b; }
template <class V, class T> static inline V ld(const T* p, int64_t, int64_t) { return *p; }
template <class V, class T> static inline void st(T* p, V x, int64_t, int64_t) { *p = x; }
template <class V, class T> static inline V all(T x) { return (V)x; }
template <class V, class U> static inline V to(U x) { return (V)x; }
static inline M no(M m) { return !m; }
template <class V> static inline M eq(V a, V b) { return a == b; }
template <class V> static inline M lt(V a, V b) { return a < b; }
template <class V> static inline M le(V a, V b) { return a <= b; }
template <class V, class G> static inline V each(G g, V x) { return g(x); }
template <class V, class G> static inline V each(G g, V x, V y) { return g(x, y); }
"""
VECTOR = """
constexpr int W = 8;
typedef double D __attribute__((vector_size(8 * W))); typedef float F __attribute__((vector_size(4 * W)));
typedef int64_t I __attribute__((vector_size(8 * W))); typedef int32_t J __attribute__((vector_size(4 * W)));
struct M { I v; };  // 0 or -1
static inline D sel(M m, D a, D b) { return m.v ? a : b; }
static inline I sel(M m, I a, I b) { return m.v ? a : b; }
static inline F sel(M m, F a, F b) { return __builtin_convertvector(m.v, J) ? a : b; }
static inline M sel(M m, M a, M b) { return {(m.v & a.v) | (~m.v & b.v)}; }
template <class V, class T> struct Load { static inline V of(const T* p, int64_t b, int64_t n) {
  V x; if (b + W <= n) std::memcpy(&x, p + b, sizeof x);
  else for (int l = 0; l < W; ++l) x[l] = p[b + l < n ? b + l : n - 1];
  return x; } };
template <> struct Load<M, bool> { static inline M of(const bool* p, int64_t b, int64_t n) {
  M x; for (int l = 0; l < W; ++l) x.v[l] = -(int64_t)p[b + l < n ? b + l : n - 1];
  return x; } };
template <class V, class T> static inline V ld(const T* p, int64_t b, int64_t n) { return Load<V, T>::of(p, b, n); }
template <class V, class T> static inline void st(T* p, V x, int64_t b, int64_t n) {
  if (b + W <= n) std::memcpy(p + b, &x, sizeof x); else for (int l = 0; b + l < n; ++l) p[b + l] = x[l]; }
static inline void st(bool* p, M x, int64_t b, int64_t n) {
  for (int l = 0; l < W && b + l < n; ++l) p[b + l] = x.v[l] != 0; }
template <class V> struct All;
template <> struct All<D> { static inline D of(double x) { return x - D{}; } };
template <> struct All<F> { static inline F of(float x) { return x - F{}; } };
template <> struct All<I> { static inline I of(int64_t x) { return x - I{}; } };
template <> struct All<M> { static inline M of(bool x) { return {-(int64_t)x - I{}}; } };
template <class V, class T> static inline V all(T x) { return All<V>::of(x); }
template <class V, class U> struct To { static inline V of(U x) { return __builtin_convertvector(x, V); } };
template <class V> struct To<V, M> { static inline V of(M x) { return __builtin_convertvector(x.v & 1, V); } };
template <> struct To<M, M> { static inline M of(M x) { return x; } };
template <class U> struct To<M, U> { static inline M of(U x) { return {To<I, decltype(x != 0)>::of(x != 0)}; } };
template <class V, class U> static inline V to(U x) { return To<V, U>::of(x); }
static inline M no(M m) { return {~m.v}; }
static inline M operator&(M a, M b) { return {a.v & b.v}; }
static inline M operator|(M a, M b) { return {a.v | b.v}; }
static inline M operator^(M a, M b) { return {a.v ^ b.v}; }
template <class V> static inline M eq(V a, V b) { return {__builtin_convertvector(a == b, I)}; }
template <class V> static inline M lt(V a, V b) { return {__builtin_convertvector(a < b, I)}; }
template <class V> static inline M le(V a, V b) { return {__builtin_convertvector(a <= b, I)}; }
static inline M eq(M a, M b) { return no(a ^ b); }
template <class V, class G> static inline V each(G g, V x) {
  V y; for (int l = 0; l < W; ++l) y[l] = g(x[l]); return y; }
template <class V, class G> static inline V each(G g, V x, V z) {
  V y; for (int l = 0; l < W; ++l) y[l] = g(x[l], z[l]); return y; }
"""
AGAIN = """
extern "C" int64_t dualnn_again(void** t, void** spare, int64_t state, int64_t most) {{
  for (int64_t run = 1;; ++run) {{
    dualnn_once(t);
    const bool* flags = (const bool*)t[{flags}];
    bool on = false, look = run == most;
    for (int64_t i = 0; i < {half}; ++i) {{ on |= flags[i]; look |= flags[{half} + i]; }}
    if (look || !on) return run;
    for (int64_t i = 0; i < state; ++i) {{
      void* fresh = run == 1 ? spare[i] : t[i];
      t[i] = t[{inputs} + i];
      t[{inputs} + i] = fresh;
    }}
  }}
}}
"""
# Operations of aten, with {0} … their operands in the type of the result (comparisons: in the operands' common type).
PLAIN = {
    "add.Tensor": "{0} + {1}",
    "sub.Tensor": "{0} - {1}",
    "mul.Tensor": "{0} * {1}",
    "div.Tensor": "{0} / {1}",
    "rsub.Scalar": "{1} - {0}",
    "neg.default": "-{0}",
    "reciprocal.default": "all<{V}>(1) / {0}",
    "abs.default": "sel(lt({0}, all<{V}>(0)), -{0}, {0})",
    "maximum.default": "sel(no(eq({0}, {0})), {0}, sel(lt({1}, {0}), {0}, {1}))",
    "minimum.default": "sel(no(eq({0}, {0})), {0}, sel(lt({0}, {1}), {0}, {1}))",
    "clamp_min.default": "sel(lt({0}, {1}), {1}, {0})",
    "clamp_max.default": "sel(lt({1}, {0}), {1}, {0})",
    "relu.default": "sel(lt({0}, all<{V}>(0)), all<{V}>(0), {0})",
    "sign.default": "sel(lt(all<{V}>(0), {0}), all<{V}>(1), sel(lt({0}, all<{V}>(0)), all<{V}>(-1), all<{V}>(0)))",
    "sigmoid.default": "all<{V}>(1) / (all<{V}>(1) + each([](auto x) {{ return std::exp(-x); }}, {0}))",
    "rsqrt.default": "all<{V}>(1) / each([](auto x) {{ return std::sqrt(x); }}, {0})",
    "pow.Tensor_Scalar": "each([](auto x, auto y) {{ return std::pow(x, y); }}, {0}, {1})",
    "pow.Tensor_Tensor": "each([](auto x, auto y) {{ return std::pow(x, y); }}, {0}, {1})",
    "pow.Scalar": "each([](auto x, auto y) {{ return std::pow(x, y); }}, {0}, {1})",
    "atan2.default": "each([](auto x, auto y) {{ return std::atan2(x, y); }}, {0}, {1})",
    **{
        f"{name}.default": f"each([](auto x) {{{{ return std::{name}(x); }}}}, {{0}})"
        for name in (
            "sqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf "
            "erfc floor ceil trunc"
        ).split()
    },
}
LOGICAL = {
    **dict.fromkeys(("bitwise_and.Tensor", "logical_and.default", "mul.Tensor"), "{0} & {1}"),
    **dict.fromkeys(("bitwise_or.Tensor", "bitwise_or.Scalar", "logical_or.default", "add.Tensor"), "{0} | {1}"),
    **dict.fromkeys(("bitwise_xor.Tensor", "logical_xor.default"), "{0} ^ {1}"),
    **dict.fromkeys(("bitwise_not.default", "logical_not.default"), "no({0})"),
}
COMPARED = {
    "eq": "eq({0}, {1})",
    "ne": "no(eq({0}, {1}))",
    "lt": "lt({0}, {1})",
    "le": "le({0}, {1})",
    "gt": "lt({1}, {0})",
    "ge": "le({1}, {0})",
}


class Op:
    """A number, or one for each sample, that is computed; operands are `Op` or Python numbers.

    Attributes:
        target: Name of the operation, an aten overload; ``"load"`` of (input, offset).
        args: Operands.
        dtype: Of the result.
        varies: Over the batch.
    """

    __slots__ = ("args", "dtype", "target", "varies")

    def __init__(self, target: str, args: tuple[Any, ...], dtype: torch.dtype, varies: bool) -> None:
        self.target, self.args, self.dtype, self.varies = target, args, dtype, varies


def written(
    inputs: Sequence[Tensor],
    batched: Sequence[bool],
    outputs: Sequence[tuple[list[Any], Tensor]],
    ops: Sequence[Op],
    size: int,
) -> Written | None:
    """The program as a C++ function of contiguous tensors, or None where an operation is not in the tables above.

    Args:
        inputs: Tensors like them.
        batched: Whether the last axis of each is the batch.
        outputs: Entries in their order (the batch apart, which is the last axis), and a tensor like the result.
        ops: In the order in which they are computed.
        size: Of the batch; 0: there is none.
    """
    # Imported here: it costs a second, and most users never compile.
    from torch._inductor.codecache import CppCodeCache

    try:
        source = _Source(inputs, outputs, ops, size).text()
    except KeyError:  # an operation or a dtype
        return None
    library = CppCodeCache.load(source, device_type="cpu")
    return Written(library, len(inputs), [(like.shape, like.dtype) for _, like in outputs])


class Written:
    """A program in C++.

    Args:
        library: That holds it.
        inputs: How many.
        likes: Shapes and dtypes of its outputs.
    """

    def __init__(self, library: Any, inputs: int, likes: Sequence[tuple[torch.Size, torch.dtype]]) -> None:
        self.once, self.again = library.dualnn_once, library.dualnn_again
        self.again.restype = ctypes.c_int64
        self.inputs, self.likes = inputs, likes
        self._pointers = ctypes.c_void_p * (inputs + len(likes))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Once."""
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.likes]
        self.once(self._pointers(*(t.data_ptr() for t in (*inputs, *outputs))))
        return outputs

    def repeat(self, inputs: Sequence[Tensor], state: int, most: int) -> tuple[int, list[Tensor], list[Tensor]]:
        """Again and again from where it ended, until its last output says that somebody has to look.

        That output is ``(2, …)`` and bool: go on while any of the first half is set and none of the second.

        Args:
            inputs: To begin with.
            state: How many of them are the first outputs of the run before.
            most: Runs at most.

        Returns:
            How many runs that took, the state before the last one, and what the last one returned.
        """
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.likes]
        others = [torch.empty_like(x) for x in outputs[:state]]
        pointers = self._pointers(*(t.data_ptr() for t in (*inputs, *outputs)))
        spare = (ctypes.c_void_p * state)(*(t.data_ptr() for t in others))
        runs = self.again(pointers, spare, ctypes.c_int64(state), ctypes.c_int64(most))
        if runs % 2:
            return runs, list(inputs[:state]) if runs == 1 else others, outputs
        return runs, outputs[:state], others + outputs[state:]


class _Source:
    """The text; KeyError where something is not in the tables."""

    def __init__(
        self, inputs: Sequence[Tensor], outputs: Sequence[tuple[list[Any], Tensor]], ops: Sequence[Op], size: int
    ) -> None:
        self.size, self.inputs, self.results = size, len(inputs), len(outputs)
        self.names: dict[Op, str] = {}
        self.head: list[str] = []
        self.once: list[str] = []  # before the loop over the samples
        self.body: list[str] = []
        for i, like in enumerate([*inputs, *(like for _, like in outputs)]):
            kind = TYPES[KINDS[like.dtype]]
            if i < len(inputs):
                self.head.append(f"const {kind}* __restrict t{i} = (const {kind}*)t[{i}];")
            else:
                self.head.append(f"{kind}* __restrict t{i} = ({kind}*)t[{i}];")
        needed = _needed([e for entries, _ in outputs for e in entries if isinstance(e, Op)])
        for op in ops:
            if op in needed:
                name = self.names[op] = f"v{len(self.names)}"
                (self.body if op.varies else self.once).append(f"const auto {name} = {self._expression(op)};")
        for i, (entries, like) in enumerate(outputs):
            for offset, entry in enumerate(entries):
                place = f"t{len(inputs) + i} + {offset * max(size, 1)}"
                self.body.append(f"st({place}, {self._as(entry, KINDS[like.dtype])}, b, {size});")

    def text(self) -> str:
        """All of it."""
        loop = f"for (int64_t b = 0; b < {self.size}; b += W) {{" if self.size else "{ constexpr int64_t b = 0;"
        inside = "\n".join([*self.head, *self.once, loop, *self.body, "}"])
        flags = self.inputs + self.results - 1
        again = AGAIN.format(inputs=self.inputs, flags=flags, half=max(self.size, 1))
        kinds = VECTOR if self.size else SCALAR
        return f'{PRELUDE}{kinds}extern "C" void dualnn_once(void** t) {{\n{inside}\n}}\n{again}'

    def _expression(self, op: Op) -> str:
        kind, operands, name = KINDS[op.dtype], op.args, op.target
        if name == "load":
            i, offset = operands
            return f"ld<{kind}>(t{i} + {offset}, b, {self.size})" if op.varies else f"all<{kind}>(t{i}[{offset}])"
        if name == "cast":
            return self._as(operands[0], kind)
        if name == "where.self":
            mask, a, b = operands
            return f"sel({self._as(mask, 'M')}, {self._as(a, kind)}, {self._as(b, kind)})"
        if name == "nan_to_num.default" and len(operands) == 4 and None not in operands:
            x, nan, high, low = (self._as(o, kind) for o in operands)
            inf = f"all<{kind}>(std::numeric_limits<{TYPES[kind]}>::infinity())"
            return f"sel(no(eq({x}, {x})), {nan}, sel(eq({x}, {inf}), {high}, sel(eq({x}, -{inf}), {low}, {x})))"
        if name == "clamp.default":
            x, low, high = (*operands, None)[:3]
            text = self._as(x, kind)
            for form, limit in ((PLAIN["clamp_min.default"], low), (PLAIN["clamp_max.default"], high)):
                text = text if limit is None else form.format(f"({text})", self._as(limit, kind), V=kind)
            return text
        stem = name.split(".")[0]
        if stem in COMPARED:
            kinds = {KINDS[o.dtype] for o in operands if isinstance(o, Op)}
            kinds |= {"D" for o in operands if isinstance(o, float) and kinds <= {"I", "M"}}
            common = next(k for k in "DFIM" if k in kinds)
            if common == "M" and stem not in ("eq", "ne"):
                raise KeyError(name)
            return COMPARED[stem].format(*(self._as(o, common) for o in operands))
        form = (LOGICAL if kind == "M" else PLAIN)[name]
        return form.format(*(self._as(o, kind) for o in operands), V=kind)

    def _as(self, operand: Any, kind: str) -> str:
        if not isinstance(operand, Op):
            return f"all<{kind}>({_number(operand, kind)})"
        own = KINDS[operand.dtype]
        return self.names[operand] if own == kind else f"to<{kind}>({self.names[operand]})"


def _needed(results: list[Op]) -> set[Op]:
    found: set[Op] = set()
    while results:
        op = results.pop()
        if op not in found:
            found.add(op)
            results += [a for a in op.args if isinstance(a, Op)]
    return found


def _number(value: Any, kind: str) -> str:
    if kind in "IM":
        return f"(int64_t){int(value)}LL" if kind == "I" else str(bool(value)).lower()
    value = float(value)
    if math.isnan(value):
        return f"std::numeric_limits<{TYPES[kind]}>::quiet_NaN()"
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}std::numeric_limits<{TYPES[kind]}>::infinity()"
    return f"({TYPES[kind]}){value.hex()}"
