r"""Banded Jacobians: formed from few coloured directions, factorised by LAPACK's pivoted band LU.

If :math:`J_{ij} = 0` outside of :math:`i - l \le j \le i + u`, unknowns that are :math:`l + u + 1` apart share no
equation: one direction moves them all, and :math:`l + u + 1` directions hold the whole matrix.

Reference:
    Curtis, Powell, Reid, "On the estimation of sparse Jacobian matrices", IMA J. Appl. Math. 13, 1974.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualnn.engine.errors import StructureError
from dualnn.engine.tangents import Dense
from dualnn.engine.transforms import dense_of, push
from dualnn.solvers.factors import same_shape


class Banded:
    """A banded block as LAPACK stores it, factorised with partial pivoting.

    LAPACK works on the CPU, sample by sample; a GPU's numbers are copied there and back. Half precision is solved in
    float32. A singular sample gives infinities or nan in its own rows only.

    Args:
        bands: ``bands[..., u + i - j, j]`` is entry ``(i, j)``.
        lower: Bands below the diagonal.
        upper: Bands above it.

    Shape:
        ``bands: (*batch, lower + upper + 1, n)``.

    Raises:
        ImportError: scipy is not installed.
    """

    def __init__(self, bands: Tensor, lower: int, upper: int) -> None:
        try:
            from scipy.linalg.lapack import get_lapack_funcs
        except ImportError as error:
            raise ImportError("jacobian='banded' solves with scipy: pip install scipy") from error
        self.lower, self.upper, self.dim = lower, upper, bands.dim() - 1
        self.dtype = torch.promote_types(bands.dtype, torch.float32)
        plain = bands.detach().to("cpu", self.dtype).reshape(bands.shape[:-2].numel(), *bands.shape[-2:]).numpy()
        factorise, self._solver = get_lapack_funcs(("gbtrf", "gbtrs"), (plain,))
        self.factors = []
        for one in plain:
            room = torch.zeros((2 * lower + upper + 1, bands.shape[-1]), dtype=self.dtype).numpy()  # for row exchanges
            room[lower:] = one
            lu, pivots, _ = factorise(room, lower, upper)
            self.factors.append((lu, pivots))

    def solve(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-1} b` for ``(*lead, *batch, n)``."""
        return self._solved(rhs, 0)

    def solve_transposed(self, rhs: Tensor) -> Tensor:
        """:math:`A^{-T} b`."""
        return self._solved(rhs, 1)

    def _solved(self, rhs: Tensor, transposed: int) -> Tensor:
        plain = rhs.detach().to("cpu", self.dtype)
        found = torch.empty_like(plain)
        samples = plain.reshape(rhs.shape[: rhs.dim() - self.dim].numel(), len(self.factors), rhs.shape[-1])
        into = found.reshape(samples.shape)
        for i, (lu, pivots) in enumerate(self.factors):
            columns = samples[:, i].T.contiguous().numpy()
            x, _ = self._solver(lu, self.lower, self.upper, columns, pivots, trans=transposed)
            into[:, i] = torch.from_numpy(x).T
        return found.to(rhs)


def banded_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor, lower: int, upper: int) -> tuple[Tensor, Tensor]:
    """Value of ``fn`` and the bands of its Jacobian (see `Banded`), from one dual pass of lower + upper + 2 directions.

    The last direction is random, and compared with the product of the bands: an entry outside of them, or another
    sample's influence, shows.

    Args:
        fn: ``(*batch, n) -> (*batch, n)``, sample by sample.
        x: Where.
        lower: Bands below the diagonal.
        upper: Bands above it.

    Returns:
        ``(fn(x), bands)`` with ``bands: (*batch, lower + upper + 1, n)``.

    Raises:
        StructureError: The Jacobian has entries outside of the band, or the result has another shape.
    """
    n, width = x.shape[-1], lower + upper + 1
    j = torch.arange(n, device=x.device)
    colours = (j % width == torch.arange(width, device=x.device)[:, None]).to(x.dtype)
    seeds = colours.reshape(width, *(1,) * (x.dim() - 1), n).expand(width, *x.shape)
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    y, tan = push(fn, (x,), [Dense(torch.cat([seeds, random.unsqueeze(0)]))])
    same_shape(y, x)
    columns: Any = dense_of(tan, y)
    blocks, expected = columns[:width].movedim(0, -2), columns[width]
    _check(blocks, expected, random, lower, upper)
    i = j + torch.arange(width, device=x.device)[:, None] - upper  # the row of entry (r, j)
    inside = (i >= 0) & (i < n)
    bands = blocks[..., (j % width).expand(width, n), i.clamp(0, n - 1)]
    return y, torch.where(inside, bands, 0.0)


def _check(columns: Tensor, expected: Tensor, z: Tensor, lower: int, upper: int) -> None:
    n, width = z.shape[-1], lower + upper + 1
    i = torch.arange(n, device=z.device)
    j = i + torch.arange(-lower, upper + 1, device=z.device)[:, None]  # the columns in reach of row i
    entries = torch.where((j >= 0) & (j < n), columns[..., j % width, i.expand(width, n)], 0.0)
    terms = entries * z[..., j.clamp(0, n - 1)]
    error = (terms.sum(-2) - expected).abs()
    scale = terms.abs().sum(-2) + expected.abs()
    wrong = error > 64 * width * torch.finfo(z.dtype).eps ** 0.75 * scale
    if bool(wrong.any()):
        rows = torch.nonzero(wrong.reshape(-1, n).any(0)).flatten()
        raise StructureError(
            f"the Jacobian is not banded with bandwidth=({lower}, {upper}): along a random direction {len(rows)} of "
            f"{n} equations (first: {rows[:8].tolist()}) differ from what its bands give. They depend on unknowns "
            "further away, or on other samples: widen the bandwidth, reorder the unknowns, or use jacobian='dense'."
        )
