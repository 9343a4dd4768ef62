"""The experiment of conftest.py, once from the command line, and what it left behind."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WHOLE = ("backprop", "hybrid", "naive", "weights")


@pytest.fixture
def results(finished):
    _, folder, _ = finished
    return json.loads((folder / "logs/small/results.json").read_text())


def events(folder, run):
    return EventAccumulator(str(folder / "logs" / "small" / run)).Reload()


def test_a_failed_arm_makes_the_exit_code_non_zero(finished):
    assert finished[0] == 1


def test_the_failed_arm_is_marked_with_its_step_and_the_others_are_complete(results):
    assert list(results["arms"]) == ["backprop", "broken", "hybrid", "naive", "weights"]
    failure = results["arms"]["broken"]["failure"]
    assert failure["step"] >= 1 and failure["seed"] == 0
    assert failure["error"] == f"at step {failure['step']}: loss nan"
    assert results["arms"]["broken"]["runs"] == {}
    for name in WHOLE:
        record = results["arms"][name]
        assert record["failure"] is None
        assert list(record["runs"]) == ["0", "1"]
        for run in record["runs"].values():
            assert run["steps"] == 6 and 0 <= run["test"] <= 1 and run["seconds"] > 0


def test_nothing_half_written_is_left(finished):
    _, folder, _ = finished
    assert [f.name for f in (folder / "logs").rglob("*.tmp")] == []


def test_costs_of_a_step(results):
    costs = {name: results["arms"][name]["costs"] for name in WHOLE}
    for cost in costs.values():
        assert cost["live_bytes"] > 0 and cost["forwards"] > 1
        assert cost["resident_bytes"] >= cost["idle_bytes"] > 10 * 2**20
    assert costs["weights"]["forwards"] > costs["backprop"]["forwards"]  # four tangents
    for name in ("backprop", "hybrid", "weights"):
        assert costs[name]["taught"] > 0.5
    # Behind the loop only the head learns: 8 * 10 + 10 of these and 64 * 8 + 8 and the activation's 2 * 8.
    assert costs["naive"]["taught"] <= 90 / (90 + 520 + 16)


def test_all_arms_saw_the_same_batches_and_began_with_the_same_weights(results, finished):
    for seed in ("0", "1"):
        runs = [results["arms"][name]["runs"][seed] for name in WHOLE]
        assert len({run["batches"] for run in runs}) == 1
        assert len({run["weights"]["net.linear0.weight"] for run in runs}) == 1
    first, second = (results["arms"]["backprop"]["runs"][seed] for seed in ("0", "1"))
    assert first["batches"] != second["batches"] and first["weights"] != second["weights"]
    assert "Checked: with each seed all arms saw the same batches" in finished[2]


def test_runs_have_identical_tags(finished):
    _, folder, _ = finished
    tags = [set(events(folder, f"{name}-s{seed}").Tags()["scalars"]) for name in WHOLE for seed in (0, 1)]
    assert all(found == tags[0] for found in tags)
    assert {"train/loss", "train/acc", "val/acc", "test/acc", "figure/test", "figure/seconds"} <= tags[0]


def test_hparams_and_custom_scalars_are_filled(finished, results):
    _, folder, _ = finished
    run = events(folder, "weights-s1")
    hparams = run.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(hparams)
    assert b"weights" in hparams["_hparams_/session_start_info"] and b"figure/test" in hparams["_hparams_/experiment"]
    assert run.Scalars("figure/test")[-1].value == pytest.approx(results["arms"]["weights"]["runs"]["1"]["test"])
    assert "hp_metric" not in run.Tags()["scalars"]
    assert list(run.PluginTagToContent("custom_scalars")) == ["custom_scalars__config__"]


def test_the_report_has_two_tables_marks_controls_and_gives_a_verdict(finished):
    _, folder, out = finished
    report = (folder / "logs/small/RESULT.md").read_text()
    assert report in out
    exact, estimated = report.split("## Estimated signals")
    assert "| naive * " in exact and "| weights" in estimated.split("## Verdict")[0] and "| weights" not in exact
    assert "FAILED at step 1: loss nan, seed 0" in exact
    verdict = report.split("## Verdict")[1]
    assert "plain reaches" in verdict
    assert "hybrid beside its control naive" in verdict and "It teaches" in verdict
    assert "broken: FAILED at step 1: loss nan, seed 0." in verdict
    assert "Does it run?" in report


def test_a_full_run_writes_its_result_beside_the_experiment(finished):
    _, folder, _ = finished
    assert (folder / "RESULT.md").read_text() == (folder / "logs/small/RESULT.md").read_text()


def test_one_line_for_each_finished_run(finished):
    lines = [line for line in finished[2].splitlines() if " seed " in line and "|" not in line and "steps  " in line]
    assert len(lines) == len(WHOLE) * 2
