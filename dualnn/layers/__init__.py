"""Layers: modules that backprop alone cannot train, and tools to drop them into models."""

from dualnn.layers.argmin import ArgMin
from dualnn.layers.black_box import BlackBox
from dualnn.layers.dual import Dual
from dualnn.layers.fixed_point import FixedPoint
from dualnn.layers.least_squares import LeastSquares
from dualnn.layers.linear_solve import LinearSolve
from dualnn.layers.local_swap import restore_forward, swap_forward
from dualnn.layers.ode_block import ODEBlock
from dualnn.layers.online import LRU, DiagonalLinear, ElementwiseLSTM, LeakyFire, MinGRU, OnlineCell, OnlineState
from dualnn.layers.replacing import replace
from dualnn.layers.root import Root
from dualnn.layers.smoothed import Smoothed
from dualnn.layers.surrogate import Surrogate

__all__ = [
    "LRU",
    "ArgMin",
    "BlackBox",
    "DiagonalLinear",
    "Dual",
    "ElementwiseLSTM",
    "FixedPoint",
    "LeakyFire",
    "LeastSquares",
    "LinearSolve",
    "MinGRU",
    "ODEBlock",
    "OnlineCell",
    "OnlineState",
    "Root",
    "Smoothed",
    "Surrogate",
    "replace",
    "restore_forward",
    "swap_forward",
]
