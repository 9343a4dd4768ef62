"""Small plain LightningModules that know nothing about where their gradients come from."""

from dualnn.models.activation import make_activation
from dualnn.models.classifier import Classifier
from dualnn.models.cnn import CNN
from dualnn.models.failing import ClippedBump, FailingMLP, GammaCurve, RootGate
from dualnn.models.logistic import LogisticRegression
from dualnn.models.mlp import MLP
from dualnn.models.newton_tanh import NewtonTanh

__all__ = [
    "CNN",
    "MLP",
    "Classifier",
    "ClippedBump",
    "FailingMLP",
    "GammaCurve",
    "RootGate",
    "LogisticRegression",
    "NewtonTanh",
    "make_activation",
]
