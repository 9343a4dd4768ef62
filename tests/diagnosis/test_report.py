"""The report as text, and the rewriting of single lines."""

import pytest

from dualnn.diagnosis import Finding, Report
from dualnn.diagnosis.memory import over_budget, readable
from dualnn.diagnosis.rewriting import rewritten


def finding(**changes: object) -> Finding:
    given = {
        "name": "net.act",
        "kind": "cut",
        "cause": "sin runs under torch.no_grad",
        "line": "model.py:3",
        "remedy": "dn.layers.swap_forward(model, ['net.act'])",
        "cost": "2 forward passes",
        "swap": "exact",
        "path": "net.act",
    }
    return Finding(**{**given, **changes})  # type: ignore[arg-type]


def test_a_failing_module() -> None:
    report = Report([finding(), finding(name="", path="", kind="surrogate", swap=None)], "Net", ("", "net", "net.act"))
    assert not report.ok and report.where == ["net.act"] and len(report.failures) == 1
    assert str(report).splitlines() == [
        "Net: backprop fails in 1 of 3 parts, 1 remark",
        "",
        "net.act   graph cut   model.py:3",
        "  why     sin runs under torch.no_grad",
        "  remedy  dn.layers.swap_forward(model, ['net.act'])",
        "  cost    2 forward passes",
        "",
        "(the module itself)   surrogate gradient   model.py:3",
        "  why     sin runs under torch.no_grad",
        "  remedy  dn.layers.swap_forward(model, ['net.act'])",
        "  cost    2 forward passes",
        "",
        "In Lightning, at once: DualPropagation(where=['net.act'])",
    ]


def test_a_healthy_module() -> None:
    assert str(Report([], "Net", ("",))) == "Net: backprop works"


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("s = math.tanh(a.item())", "s = torch.tanh(a)"),
        ("y = x * float(self.scale.mean())", "y = x * self.scale.mean()"),
        ("h = torch.from_numpy(np.exp(x.detach().cpu().numpy())).to(x)", "h = torch.exp(x).to(x)"),
        ("z = self.net(x.data)", "z = self.net(x)"),
        ("v = torch.vander(x, 4)", "v = torch.linalg.vander(x, N=4).flip(-1)"),
        ("t = torch.linspace(a, b, 5)", "t = a + (b - a) * torch.linspace(0, 1, 5)"),
        ("t = torch.tensor(x.item(), device=x.device)", "t = x"),
        ("y = x + 1", ""),
        ("y = scipy_solve(x.tolist())", "y = scipy_solve(x)"),
        ("rows = [f(v) for v in x.tolist()]", ""),
        ("y = np.interp(x.numpy(), a, b)", ""),
        ("for i in range(x.item()):", ""),
    ],
)
def test_rewriting(line: str, new: str) -> None:
    assert rewritten(line) == new


def test_the_innermost_part_over_budget() -> None:
    assert over_budget({"": 90, "a": 60, "a.b": 50, "c": 10}, 40) == ["a.b"]
    assert over_budget({"": 90, "a": 30, "b": 30}, 40) == [""]
    assert over_budget({"": 90}, 100) == []


def test_readable_bytes() -> None:
    assert [readable(n) for n in (12, 2048, 5 << 20, 3 << 30)] == ["12 B", "2 KiB", "5 MiB", "3 GiB"]
