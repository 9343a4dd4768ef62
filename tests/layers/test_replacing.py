import pytest
import torch
import torchvision
from torch import nn

from dualnn.activations import ImplicitTanh, Kepler
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.layers import replace

FIVE = ("implicit_tanh", "kepler", "lambert_w", "gamma_cdf", "quantize")


@pytest.mark.parametrize("name", FIVE)
def test_resnet18_trains_a_step(name):
    net = torchvision.models.resnet18(num_classes=10)
    replaced = replace(net, {nn.ReLU: name})
    assert len(replaced) == 9 and "layer1.0.relu" in replaced
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = [p.detach().clone() for p in net.parameters()]
    loss = nn.functional.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([3, 7]))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    optimizer.step()
    assert sum(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)) > len(before) // 2


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.ReLU())


KINDS = {
    "a name": ("kepler", Kepler),
    "a class": (ImplicitTanh, ImplicitTanh),
    "an instance": (Kepler(num_channels=2), Kepler),
    "a function": (lambda: nn.PReLU(2), nn.PReLU),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_take_the_place(kind):
    replacement, cls = KINDS[kind]
    net = model()
    kept = dict(net.named_parameters())
    assert replace(net, {nn.GELU: replacement}) == ["1", "2.1"]
    assert type(net[1]) is type(net[2][1]) is cls and type(net[3]) is nn.ReLU
    assert net[1] is not net[2][1] is not replacement
    assert all(dict(net.named_parameters())[name] is p for name, p in kept.items())
    net(torch.randn(3, 2)).sum().backward()


def test_several_rules_at_once():
    net = model()
    assert replace(net, {nn.GELU: "kepler", nn.ReLU: nn.Tanh}) == ["1", "3", "2.1"]


@pytest.mark.parametrize(("where", "names"), [("2.*", ["2.1"]), ("1", ["1"]), ("*1", ["1", "2.1"])])
def test_where_is_a_glob(where, names):
    assert replace(model(), {nn.GELU: "kepler"}, where=where) == names


def test_a_shared_module_stays_shared():
    act = nn.GELU()
    net = nn.Sequential(act, nn.Sequential(act, act), nn.GELU())
    assert replace(net, {nn.GELU: "kepler"}) == ["0", "2", "1.0", "1.1"]
    assert net[0] is net[1][0] is net[1][1] is not net[2]
    assert len(list(net.parameters())) == 2


def test_nothing_inside_a_replaced_module_is_named():
    net = model()
    assert replace(net, {nn.Sequential: nn.Identity, nn.GELU: "kepler"}) == ["1", "2"]


def test_device_dtype_and_mode_are_kept():
    net = model().double().eval()
    net[2].train()
    replace(net, {nn.GELU: "kepler"})
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert not net[1].training and net[2][1].training


@pytest.mark.parametrize("where", ["*", "3"])
def test_nothing_matched(where):
    with pytest.raises(DualInputError, match=r"type SiLU .*matching '.*'.*leaf modules are: GELU, Linear, ReLU"):
        replace(model(), {nn.SiLU: "kepler"}, where=where)


@pytest.mark.parametrize(
    "kind", ["Tanh", "kepler", "torch.nn.Tanh", nn.Tanh, nn.Tanh(), lambda: nn.Tanh()], ids=lambda k: str(k)[:20]
)
def test_an_activation_is_a_name_a_class_an_instance_or_a_function(kind):
    net = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    assert replace(net, {nn.GELU: kind}) == ["1"]
    assert type(net[1]).__name__ == ("Kepler" if kind == "kepler" else "Tanh")
    net(torch.randn(3, 2)).sum().backward()


def test_bad_replacements():
    with pytest.raises(UnknownNameError, match="did you mean 'kepler'"):
        replace(model(), {nn.GELU: "keplr"})
    with pytest.raises(DualInputError, match="returns a torch.nn.Module"):
        replace(model(), {nn.GELU: int})
    with pytest.raises(DualInputError, match="got 3"):
        replace(model(), {nn.GELU: 3})
