"""Training signals: where a gradient comes from. One signal a file; `signal_loss` runs a step under any of them."""

from dualnn.signals.activity import ActivityPerturbation, SampleMixingWarning
from dualnn.signals.backprop import Backprop
from dualnn.signals.base import Signal
from dualnn.signals.exact import Exact
from dualnn.signals.forward_gradient import ForwardGradient
from dualnn.signals.step import signal_loss

__all__ = [
    "ActivityPerturbation",
    "Backprop",
    "Exact",
    "ForwardGradient",
    "SampleMixingWarning",
    "Signal",
    "signal_loss",
]
