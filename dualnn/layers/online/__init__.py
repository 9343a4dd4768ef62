"""Recurrent layers that learn from endless sequences: exact gradients over the whole past in constant memory."""

from dualnn.layers.online.cell import OnlineCell
from dualnn.layers.online.diagonal_linear import LRU, DiagonalLinear
from dualnn.layers.online.elementwise_lstm import ElementwiseLSTM
from dualnn.layers.online.leaky_fire import LeakyFire
from dualnn.layers.online.min_gru import MinGRU
from dualnn.layers.online.state import OnlineState

__all__ = ["LRU", "DiagonalLinear", "ElementwiseLSTM", "LeakyFire", "MinGRU", "OnlineCell", "OnlineState"]
