"""An activation from a name, a class, a function or an instance: what the models accept."""

from dualnn.layers.activation import Activation, make_activation

__all__ = ["Activation", "make_activation"]
