"""torch.nn.functional and torch.nn under duals: bodies that can be re-run, right values and derivatives."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualnn as dn
from dualnn.engine.composite import is_composite, unguarded
from dualnn.engine.parameters import swapped
from dualnn.engine.registry import RULES
from tests.engine.oracles import five_point, rand

# What we rely on: torch's Python body behind a has_torch_function guard (each release must be looked at).
RELIED_ON = """
adaptive_avg_pool2d adaptive_avg_pool3d alpha_dropout batch_norm binary_cross_entropy binary_cross_entropy_with_logits
celu cosine_embedding_loss cross_entropy dropout dropout1d dropout2d elu embedding gaussian_nll_loss glu group_norm
gumbel_softmax hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss instance_norm kl_div l1_loss layer_norm
leaky_relu local_response_norm log_softmax lp_pool1d lp_pool2d margin_ranking_loss mish mse_loss
multi_head_attention_forward nll_loss normalize pad poisson_nll_loss relu relu6 rms_norm selu silu smooth_l1_loss
soft_margin_loss softmax softmin softsign tanhshrink threshold triplet_margin_loss
""".split()


@pytest.mark.parametrize("name", RELIED_ON)
def test_the_body_can_be_run_again(name):
    func = getattr(F, name)
    assert is_composite(func) or func in RULES, f"torch {torch.__version__} offers no Python body for F.{name}"


def test_tensordot_norm_and_split_too():
    for func in (torch.functional.tensordot, torch.functional.norm, torch.Tensor.norm):
        assert is_composite(func) or func in RULES


def test_builtins_have_no_body():
    assert unguarded(torch.sin) is None and unguarded(len) is None and not is_composite(torch.conv2d)
    assert unguarded(functools.partial(F.relu)) is None and unguarded(lambda x: x) is None


def check(fn, *xs, num=2, tol=1e-6):
    """Value bit for bit, directions against differences."""
    draw = rand(21)
    ts = [torch.stack([draw(*x.shape) for _ in range(num)]) for x in xs]
    torch.manual_seed(7)
    plain = fn(*xs)
    torch.manual_seed(7)
    out, pushed = dn.jvp(fn, tuple(xs), tuple(ts))
    assert torch.equal(out, plain)
    assert pushed.abs().sum() > 0
    for k in range(num):

        def moved(h, k=k):
            torch.manual_seed(7)
            return [fn(*[x + h * t[k] for x, t in zip(xs, ts, strict=True)])]

        torch.testing.assert_close(pushed[k], five_point(moved)[0], rtol=tol, atol=tol)


IMAGE, ROW, SEQUENCE = (3, 4, 6, 6), (5, 4), (3, 4, 7)
FUNCTIONS = {
    "relu6": (F.relu6, ROW),
    "glu": (F.glu, ROW),
    "softmin": (lambda x: F.softmin(x, dim=1), ROW),
    "softsign": (F.softsign, ROW),
    "tanhshrink": (F.tanhshrink, ROW),
    "normalize": (F.normalize, ROW),
    "cosine": (lambda x: F.cosine_similarity(x, x.flip(0)), ROW),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x), ROW),
    "dropout": (lambda x: F.dropout(x, 0.4), ROW),
    "dropout in place": (lambda x: F.dropout(x * 1, 0.4, inplace=True), ROW),
    "dropout2d": (lambda x: F.dropout2d(x, 0.4), IMAGE),
    "pad": (lambda x: F.pad(x, (1, 2)), ROW),
    "pad reflect": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), IMAGE),
    "pad replicate": (lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), IMAGE),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), IMAGE),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), IMAGE),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), IMAGE),
    "max_pool2d with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "unfold": (lambda x: F.unfold(x, 3), IMAGE),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    "one_hot mask": (lambda x: x * F.one_hot(x.argmax(1), 4), ROW),
    "tensordot": (lambda x: torch.tensordot(x, x, dims=([0], [0])), ROW),
    "norm": (lambda x: torch.norm(x, dim=1), ROW),
    "norm method": (lambda x: x.norm(), ROW),
    "frobenius": (lambda x: torch.norm(x, p="fro"), ROW),
    "meshgrid": (lambda x: torch.meshgrid(x[0], x[1], indexing="ij")[0] * x[0, 0], ROW),
    "einsum": (lambda x: torch.einsum("bi,bj->bij", x, x), ROW),
    "attention by hand": (lambda x: torch.softmax(x @ x.mT / 2, -1) @ x, SEQUENCE),
    "logsumexp": (lambda x: torch.logsumexp(x, (0, 1)), ROW),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    fn, shape = FUNCTIONS[name]
    check(fn, rand(1)(*shape))


def float_target(shape):
    return rand(9)(*shape)


LABELS = torch.tensor([1, 0, 3, 2, 1])
LOSSES = {
    "MSELoss": (nn.MSELoss(), float_target(ROW)),
    "L1Loss": (nn.L1Loss(reduction="sum"), float_target(ROW)),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.5), float_target(ROW)),
    "HuberLoss": (nn.HuberLoss(delta=0.5), float_target(ROW)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "CrossEntropyLoss weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]).double()), LABELS),
    "NLLLoss": (nn.NLLLoss(ignore_index=1), LABELS),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), float_target(ROW).sigmoid()),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), float_target(ROW).softmax(1)),
    "SoftMarginLoss": (nn.SoftMarginLoss(), float_target(ROW).sign()),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), float_target(ROW).abs()),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), float_target(ROW).sign()),
    "CosineEmbeddingLoss": (lambda x, y: nn.CosineEmbeddingLoss()(x, x.flip(0), y), torch.tensor([1, -1, 1, -1, 1])),
    "MarginRankingLoss": (lambda x, y: nn.MarginRankingLoss()(x[:, 0], x[:, 1], y), torch.tensor([1, -1, 1, -1, 1])),
    "TripletMarginLoss": (lambda x, y: nn.TripletMarginLoss()(x, x.flip(0), y), float_target(ROW)),
    "GaussianNLLLoss": (lambda x, y: nn.GaussianNLLLoss()(x, y, x.exp()), float_target(ROW)),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), (float_target(ROW) > 0).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss, target = LOSSES[name]
    check(lambda x: loss(x, target), rand(1)(*ROW))


MODULES = {
    "Linear": (lambda: nn.Linear(4, 3), ROW),
    "Bilinear": (lambda: Call(nn.Bilinear(4, 4, 2), lambda m, x: m(x, x.flip(0))), ROW),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), SEQUENCE),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), IMAGE),
    "Conv2d circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), IMAGE),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), ROW),
    "BatchNorm1d sequence": (lambda: nn.BatchNorm1d(4), SEQUENCE),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
    "BatchNorm2d eval": (lambda: nn.BatchNorm2d(4).eval(), IMAGE),
    "BatchNorm without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "BatchNorm cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), ROW),
    "LayerNorm": (lambda: nn.LayerNorm(4), ROW),
    "LayerNorm plain": (lambda: nn.LayerNorm((6, 6), elementwise_affine=False), IMAGE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), SEQUENCE),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
    "InstanceNorm2d eval": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), IMAGE),
    "RMSNorm": (lambda: nn.RMSNorm(4), ROW),
    "Dropout": (lambda: nn.Dropout(0.3), ROW),
    "Dropout eval": (lambda: nn.Dropout(0.3).eval(), ROW),
    "Dropout2d": (lambda: nn.Dropout2d(0.5), IMAGE),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), SEQUENCE),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), IMAGE),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), IMAGE),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), IMAGE),
    "Flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 2)), IMAGE),
    "PReLU": (lambda: nn.PReLU(4), ROW),
    "Softmax": (lambda: nn.Softmax(1), ROW),
    "ReLU in place": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), ROW),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), ROW),
    **{
        name: ((lambda name=name: getattr(nn, name)()), ROW)
        for name in (
            "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Softplus Softsign Tanh Tanhshrink Sigmoid LogSigmoid "
            "Hardtanh Hardsigmoid Hardswish Hardshrink Softshrink"
        ).split()
    },
}


class Call(nn.Module):
    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


def build(name):
    torch.manual_seed(3)
    make, shape = MODULES[name]
    module = make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module, rand(2)(*shape)


def fresh(module, fn):
    """Run ``fn`` from the module's present buffers (statistics move with every call)."""
    buffers = [(b, b.clone()) for b in module.buffers()]

    def run(*args):
        for b, value in buffers:
            b.copy_(value)
        return fn(*args)

    return run


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_dual_inputs(name):
    module, x = build(name)
    with torch.no_grad():
        check(fresh(module, module), x)


@pytest.mark.parametrize("name", [n for n, (make, _) in MODULES.items() if list(make().parameters())])
def test_modules_with_dual_parameters(name):
    module, x = build(name)
    parameters = [p for p in module.parameters() if p.numel()]

    def call(*values):
        with swapped(module, dict(zip(parameters, values, strict=True))):
            return module(x)

    with torch.no_grad():
        check(fresh(module, call), *[p.detach().clone() for p in parameters])


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(4), lambda: nn.BatchNorm1d(4, momentum=None)])
def test_running_statistics_are_updated_once(make):
    x = rand(1)(8, 4)
    plain, pushed = make().double(), make().double()
    for _ in range(2):
        plain(x)
        dn.jvp(pushed, (x,), (x.expand(3, 8, 4),))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, pushed.state_dict()[name]), name
    assert int(pushed.num_batches_tracked) == 2
    assert all(type(b) is torch.Tensor for b in pushed.buffers())


def test_batch_norm_second_order():
    norm = nn.BatchNorm1d(2, affine=False).double()
    x = rand(1)(4, 2)
    v, w = rand(2)(4, 2), rand(3)(4, 2)
    second = dn.jvp(lambda x: dn.jvp(norm, (x,), (v,))[1], (x,), (w,))[1]
    torch.testing.assert_close(
        second, five_point(lambda h: [dn.jvp(norm, (x + h * w,), (v,))[1]])[0], rtol=1e-7, atol=1e-8
    )


def test_one_dropout_mask_for_value_and_tangents():
    x, t = torch.ones(1000), torch.ones(3, 1000)
    torch.manual_seed(5)
    plain = F.dropout(x, 0.5)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    out, pushed = dn.jvp(lambda x: F.dropout(x, 0.5), (x,), (t,))
    assert torch.equal(out, plain) and torch.equal(pushed, plain.expand(3, 1000))
    assert torch.equal(torch.get_rng_state(), after), "duals drew more random numbers than the plain run"


def test_embedding():
    weight = rand(1)(5, 3)
    index = torch.tensor([[0, 4], [4, 2]])
    check(lambda w: F.embedding(index, w), weight)
    layer = nn.Embedding(5, 3, padding_idx=2, dtype=torch.float64)
    with swapped(layer, {layer.weight: dn.dual(layer.weight, torch.ones_like(layer.weight))}):
        out = layer(index)
    assert torch.equal(out.tangent[0], torch.tensor([[1.0, 1], [1, 0]]).double().unsqueeze(-1).expand(2, 2, 3))


def test_multihead_attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = rand(1)(2, 3, 4)
    with torch.no_grad():
        check(lambda x: layer(x, x, x, need_weights=True)[0], x)


def test_a_small_convolutional_net_in_training():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(36, 4),
    ).double()
    x, labels = rand(1)(5, 1, 6, 6), LABELS
    parameters = list(net.parameters())

    def loss(*values):
        with swapped(net, dict(zip(parameters, values, strict=True))):
            return F.cross_entropy(net(x), labels)

    values = tuple(p.detach().clone() for p in parameters)
    directions = tuple(rand(i)(*v.shape) for i, v in enumerate(values))
    torch.manual_seed(1)
    with torch.no_grad():
        _, pushed = dn.jvp(loss, values, directions)
    torch.manual_seed(1)
    grads = torch.autograd.grad(F.cross_entropy(net(x), labels), parameters)
    torch.testing.assert_close(pushed, sum((g * d).sum() for g, d in zip(grads, directions, strict=True)))
