"""Derivatives per sample through unmodified scalar losses."""

import pytest
import torch
import torch.nn.functional as F

import dualnn as dn
from dualnn.engine import StructureError
from dualnn.engine.dual_tensor import make
from dualnn.engine.levels import fresh_level
from dualnn.engine.per_sample import keep_samples
from dualnn.engine.tangents import Dense, PerSample, Zero
from tests.engine.oracles import rand

B, C, K = 4, 3, 2
LABELS = torch.tensor([1, 0, 2, 2])


def per_sample(loss, x, directions, batch=None):
    """The engine's tangent of a scalar loss with samples kept apart: (K, B)."""
    with fresh_level() as level, keep_samples(level, batch or len(x)):
        out = loss(make(x, Dense(directions), level))
    assert isinstance(out._tan, PerSample), "samples were not kept apart"
    return out, out._tan.samples()


def expected(loss, x, directions, batch=None):
    """The share of each sample: the plain derivative along a direction that moves this sample only."""
    batch = batch or len(x)
    rows = len(x) // batch
    columns = []
    for b in range(batch):
        mask = torch.zeros(len(x), *(1,) * (x.dim() - 1), dtype=x.dtype)
        mask[b * rows : (b + 1) * rows] = 1
        columns.append(dn.jvp(loss, (x,), (directions * mask,))[1])
    return torch.stack(columns, 1)


WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
TARGET = rand(11)(B, C)
PROBS = torch.softmax(rand(12)(B, C), 1)
LOSSES = {
    "mean": lambda x: x.tanh().mean(),
    "sum": lambda x: (x * x).sum(),
    "rows then mean": lambda x: (x * x).sum(1).mean(),
    "mean of dims": lambda x: (x * x).mean((0, 1)),
    "mean over 0 then rest": lambda x: x.exp().mean(0).sum(),
    "keepdim": lambda x: x.exp().mean((0, 1), keepdim=True).squeeze(),
    "negative dims": lambda x: x.exp().sum((-2, -1)),
    "cross_entropy": lambda x: F.cross_entropy(x, LABELS),
    "cross_entropy sum": lambda x: F.cross_entropy(x, LABELS, reduction="sum"),
    "cross_entropy none, mean": lambda x: F.cross_entropy(x, LABELS, reduction="none").mean(),
    "cross_entropy weight": lambda x: F.cross_entropy(x, LABELS, weight=WEIGHT),
    "cross_entropy ignore": lambda x: F.cross_entropy(x, LABELS, ignore_index=2),
    "cross_entropy smooth": lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.2),
    "cross_entropy all": lambda x: F.cross_entropy(x, LABELS, weight=WEIGHT, ignore_index=0, label_smoothing=0.1),
    "cross_entropy probs": lambda x: F.cross_entropy(x, PROBS, label_smoothing=0.1),
    "nll": lambda x: F.nll_loss(F.log_softmax(x, 1), LABELS, weight=WEIGHT),
    "nll ignore": lambda x: F.nll_loss(F.log_softmax(x, 1), LABELS, ignore_index=1),
    "mse": lambda x: F.mse_loss(x, TARGET),
    "mse sum": lambda x: F.mse_loss(x, TARGET, reduction="sum"),
    "l1": lambda x: F.l1_loss(x, TARGET),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, TARGET),
    "huber": lambda x: F.huber_loss(x, TARGET, delta=0.4),
    "bce": lambda x: F.binary_cross_entropy(torch.sigmoid(x), PROBS),
    "bce_logits": lambda x: F.binary_cross_entropy_with_logits(x, PROBS, pos_weight=WEIGHT),
    "bce_logits weight": lambda x: F.binary_cross_entropy_with_logits(x, PROBS, weight=WEIGHT),
    "kl": lambda x: F.kl_div(F.log_softmax(x, 1), PROBS, reduction="batchmean"),
    "soft_margin": lambda x: F.soft_margin_loss(x, torch.sign(TARGET)),
    "gaussian_nll": lambda x: F.gaussian_nll_loss(x, TARGET, torch.ones_like(TARGET)),
    "regularised": lambda x: F.mse_loss(x, TARGET) + 0.1 * (x * x).mean() - x.sum() / 7 + 3.0,
    "scaled": lambda x: 2.0 * F.cross_entropy(x, LABELS) / 3.0,
    "function of one loss": lambda x: torch.log1p(F.mse_loss(x, TARGET)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_shares_equal_the_derivative_along_one_sample(name):
    x, directions = rand(1)(B, C), rand(2)(K, B, C)
    out, shares = per_sample(LOSSES[name], x, directions)
    assert shares.shape == (K, B) and torch.equal(out.primal, LOSSES[name](x))
    torch.testing.assert_close(shares, expected(LOSSES[name], x, directions))
    torch.testing.assert_close(shares.sum(1), dn.jvp(LOSSES[name], (x,), (directions,))[1])


def test_tokens_flattened_into_the_batch():
    tokens = 5
    x, directions = rand(1)(B, tokens, C), rand(2)(K, B, tokens, C)
    labels = torch.randint(0, C, (B * tokens,))

    def loss(h):
        return F.cross_entropy(h.reshape(-1, C), labels, ignore_index=1)

    _, shares = per_sample(loss, x, directions)
    torch.testing.assert_close(shares, expected(loss, x, directions))


def test_images_and_segmentation_targets():
    x, directions = rand(1)(B, C, 2, 2), rand(2)(K, B, C, 2, 2)
    labels = torch.randint(0, C, (B, 2, 2))

    def loss(h):
        return F.cross_entropy(h, labels)

    _, shares = per_sample(loss, x, directions)
    torch.testing.assert_close(shares, expected(loss, x, directions))


def test_a_network_between():
    w = rand(5)(C, 6)
    x, directions = rand(1)(B, 6), rand(2)(K, B, 6)

    def loss(h):
        return F.cross_entropy(F.layer_norm(torch.relu(h) @ w.T, (C,)), LABELS)

    _, shares = per_sample(loss, x, directions)
    torch.testing.assert_close(shares, expected(loss, x, directions))


def test_other_levels_are_reduced_as_usual():
    x = rand(1)(B, C)
    with fresh_level() as level, keep_samples(level, B):
        _, inner = dn.jvp(lambda y: y.mean(), (x,), (x.expand(K, B, C),))
    assert inner.shape == (K,)


def test_after_the_context_reductions_are_ordinary():
    with fresh_level() as level:
        with keep_samples(level, B):
            pass
        assert type(make(rand(1)(B, C), Dense(rand(2)(K, B, C)), level).mean()._tan) is Dense


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.mean(0) * x,
        lambda x: x - x.mean(),
        lambda x: x / x.sum(0, keepdim=True),
        lambda x: torch.maximum(x, x.mean()),
        lambda x: torch.stack([x[0, 0], x.mean()]),
        lambda x: torch.where(x > 0, x, x.mean()),
        lambda x: torch.lerp(x, x.mean(), 0.5),
        lambda x: torch.addcmul(x, x.mean(), x.mean()),
        lambda x: x.mean() * x[:1].sum(1),
    ],
)
def test_mixing_samples_before_the_loss_raises(mixing):
    with pytest.raises(StructureError, match="per_sample=False"):
        per_sample(lambda x: mixing(x).mean(), rand(1)(B, C), rand(2)(K, B, C))


def test_selected_rows_raise():
    with pytest.raises(StructureError, match="3 rows"):
        per_sample(lambda x: x[:3].mean(), rand(1)(B, C), rand(2)(K, B, C))


def test_a_structural_zero_may_meet_a_reduced_value():
    def loss(x):
        return F.mse_loss(x, TARGET) + torch.zeros_like(x).sum() * torch.floor(x).mean()

    _, shares = per_sample(loss, rand(1)(B, C), rand(2)(K, B, C))
    torch.testing.assert_close(shares, expected(loss, rand(1)(B, C), rand(2)(K, B, C)))
    with fresh_level() as level, keep_samples(level, B):
        zero = make(torch.zeros(()), Zero(K), level)
        loss = make(rand(1)(B, C), Dense(rand(2)(K, B, C)), level).mean()
        assert isinstance(torch.stack([loss, zero]).sum()._tan, PerSample)


def test_a_batch_of_one():
    x, directions = rand(1)(1, C), rand(2)(K, 1, C)
    _, shares = per_sample(lambda h: F.cross_entropy(h, LABELS[:1]), x, directions)
    assert shares.shape == (K, 1)
