"""Models that backprop trains well: the doctor must not say a word."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dualnn as dn


class NormAtZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.w * x
        return torch.linalg.vector_norm(z, dim=-1) + z.std(dim=-1) + z.norm()


class Selects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return y.sort(-1).values + y.median(-1, keepdim=True).values + y.topk(2).values.sum() + y.amax(-1, keepdim=True)


class Specials(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.lin(x))
        special = torch.special
        return special.i0(y) + special.i1(y) + special.ndtri(0.5 + 0.4 * y) + special.erfcx(y) + special.entr(y + 2)


class LeastSquares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(self.a, x).solution


class MaskedSoftmax(nn.Module):
    """A row without any key: torch's forward mode makes nan of it, backprop does not."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.lin(x).masked_fill(mask, -torch.inf)
        return torch.nan_to_num(torch.softmax(scores, -1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, *, hidden: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=hidden)[0]


class Branches(nn.Module):
    """In-place activations, shared layers, a residual connection, a value read for a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(5, 5), nn.ReLU(inplace=True)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = pair
        h = self.act(self.lin(x)) + self.act(self.lin(y))
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean())
        scale = h.detach().abs().max().clamp_min(1e-3)
        return {"y": torch.softmax(h / 2, -1) + 0 * scale, "steps": torch.tensor(float(h.sum()) > 0)}


class Samples(nn.Module):
    """A variational layer: noise from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_scale = self.lin(x).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_scale.exp())
        gamma = torch.distributions.Gamma(log_scale.exp() + 1, 1.0)
        return normal.rsample() + gamma.rsample()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(36, 5), nn.LogSoftmax(-1),
    )  # fmt: skip


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


Case = tuple[Callable[[], nn.Module], Callable[[], tuple], dict]
HEALTHY: dict[str, Case] = {
    "resnet18": (torchvision.models.resnet18, lambda: (torch.randn(2, 3, 32, 32),), {}),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, lambda: (torch.randn(2, 3, 32, 32),), {}),
    "gru": (lambda: nn.GRU(4, 8, batch_first=True), lambda: (torch.randn(2, 5, 4),), {}),
    "lstm": (lambda: nn.LSTM(4, 8, 2, dropout=0.2), lambda: (torch.randn(5, 2, 4),), {}),
    "transformer": (encoder, lambda: (torch.randn(2, 5, 16),), {}),
    "transformer in eval": (lambda: encoder().eval(), lambda: (torch.randn(2, 5, 16),), {}),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)),
        lambda: (torch.randn(4, 6),),
        {},
    ),
    "cnn with ties": (cnn, lambda: (torch.randn(2, 1, 8, 8).round(),), {}),
    "cnn in eval": (lambda: cnn().eval(), lambda: (torch.randn(2, 1, 8, 8),), {}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(20, 6, padding_idx=0), nn.Dropout(), nn.Linear(6, 3), nn.Softmax(-1)),
        lambda: (torch.tensor([[0, 3, 7], [3, 19, 0]]),),
        {},
    ),
    "embeddings of other kinds": (
        lambda: nn.Sequential(nn.Embedding(5, 6, max_norm=1.0, scale_grad_by_freq=True), nn.Linear(6, 3)),
        lambda: (torch.randint(0, 5, (3, 4)),),
        {},
    ),
    "channels of very different size": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1, groups=8), nn.ReLU(inplace=True)),
        lambda: (torch.randn(2, 1, 8, 8) * torch.logspace(-9, 0, 8),),
        {},
    ),
    "norm at zero": (NormAtZero, lambda: (torch.zeros(2, 3),), {}),
    "std of a constant": (NormAtZero, lambda: (torch.ones(2, 3),), {}),
    "dead units": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Threshold(5.0, 0.0), nn.Linear(3, 2)),
        lambda: (torch.randn(4, 3),),
        {},
    ),
    "selections": (Selects, lambda: (torch.randn(3, 6),), {}),
    "special functions": (Specials, lambda: (torch.randn(3, 4),), {}),
    "least squares": (LeastSquares, lambda: (torch.randn(6, 2),), {}),
    "masked softmax": (
        MaskedSoftmax,
        lambda: (torch.randn(3, 4), torch.tensor([[True] * 4, [False] * 4, [True] * 2 + [False] * 2])),
        {},
    ),
    "attention": (Attends, lambda: (torch.randn(2, 3, 8),), {"hidden": torch.arange(6).reshape(2, 3) > 3}),
    "branches": (Branches, lambda: ((torch.randn(3, 5), torch.randn(3, 5)),), {}),
    "random samples": (Samples, lambda: (torch.randn(3, 4),), {}),
    "packed sequences": (Packed, lambda: (torch.randn(2, 4, 3),), {}),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh()),
        lambda: (torch.randn(2, 3),),
        {},
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Tanh()),
        lambda: (torch.randn(2, 3),),
        {},
    ),
    "our activations": (
        lambda: nn.Sequential(nn.Linear(3, 3), dn.activations.get("kepler"), dn.activations.get("implicit_tanh")),
        lambda: (torch.randn(2, 3),),
        {},
    ),
    "half precision": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).bfloat16(),
        lambda: (torch.randn(3, 4).bfloat16(),),
        {},
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(name: str) -> None:
    build, inputs, kwargs = HEALTHY[name]
    torch.manual_seed(0)
    report = dn.doctor(build(), *inputs(), **kwargs)
    assert report.findings == [], str(report)
    assert report.examined


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm_with_other_numbers(name: str, seed: int) -> None:
    build, inputs, kwargs = HEALTHY[name]
    torch.manual_seed(seed + 1)
    report = dn.doctor(build(), *inputs(), **kwargs)
    assert report.findings == [], str(report)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0", "densenet121"])
@pytest.mark.parametrize("training", [True, False])
def test_vision_models_at_a_usual_size(model: str, training: bool) -> None:
    torch.manual_seed(0)
    report = dn.doctor(torchvision.models.get_model(model).train(training), torch.randn(2, 3, 96, 96))
    assert report.findings == [], str(report)
