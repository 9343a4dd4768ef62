import json
import os

import pytest

from dualnn.training.compare import load_experiment
from dualnn.training.compare.results import Results, write_atomically


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "r.json"
    write_atomically(path, "old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_others_may_read_the_results(tmp_path):
    write_atomically(tmp_path / "r.json", "x")
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def experiment(experiment_file):
    return load_experiment(experiment_file())


def test_the_file_is_complete_after_every_step(experiment, tmp_path):
    path = tmp_path / "results.json"
    results = Results(experiment, path)
    arm, other = experiment.arms["backprop"], experiment.arms["broken"]
    results.start(arm)
    results.add_costs(arm, {"live_bytes": 3})
    assert json.loads(path.read_text())["arms"]["backprop"]["costs"] == {"live_bytes": 3}
    results.add_run(arm, 0, {"test": 0.5})
    results.start(other)
    results.fail(other, {"error": "x", "step": 3, "seed": 0})
    again = Results(experiment, path)
    assert again.arms == results.arms
    assert again.failed(other) and not again.failed(arm)


def test_results_of_another_mode_or_configuration_are_left_behind(experiment, experiment_file, tmp_path):
    path = tmp_path / "results.json"
    results = Results(experiment, path)
    for arm in experiment.arms.values():
        results.start(arm)
    assert Results(load_experiment(experiment_file(), fast=True), path).arms == {}
    changed = experiment_file(overrides={"trainer": {"max_epochs": 9}})
    assert Results(load_experiment(changed), path).arms == {}


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_file_that_is_not_ours_is_replaced(text, experiment, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    results = Results(experiment, path)
    results.start(experiment.arms["backprop"])
    assert list(json.loads(path.read_text())["arms"]) == ["backprop"]
