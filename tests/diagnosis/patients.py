"""Modules on which backprop fails, each in its own way: what the doctor must say of them.

The line to blame carries the comment `# here`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Patient:
    """A module that fails, and what the doctor should find.

    Attributes:
        build: Makes the network.
        inputs: Makes its inputs.
        kind: The kind of the finding.
        path: The submodule.
        swap: What local duals can do.
        line: Whether a line marked `# here` must be named.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    kind: str
    path: str
    swap: str | None
    line: bool = True


PATIENTS: dict[str, Patient] = {}


def small() -> tuple:
    return (torch.randn(4, 3),)


def patient(
    kind: str,
    path: str = "1",
    swap: str | None = None,
    inputs: Callable[[], tuple] = small,
    line: bool = True,
    wrap: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module; by default it stands second of three, after a layer with weights."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        def build() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 3), cls(), nn.Linear(3, 2)) if wrap else cls()

        PATIENTS[cls.__name__] = Patient(build, inputs, kind, path if wrap else path.removeprefix("1"), swap, line)
        return cls

    return register


def marked_lines(cls: type) -> set[int]:
    """The numbers of the lines that end in `# here`."""
    lines, start = inspect.getsourcelines(cls)
    return {start + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")}


class Positive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.5, 2.0, 0.7]))


# --- backward raises -------------------------------------------------------------------------------------------------


@patient("raises", swap="exact")
class GammaIncLearnsA(Positive):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.gammainc(self.a, x.square() + 0.1)  # here


@patient("raises", swap=None)
class ZetaInX(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.zeta(x.square() + 2.0, torch.tensor(1.5, dtype=x.dtype))  # here


@patient("raises", swap="exact")
class GammaDistributionCdf(Positive):
    def forward(self, x: Tensor) -> Tensor:
        gamma = torch.distributions.Gamma(self.a.abs(), torch.ones_like(self.a))
        return gamma.cdf(x.square() + 0.1)  # here


@patient("raises", swap="exact")
class OverwritesExp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(0.5 * x)
        y[y < 1] = 0  # here
        return y


@patient("raises", swap="exact")
class ClampsSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        y.clamp_(0.1, 0.9)  # here
        return y


@patient("raises", swap="exact")
class Vandermonde(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        v = x[:, 0]
        return torch.vander(v, 3)  # here


@patient("raises", swap="exact")
class AddsIntoTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y += 1.0  # here
        return y


# --- cut off, although smooth ----------------------------------------------------------------------------------------


@patient("cut")
class Airy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)  # here


@patient("cut")
class Chebyshev(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.chebyshev_polynomial_t(x, 3)  # here


@patient("cut")
class Hermite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.hermite_polynomial_h(x, 3)  # here


@patient("cut")
class ScaledBessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.scaled_modified_bessel_k0(x.square() + 0.5)  # here


@patient("cut", line=False)
class Linspace(Positive):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(self.a[0], self.a[1], 3, dtype=x.dtype)


# --- cut by the code -------------------------------------------------------------------------------------------------


@patient("cut", swap="exact")
class NewtonNoGrad(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.ones_like(a)
            for _ in range(12):
                x = x - (x**3 + x - a) / (3 * x**2 + 1)  # here
        return x


@patient("cut", swap="exact")
class LearnsInsideNoGrad(Positive):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.tanh(self.a * x)  # here


@patient("cut", swap="exact")
class DecoratedNoGrad(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)  # here


@patient("cut", wrap=False, path="1act")
class InferenceMode(nn.Module):
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return torch.sin(x)  # here

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.out = nn.Linear(3, 3), self.Act(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.lin(x)))


@patient("cut")
class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x.detach())  # here
        return y


@patient("cut")
class ThroughData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x.data)  # here
        return y


@patient("cut")
class ThroughItem(Positive):
    def forward(self, x: Tensor) -> Tensor:
        s = math.tanh(self.a[0].item())  # here
        return x * s


@patient("cut")
class ThroughFloat(Positive):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.a.sum())  # here


@patient("cut")
class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))  # here


@patient("cut")
class ThroughList(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[math.sin(v) for v in row] for row in x.tolist()], dtype=x.dtype)  # here


@patient("cut", line=False)
class PartlyByItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm().item()


@patient("cut", path="1", wrap=False, swap="exact")
class OutsideModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            h = torch.sin(h)  # here
        return self.last(h)


# --- not finite ------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5, 0.8, 1.1]))


def zeros_among() -> tuple:
    return (torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0], [3.0, 0.7, 0.0]]),)


@patient("nonfinite", swap="exact", wrap=False, inputs=zeros_among)
class WhereLog(Gain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.w * x
        return torch.where(y > 0, torch.log(y), torch.zeros_like(y))  # here


@patient("nonfinite", swap="exact", wrap=False, inputs=zeros_among)
class WhereDivide(Gain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.w * x
        return torch.where(y > 0, x / y, y)  # here


@patient("nonfinite", swap="exact", wrap=False, inputs=zeros_among)
class RootOfSquare(Gain):
    def forward(self, x: Tensor) -> Tensor:
        z = self.w * x
        return torch.sqrt(z * z)  # here


@patient("nonfinite", swap="exact")
class PairwiseDistances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gaps = x[:, None, :] - x[None, :, :]
        return gaps.square().sum(-1).sqrt()[:, :3]  # here


class _RepeatedEigenvalues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(2 * torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((self.a + self.a.mT) / 2)  # here
        return x @ (vectors * values.exp()) @ vectors.mT


PATIENTS["RepeatedEigenvalues"] = Patient(
    lambda: nn.Sequential(nn.Linear(3, 3), _RepeatedEigenvalues()), small, "nonfinite", "1", None, line=False
)


# --- wrong -----------------------------------------------------------------------------------------------------------


class _LosesAFactor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x


@patient("wrong", line=False)
class LosesAFactor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _LosesAFactor.apply(x)


class _ForgetsAnInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return x * a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        return grad * a, None


@patient("cut", line=False)
class ForgetsAnInput(Positive):
    def forward(self, x: Tensor) -> Tensor:
        return _ForgetsAnInput.apply(x, self.a)


# --- flat ------------------------------------------------------------------------------------------------------------


@patient("flat", swap="surrogate")
class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4  # here


@patient("flat", swap="surrogate")
class Spikes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.1).to(x.dtype)  # here


@patient("flat", swap="surrogate")
class Signs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)  # here


@patient("flat", swap="estimate")
class HardChoice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        best = x.argmax(-1)  # here
        return nn.functional.one_hot(best, 3).to(x.dtype)


@patient("flat", swap="surrogate")
class BucketEdges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Parameter(torch.tensor([-0.5, 0.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bucketize(x, self.edges).to(x.dtype)  # here


class _Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)  # here


PATIENTS["PicksAnEmbedding"] = Patient(
    lambda: nn.Sequential(nn.Linear(3, 3), _Picks(), nn.Embedding(3, 2)), small, "flat", "1", "surrogate", line=False
)


# --- how modules are called ------------------------------------------------------------------------------------------


class _Loses(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": torch.sin(pair[0] * scale) + pair[1]}


class TupleAndKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(3, 3), _Loses()

    def forward(self, x: Tensor) -> Tensor:
        return self.act((self.lin(x), x), scale=self.lin.bias)["out"]


class _Logs(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return torch.where(y > 0, torch.log(y), torch.zeros_like(y))


class CalledTwice(Gain):
    """Fails at its second call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.act = _Logs()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.w * x + 1) + self.act(self.w * x)


class SharedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = NewtonNoGrad()
        self.a = nn.Sequential(nn.Linear(3, 3), self.act)
        self.b = nn.Sequential(nn.Linear(3, 3), self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


PATIENTS["TupleAndKeyword"] = Patient(TupleAndKeyword, small, "cut", "act", "exact", line=False)
PATIENTS["CalledTwice"] = Patient(CalledTwice, zeros_among, "nonfinite", "act", "exact", line=False)
PATIENTS["SharedTwice"] = Patient(SharedTwice, small, "cut", "act", "exact", line=False)
