"""Layers: modules that backprop alone cannot train, and tools to drop them into models."""

from dualnn.layers.dual import Dual
from dualnn.layers.fixed_point import FixedPoint
from dualnn.layers.local_swap import restore_forward, swap_forward
from dualnn.layers.replacing import replace

__all__ = ["Dual", "FixedPoint", "replace", "restore_forward", "swap_forward"]
