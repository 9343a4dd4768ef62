"""`dualnn bench`: selection, files, the header."""

import json
import socket

import pytest
import torch

from dualnn.bench import Arm, Benchmark, Settings, Unavailable, run
from dualnn.bench.benchmark import Group
from dualnn.bench.command import bench_command, selected
from dualnn.bench.groups import GROUPS
from dualnn.bench.table import markdown, text
from dualnn.engine.errors import DualInputError, UnknownNameError
from dualnn.training.cli import main

ARM = {"name", "side", "seconds", "ratio", "first_call_seconds", "remark", "rounds", "missing"}


def demo(settings):
    def gone():
        raise Unavailable("not installed")

    def sized(n):
        x = torch.ones(n)
        arms = {
            "add": Arm(lambda: lambda: x + x, "ours", compiled=True),
            "mul": Arm(lambda: lambda: 2 * x, "peer"),
            "jax": Arm(gone, "peer"),
        }
        return Benchmark("demo", "twice", {"n": n, "K": 1}, arms, "mul", note="Doubling.")

    return [sized(2), sized(3)]


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr("dualnn.bench.command.GROUPS", {"demo": Group("a demonstration", ("twice",), demo)})


def test_the_table_names_arms_winner_and_what_is_missing(groups, capsys):
    assert main(["bench", "demo", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "demo/twice (n=2, K=1); ratios to mul" in out and "faster than" in out
    assert "jax  not installed" in out and "first call 0.0 s" in out


def test_the_header_says_the_machine_class_and_no_name(groups, capsys):
    main(["bench", "--quick"])
    head = capsys.readouterr().out.split("\n\n")[0]
    assert f"torch {torch.__version__.split('+')[0]}" in head and "cores" in head and "threads used 1" in head
    assert socket.gethostname() not in head and "/" not in head.replace("w/", "")


def test_json_holds_everything(groups, tmp_path):
    file = tmp_path / "out.json"
    main(["bench", "--quick", "--json", str(file)])
    data = json.loads(file.read_text())
    assert set(data) == {"machine", "versions", "device", "quick", "rounds", "benchmarks"}
    first = data["benchmarks"][0]
    assert set(first) == {"group", "name", "parameters", "reference", "note", "arms", "winner", "verdict"}
    assert first["parameters"] == {"n": 2, "K": 1} and first["reference"] == "mul"
    ran = [arm for arm in first["arms"] if arm["missing"] is None]
    assert len(ran) == 2 and all(set(arm) == ARM and len(arm["rounds"]) == 1 for arm in ran)
    assert {"name": "jax", "side": "peer", "missing": "not installed"} in first["arms"]
    assert first["winner"] in ("add", "mul")


def test_markdown_has_a_column_for_each_size(groups, tmp_path):
    file = tmp_path / "out.md"
    main(["bench", "--quick", "--markdown", str(file)])
    page = file.read_text()
    assert "| | n=2 | n=3 |" in page and "Everywhere K=1." in page and "Doubling." in page
    assert "| jax | – | – |" in page and "- jax: not installed." in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 and page.count("**") == 4  # a winner in each column


def test_a_plot_is_drawn(groups, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    main(["bench", "--quick", "--plot", str(file)])
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib_says_what_to_install(groups, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["bench", "--quick", "--plot", str(tmp_path / "out.png")]) == 2
    assert "pip install 'dualnn[bench]'" in capsys.readouterr().err


def test_names_select():
    quick = Settings(quick=True)
    assert {b.group for b in selected(["signals"], quick)} == {"signals"}
    assert {b.name for b in selected(["solvers/q*", "engine/chain-?"], quick)} == {"qr", "chain-A", "chain-B"}
    with pytest.raises(UnknownNameError, match="did you mean 'solvers'"):
        selected(["solverz"], quick)


def test_the_names_listed_are_the_names_made():
    for group, members in GROUPS.items():
        made = members.benchmarks(Settings(quick=True))
        assert tuple(dict.fromkeys(b.name for b in made)) == members.names and {b.group for b in made} == {group}


def test_list_prints_them(capsys):
    assert bench_command(["--list"]) == 0
    assert "solvers/root" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--device", "cuda", "--clock", "cpu"]])
def test_what_makes_no_sense_raises(words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DualInputError):
        bench_command(words)


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DualInputError, match="no GPU"):
        bench_command(["--device", "cuda"])


def test_a_remark_reaches_both_tables():
    class Remarked:
        remark = "recorded otherwise"

        def __call__(self):
            return torch.ones(2)

    result = run(Benchmark("demo", "x", {}, {"a": Arm(Remarked, "peer")}, "a"), Settings(quick=True))
    assert "(recorded otherwise)" in text(result) and "- a: recorded otherwise." in markdown([result], "")
