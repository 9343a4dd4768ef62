"""Every activation where people put them: in torchvision's models, in YAML, in a network that trains."""

from functools import partial

import jsonargparse
import pytest
import torch
import torchvision
import yaml
from torch import nn

from dualnn import activations
from dualnn.activations.base import Activation
from dualnn.layers import replace
from dualnn.models import MLP

EVERY_NAME = pytest.mark.parametrize("name", activations.available())


def along_channels(name: str, dim: int = 1):
    """What makes one: those on rows along the channels."""
    options = {} if activations.get_class(name).elementwise else {"dim": dim}
    return partial(activations.get, name, **options)


@EVERY_NAME
def test_replaced_in_a_torchvision_model(name: str) -> None:
    net = torchvision.models.mobilenet_v3_small(num_classes=4)
    replaced = replace(net, {nn.Hardswish: along_channels(name)}, where="features.1[0-2].*")
    assert len(replaced) == 5
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in net.parameters()]
    loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    optimizer.step()
    assert sum(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)) > len(before) // 2


@EVERY_NAME
def test_named_in_yaml(name: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--act", type=Activation)
    cls = activations.get_class(name)
    written = yaml.safe_dump({"act": {"class_path": f"dualnn.activations.{cls.__name__}"}})
    act = parser.instantiate_classes(parser.parse_string(written)).act
    assert type(act) is cls and repr(act) == repr(activations.get(name))


@EVERY_NAME
def test_named_in_a_model(name: str) -> None:
    model = MLP(in_features=4, hidden=[6], classes=3, activation=name)
    model(torch.randn(5, 4)).square().sum().backward()
    assert any(type(m) is activations.get_class(name) for m in model.modules())


def fits(net: nn.Module, steps: int, lr: float) -> tuple[float, float]:
    """Loss before and after some steps of a plain optimizer on a batch that is learned by heart."""
    x, target = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.slow
@EVERY_NAME
def test_a_transformer_trains(name: str) -> None:
    net = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4
    )
    assert len(replace(net, {nn.GELU: along_channels(name, -1)})) == 2
    first, last = fits(net, steps=40, lr=3e-3)
    assert last < 0.6 * first


@pytest.mark.slow
@EVERY_NAME
def test_a_cnn_trains(name: str) -> None:
    net = torchvision.models.resnet18(num_classes=4)
    assert replace(net, {nn.ReLU: along_channels(name)}, where="layer3.1.relu") == ["layer3.1.relu"]
    first, last = fits(net, steps=12, lr=1e-3)
    assert last < 0.6 * first
