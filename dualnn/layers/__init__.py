"""Layers: modules that backprop alone cannot train, and tools to drop them into models."""

from dualnn.layers.black_box import BlackBox
from dualnn.layers.dual import Dual
from dualnn.layers.fixed_point import FixedPoint
from dualnn.layers.local_swap import restore_forward, swap_forward
from dualnn.layers.replacing import replace
from dualnn.layers.smoothed import Smoothed
from dualnn.layers.surrogate import Surrogate

__all__ = ["BlackBox", "Dual", "FixedPoint", "Smoothed", "Surrogate", "replace", "restore_forward", "swap_forward"]
