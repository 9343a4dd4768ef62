"""Whole networks, unchanged, with dual inputs and dual weights, against torch's forward mode where it is right."""

import pytest
import torch
from torch import Tensor, nn

from dualnn.engine.dual_tensor import dual
from dualnn.engine.parameters import swapped
from tests.engine.oracles import five_point

VISION = ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t", "efficientnet_b0"]


def directions(tensors: list[Tensor], scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) * scale for t in tensors]


def by_duals(model: nn.Module, x: Tensor, tx: Tensor, weights: dict, tw: dict) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)  # dropout, stochastic depth
    parameters = dict(model.named_parameters())
    with torch.no_grad(), swapped(model, {parameters[n]: dual(weights[n], tw[n]) for n in tw}):
        y = model(dual(x, tx))
    return y.primal, y.tangent[0]


def by_torch(model: nn.Module, x: Tensor, tx: Tensor, weights: dict, tw: dict) -> tuple[Tensor, Tensor]:
    # torch.func cannot update running statistics; without them training uses the batch's, as with them.
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False

    def run(inner: Tensor, inside: dict) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(model, inside, (inner,))

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # neither it nor fused attention has a forward mode
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(run, (x, weights), (tx, tw))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def compare(model: nn.Module, x: Tensor) -> None:
    weights = {n: p.detach() for n, p in model.named_parameters()}
    tx = directions([x], 1.0)[0]
    tw = dict(zip(weights, directions(list(weights.values()), 0.01), strict=True))
    value, pushed = by_duals(model, x, tx, weights, tw)
    wanted_value, wanted = by_torch(model, x, tx, weights, tw)
    torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pushed, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", VISION)
def test_vision_models(name, training):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    size = {"image_size": 32} if name == "vit_b_16" else {}
    model = getattr(models, name)(num_classes=10, **size).double().train(training)
    compare(model, torch.randn(2, 3, 32 if size else 64, 32 if size else 64, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_small_convolutional_network(training):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4, 2),
    )
    compare(model.double().train(training), torch.randn(3, 3, 8, 8, dtype=torch.float64))


def against_differences(model: nn.Module, x: Tensor, first=lambda y: y) -> None:
    """For modules that torch's forward mode cannot do."""
    weights = {p: p.detach() for p in model.parameters()}
    tx = directions([x], 1.0)[0]
    tw = dict(zip(weights, directions(list(weights.values()), 0.3), strict=True))
    with torch.no_grad(), swapped(model, {p: dual(w, tw[p]) for p, w in weights.items()}):
        y = first(model(dual(x, tx)))

    def at(h: float) -> list[Tensor]:
        with torch.no_grad(), swapped(model, {p: w + h * tw[p] for p, w in weights.items()}):
            return [first(model(x + h * tx))]

    assert torch.equal(y.primal, at(0.0)[0])
    torch.testing.assert_close(y.tangent[0], five_point(at)[0], rtol=1e-9, atol=1e-9)


def output(found):
    return found[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["", "deep"]
)
def test_recurrent_networks(kind, options):
    torch.manual_seed(0)
    against_differences(kind(3, 4, **options).double(), torch.randn(5, 2, 3, dtype=torch.float64), output)


def test_an_lstm_with_projection_and_a_packed_sequence():
    torch.manual_seed(0)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, proj_size=2, bidirectional=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]))
            return self.lstm(packed)[0].data

    against_differences(Packed().double(), torch.randn(5, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    against_differences(model.train(), torch.randn(2, 5, 8, dtype=torch.float64))


def test_a_transformer_encoder_in_eval_mode_leaves_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, activation="gelu").double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    tx = directions([x], 1.0)[0]
    with torch.no_grad():
        y = layer(dual(x, tx))
        slope = five_point(lambda h: [layer(x + h * tx)])[0]
    torch.testing.assert_close(y.primal, layer(x).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.tangent[0], slope, rtol=1e-9, atol=1e-9)


def test_multihead_attention_gives_its_weights_too():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    tx = directions([x], 1.0)[0]
    with torch.no_grad():
        found = attention(*[dual(x, tx)] * 3)
        slopes = five_point(lambda h: list(attention(*[x + h * tx] * 3)))
    for y, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(y.tangent[0], slope, rtol=1e-9, atol=1e-9)
