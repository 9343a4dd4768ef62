import json
import os
from pathlib import Path

import pytest

from dualnn.training.cli import main
from dualnn.training.compare import command


@pytest.fixture
def compare(experiment_file, monkeypatch):
    """Runs the command on the experiment; processes of their own are left out, they take seconds."""

    class NoProcesses:
        running = False

        def __init__(self, experiment, arms):
            pass

        def peak(self, arm):
            return 2**20

        def idle(self):
            return 2**19

        def close(self):
            pass

    monkeypatch.setattr(command, "FreshProcesses", NoProcesses)

    def compare(*words, **changes):
        return main(["compare", "--config", str(experiment_file(**changes)), *words])

    return compare


def results():
    return json.loads(Path("logs/small/results.json").read_text())


def test_only_runs_some_arms_and_keeps_the_others_results(compare, tmp_path, capsys):
    assert compare("--fast", "--only", "backprop", "weights") == 0
    first = results()
    assert list(first["arms"]) == ["backprop", "weights"] and first["mode"] == "fast"
    assert compare("--fast", "--only", "weights") == 0
    second = results()
    assert second["arms"]["backprop"] == first["arms"]["backprop"]
    assert second["arms"]["weights"]["runs"]["0"]["test"] == first["arms"]["weights"]["runs"]["0"]["test"]
    assert not (tmp_path / "RESULT.md").exists()  # a short run is no result
    assert "one seed: no spread" in capsys.readouterr().out


def test_results_of_another_configuration_are_not_kept(compare):
    arms = {name: {"kind": "exact", "lr": 0.1} for name in ("backprop", "second")}
    assert compare("--fast", arms=arms) == 0
    arms["backprop"]["lr"] = 0.2
    assert compare("--fast", "--only", "second", arms=arms) == 0
    assert list(results()["arms"]) == ["second"]


def test_seeds_and_write(compare, tmp_path):
    assert compare("--fast", "--only", "backprop", "--seeds", "5", "6", "--write") == 0
    assert list(results()["arms"]["backprop"]["runs"]) == ["5", "6"]
    assert (tmp_path / "RESULT.md").exists()


def test_any_other_failure_ends_its_arm_too_and_leaves_the_traceback(compare, tmp_path, capsys):
    (tmp_path / "breaking.py").write_text(
        "from dualnn.models import MLP\nclass Breaks(MLP):\n"
        "    def on_test_start(self):\n        raise ZeroDivisionError('of my own')\n"
    )
    overrides = {"model": {"class_path": "breaking.Breaks", "init_args": {"hidden": [8]}}}
    arms = {
        "first": {"kind": "exact", "lr": 0.1, "overrides": overrides},
        "second": {"kind": "exact", "lr": 0.1},
    }
    assert compare("--fast", arms=arms, reference="second") == 1
    failure = results()["arms"]["first"]["failure"]
    assert failure["error"] == "at step 3: ZeroDivisionError: of my own" and failure["step"] == 3
    assert "on_test_start" in Path(failure["traceback"]).read_text()
    assert results()["arms"]["second"]["runs"]["0"]["test"] >= 0
    assert "FAILED at step 3: ZeroDivisionError: of my own" in capsys.readouterr().out


def test_a_run_that_is_interrupted_leaves_what_was_finished(compare, tmp_path):
    (tmp_path / "interrupting.py").write_text(
        "from dualnn.models import MLP\nclass Interrupts(MLP):\n"
        "    def on_test_start(self):\n        raise KeyboardInterrupt\n"
    )
    overrides = {"model": {"class_path": "interrupting.Interrupts", "init_args": {"hidden": [8]}}}
    arms = {
        "first": {"kind": "exact", "lr": 0.1},
        "second": {"kind": "exact", "lr": 0.1, "overrides": overrides},
        "third": {"kind": "exact", "lr": 0.1},
    }
    assert compare("--fast", arms=arms, reference="first") != 0
    assert results()["arms"]["first"]["runs"]["0"]["test"] >= 0
    assert results()["arms"]["third"]["runs"] == {}


def test_tuning_prints_the_grid_and_its_edges_and_writes_a_proposal(compare, capsys):
    assert compare("--tune", "--only", "backprop", "weights") == 0
    out = capsys.readouterr().out
    assert "1e+30 failed" in out and "[0.1 " in out
    assert "Edge hits: " in out
    proposed = Path("logs/small/lr.yaml").read_text()
    assert "backprop:\n    lr: 0.1\n" in proposed
    assert os.listdir("logs/small") == ["lr.yaml"]  # tuning is no result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "backprob"], "unknown arm 'backprob': did you mean 'backprop'?"),
        (["--fsat"], "unknown option '--fsat': did you mean '--fast'?"),
        (["--seeds", "x"], "argument --seeds"),
    ],
)
def test_misspelt_words(words, message, compare, capsys):
    assert compare(*words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [{"model": {"init_args": {"hiden": [3]}}}, {"dual": {"signl": 1}}])
def test_a_mistake_in_any_arm_shows_before_the_first_trains(overrides, compare, capsys):
    arms = {"good": {"kind": "exact", "lr": 0.1}, "bad": {"kind": "exact", "lr": 0.1, "overrides": overrides}}
    assert compare(arms=arms, reference="good") == 2
    said = capsys.readouterr()
    assert "arm 'bad'" in said.err and "did you mean" in said.err
    assert not Path("logs/small/results.json").exists()


def test_a_metric_that_the_model_does_not_log(compare, capsys):
    assert compare("--fast", "--only", "backprop", metric="accc") == 1
    assert "did you mean 'val/acc'?" in capsys.readouterr().out


def test_an_experiment_of_the_repository_asked_for_elsewhere(experiment_file, capsys):
    experiment_file()
    assert main(["compare", "--config", "experiments/digits/compare.yaml"]) == 2
    assert "run the command in the repository's root" in capsys.readouterr().err
