r"""Which entries of a Jacobian are not zero, found with few directions; and the fewest directions that then give them.

*Finding.* Every column j is put into one of c buckets at random and pushed twice, with weight :math:`w_j` and with
:math:`w_j\,j` (in single precision with two digits of j, each on its own). Where a bucket holds a single entry of a
row, the ratio of the two results is its column,

.. math:: \frac{J_{ij} w_j\, j}{J_{ij} w_j} = j,

an integer whose bucket is the right one; where it holds several, the ratio is, with probability one, no such number
(one more random weight makes sure of it). Found entries are taken out of all buckets, which leaves others alone in
theirs (peeling, as in an invertible Bloom lookup table). What is left is looked at again with new buckets, more of them
where that hardly helps. Rows of r entries need of the order of r buckets, whatever the number of columns. Any program
will do: only dense directions are pushed. Entries that vanish at the points looked at, or are within rounding (512
units) of the largest of their row, are not seen; `Sparsity.values` checks each time, along a further direction, that
nothing is missing.

*Using.* Two columns may share a direction if no row holds both: a colouring of the columns (Curtis, Powell, Reid).
Banded Jacobians need lower + upper + 1 colours.

Reference:
    Curtis, Powell, Reid, "On the estimation of sparse Jacobian matrices", J. Inst. Math. Appl. 13, 1974; Goodrich,
    Mitzenmacher, "Invertible Bloom lookup tables", 2011, arXiv 1101.2245.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dualnn.engine.concrete import concrete
from dualnn.engine.errors import DualInputError, StructureError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push

ROUNDS = 2
START = 8
FACTORS = 4  # at most


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """The pattern of a Jacobian, and colours for its columns.

    Attributes:
        rows: Flat output index of each entry, ``(nnz,)``.
        columns: Flat input index of each entry.
        colours: A colour for each input, ``(n,)``; columns of one colour share no row.
        out_shape: Shape of the output.
        in_shape: Shape of the input.
    """

    rows: Tensor
    columns: Tensor
    colours: Tensor
    out_shape: torch.Size
    in_shape: torch.Size

    @property
    def directions(self) -> int:
        """How many tangents give the Jacobian."""
        return int(self.colours.max()) + 1 if self.colours.numel() else 0

    @property
    def bandwidth(self) -> tuple[int, int]:
        """Bands below and above the diagonal."""
        offset = self.columns - self.rows
        return (max(0, int(-offset.min())), max(0, int(offset.max()))) if offset.numel() else (0, 0)

    def __str__(self) -> str:
        """One line: kind, entries, directions."""
        lower, upper = self.bandwidth
        n = self.in_shape.numel()
        kind = "sparse"
        if self.out_shape == self.in_shape and lower == upper == 0:
            kind = "elementwise"
        elif self.directions >= n:
            kind = "dense"
        elif self.out_shape.numel() == n and lower + upper + 1 <= max(self.directions, 1):
            kind = f"banded {lower, upper}"
        return f"{kind}: {self.rows.numel()} entries, {self.directions} directions for {n} inputs"

    def values(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The entries of the Jacobian at ``x``, ``(nnz,)``; differentiable.

        Raises:
            StructureError: The Jacobian has entries outside the pattern there.
        """
        seeds = torch.zeros((self.directions + 1, x.numel()), dtype=x.dtype, device=x.device)
        seeds[self.colours, torch.arange(x.numel(), device=x.device)] = 1
        probe = seeds[-1] = _weights(x, 1)
        y, tan = push(fn, (x,), [Dense(seeds.reshape(-1, *x.shape))])
        pushed = dense_of(tan, y).flatten(1)  # type: ignore[union-attr]
        entries = pushed[self.colours[self.columns], self.rows]
        known = torch.zeros_like(pushed[0]).index_add(0, self.rows, entries * probe[self.columns])
        scale = torch.zeros_like(pushed[0]).index_add(0, self.rows, (entries * probe[self.columns]).abs())
        missing = concrete((pushed[-1] - known).abs() - _looseness(x.dtype) * (scale + (pushed[-1]).abs()))
        if missing.numel() and float(missing.max()) > 0:
            row = int(missing.argmax())
            raise StructureError(
                f"the Jacobian has entries outside the pattern claimed: output {row} depends on further inputs. Detect "
                "the pattern at this point (structure='sparse'), or give a wider bandwidth."
            )
        return entries

    def assembled(self, values: Tensor) -> Tensor:
        """A sparse COO tensor ``(*out_shape, *in_shape)``."""
        index = [*torch.unravel_index(self.rows, self.out_shape), *torch.unravel_index(self.columns, self.in_shape)]
        size = (*self.out_shape, *self.in_shape)
        with warnings.catch_warnings():  # torch 2.11 warns of unchecked invariants though we ask for that by name
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
            return torch.sparse_coo_tensor(torch.stack(index), values, size, is_coalesced=True, check_invariants=False)


def banded(bandwidth: tuple[int, int], x: Tensor, out_shape: torch.Size) -> Sparsity:
    """The pattern of ``(lower, upper)`` bands for an input like ``x``."""
    n, m = x.numel(), out_shape.numel()
    lower, upper = bandwidth
    if lower < 0 or upper < 0:
        raise DualInputError(f"bandwidth must be (lower, upper), both >= 0: got {bandwidth}")
    rows = torch.arange(m, device=x.device).repeat_interleave(lower + upper + 1)
    columns = rows + torch.arange(-lower, upper + 1, device=x.device).repeat(m)
    inside = (columns >= 0) & (columns < n)
    colours = torch.arange(n, device=x.device) % (lower + upper + 1)
    return Sparsity(rows[inside], columns[inside], colours, out_shape, x.shape)


def detect(fn: Callable[[Tensor], Tensor], x: Tensor, *others: Tensor) -> Sparsity:
    """Find the pattern of ``fn``'s Jacobian.

    Args:
        fn: A function of one tensor that returns one.
        x: Where.
        *others: Further points, of x's shape, whose entries are to be in the pattern too (an entry may vanish at x).

    Returns:
        The pattern with a colouring.

    Raises:
        StructureError: The function returns no tensor, or derivatives that are not finite.

    Example:
        >>> import torch
        >>> print(detect(lambda x: x**2 + x.roll(1), torch.rand(1000, dtype=torch.float64)))
        sparse: 2000 entries, 2 directions for 1000 inputs
    """
    n = x.numel()
    keys = []
    with torch.no_grad():
        for point in (x, *others):
            found, shape = _pattern(fn, concrete(point))
            keys.append(found)
    key = torch.unique(torch.cat(keys))
    return _coloured(key // n, key % n, shape, x)


def _pattern(fn: Callable, x: Tensor) -> tuple[Tensor, torch.Size]:
    """Row * n + column of every entry at ``x``, and the shape of the output."""
    n, buckets, spent, known, before = x.numel(), START, 0, None, math.inf
    while spent + ROUNDS * FACTORS * buckets < n:
        spent += ROUNDS * FACTORS * buckets
        known, left, shape = _decoded(fn, x, buckets, known, spent)
        if not left:
            return known[0], shape
        if left > before / 4:  # rows are too full for these buckets
            buckets *= 2
        before = left
    y, tan = push(fn, (x,), [Dense(torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape))])
    dense = dense_of(tan, _tensor(y)).reshape(n, -1)  # type: ignore[union-attr]
    rows, columns = torch.nonzero(_finite(dense).T, as_tuple=True)
    return rows * n + columns, y.shape


def _decoded(
    fn: Callable, x: Tensor, buckets: int, known: tuple[Tensor, Tensor] | None, seed: int
) -> tuple[tuple[Tensor, Tensor], int, torch.Size]:
    """Entries (key and value) after one more look with new buckets, and how many buckets are still unexplained."""
    n = x.numel()
    generator = torch.Generator().manual_seed(seed)
    home = torch.randint(0, buckets, (ROUNDS, n), generator=generator).to(x.device)
    weight = _weights(x, ROUNDS).reshape(ROUNDS, n)
    # The column as one number, or as two digits where the precision is low; from 1, for a zero would say nothing.
    base = n if x.dtype == torch.float64 else math.isqrt(n) + 1
    number = torch.arange(n, device=x.device)
    digits = torch.stack([number % base + 1, number // base + 1][: 1 if base == n else 2]).to(x.dtype)
    close = 1e-6 if base == n else 1e-3  # rounding leaves a ratio far nearer to its integer
    check = _weights(x, 3)[2 * n :].unsqueeze(0)  # the column must have this one as well: neighbours share digits
    factors = torch.cat([torch.ones_like(check), digits, check])  # (F, n)
    seeds = torch.zeros((ROUNDS, len(factors), buckets, n), dtype=x.dtype, device=x.device)
    for r in range(ROUNDS):
        seeds[r, :, home[r], number] = weight[r] * factors
    y, tan = push(fn, (x,), [Dense(seeds.reshape(-1, *x.shape))])
    m = _tensor(y).numel()
    left = _finite(dense_of(tan, y)).reshape(ROUNDS, len(factors), buckets, m).clone()
    noise = 512 * torch.finfo(x.dtype).eps * left.abs().amax((0, 2))  # (F, m): of each row

    def take(key: Tensor, value: Tensor) -> None:
        i, j = key // n, key % n
        for r in range(ROUNDS):
            for f, factor in enumerate(factors):
                left[r, f].index_put_((home[r, j], i), -value * weight[r, j] * factor[j], accumulate=True)

    keys, values = (
        known if known is not None else (torch.zeros(0, dtype=torch.int64, device=x.device), left.new_zeros(0))
    )
    take(keys, values)
    for _ in range(64):
        k, b, i = torch.nonzero(left[:, 0].abs() > noise[0], as_tuple=True)
        first = left[k, 0, b, i]
        ratio = (left[k, 1:, b, i] / first.unsqueeze(1)).T  # the digits, and the check
        whole = ratio[:-1].round()
        digit = whole.long() - 1
        j = digit[0] + (digit[1] * base if len(digits) > 1 else 0)
        claimed = j.clamp(0, n - 1)
        off = torch.cat([ratio[:-1] - whole, ratio[-1:] - check[0, claimed]]).abs()
        # Small entries are left by larger ones with their rounding errors.
        alone = (off < (close + noise[1:, i] / (32 * first.abs())).clamp_max(0.25)).all(0)
        alone &= ((digit >= 0) & (digit < base)).all(0) & (j < n) & (home[k, claimed] == b)
        k, b, i, j = k[alone], b[alone], i[alone], j[alone]
        if not len(k):
            break
        key, place = torch.unique(i * n + j, return_inverse=True)
        value = left.new_zeros(len(key)).index_put((place,), left[k, 0, b, i] / weight[k, j])
        keys, values = torch.cat([keys, key]), torch.cat([values, value])
        take(key, value)
    return (keys, values), int((left.abs() > 8 * noise[None, :, None, :]).sum()), y.shape


def _coloured(rows: Tensor, columns: Tensor, out_shape: torch.Size, x: Tensor) -> Sparsity:
    """Greedy colouring, or the bands' own where that needs no more."""
    n, m = x.numel(), out_shape.numel()
    if not rows.numel():
        return Sparsity(rows, columns, torch.zeros(n, dtype=torch.int64, device=x.device), out_shape, x.shape)
    offset = columns - rows
    width = int(offset.max() - offset.min()) + 1
    fullest = int(torch.bincount(rows, minlength=m).max())
    if width <= fullest:
        colours = torch.arange(n, device=x.device) % width
    else:
        colours = _greedy(rows, columns, n, m).to(x.device)
    return Sparsity(rows, columns, colours, out_shape, x.shape)


def _greedy(rows: Tensor, columns: Tensor, n: int, m: int) -> Tensor:
    """Columns in order, each with the smallest colour that no row of it has."""
    taken: list[set[int]] = [set() for _ in range(m)]
    of_column: list[list[int]] = [[] for _ in range(n)]
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        of_column[j].append(i)
    colours = []
    for mine in of_column:
        forbidden = set().union(*(taken[i] for i in mine)) if mine else set()
        colour = next(c for c in range(len(forbidden) + 1) if c not in forbidden)
        for i in mine:
            taken[i].add(colour)
        colours.append(colour)
    return torch.tensor(colours)


def _weights(x: Tensor, count: int) -> Tensor:
    """Random numbers between 1 and 2, from a generator of their own: the caller's stream does not move."""
    generator = torch.Generator().manual_seed(7)
    return (1 + torch.rand(count * x.numel(), generator=generator, dtype=torch.float64)).to(x)


def _looseness(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 1e-3


def _tensor(y: object) -> Tensor:
    if not isinstance(y, Tensor):
        raise StructureError(f"a sparse Jacobian needs a function that returns one tensor, got {type(y).__name__}")
    return y


def _finite(t: Tensor | None) -> Tensor:
    if t is None or not bool(torch.isfinite(t).all()):
        raise StructureError("the derivative is not finite at this point: choose another for the pattern")
    return t
