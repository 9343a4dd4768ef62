from dataclasses import replace

import pytest

from dualnn.training.compare.experiment import Arm
from dualnn.training.compare.table import Row, row, table
from dualnn.training.compare.verdict import tied, verdict


def make(name, kind="exact", score=0.98, spread=0.002, seconds=2.0, live=1000.0, **kwargs):
    arm = Arm(name, name, kind, {}, 0.1, control_of=kwargs.pop("control_of", None))
    return Row(
        arm, score, spread, finished=3, steps=920, seconds=seconds, forwards=3.0, live_bytes=live, taught=1.0, **kwargs
    )


BASE = make("backprop")


def said(*rows):
    return "\n".join(verdict([BASE, *rows], "backprop"))


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.95, "accuracy: backprop wins by 3.0 points"),
        (0.99, "accuracy: x wins by 1.0 points"),
        (0.981, "accuracy: equal to backprop within the spread"),
    ],
)
def test_accuracy(score, words):
    assert words in said(make("x", score=score))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (6.0, "time: backprop wins (3.00 x"),
        (1.0, "time: x wins (0.50 x"),
        (2.1, "time: equal"),
        (None, "time: not measured"),
    ],
)
def test_time(seconds, words):
    assert words in said(make("x", seconds=seconds))


def test_a_time_too_short_to_measure_has_no_winner():
    rows = [replace(BASE, seconds=0.1), make("x", seconds=0.4)]
    assert "time: too short to tell" in "\n".join(verdict(rows, "backprop"))


@pytest.mark.parametrize(
    ("live", "words"), [(500.0, "memory: x wins (0.50 x"), (2000.0, "memory: backprop wins (2.00 x")]
)
def test_memory(live, words):
    assert words in said(make("x", live=live))


def test_the_spread_decides_what_is_equal():
    assert tied(make("a", score=0.98, spread=0.01), make("b", score=0.97, spread=0.003))
    assert not tied(make("a", score=0.98, spread=0.001), make("b", score=0.97, spread=0.003))
    assert tied(make("a", score=0.98, spread=None), make("b", score=0.976, spread=0.1))  # one seed: half a point
    assert not tied(make("a", score=0.98, spread=None), make("b", score=0.97, spread=None))


def test_a_control_is_measured_against_its_arm():
    naive = replace(make("naive", "control", score=0.8, control_of="hybrid"), taught=0.05)
    text = said(make("hybrid"), naive)
    assert "hybrid beside its control naive: accuracy: hybrid wins by 18.0 points" in text
    assert "It teaches 5 % of the weights" in text


def test_equal_memory_is_answered_for_every_estimated_arm():
    text = said(make("estimate", "estimated", score=0.9, live=1500.0), make("lean", score=0.97, live=1200.0))
    assert "At the memory of estimate (1.5 KiB), backprop is more accurate: 98.0 ± 0.2 % with 1000 B" in text
    text = said(make("estimate", "estimated", live=1500.0), make("lean", score=0.981, live=800.0))
    assert "At the memory of estimate (1.5 KiB), lean is as accurate, with 800 B." in text
    text = said(make("estimate", "estimated", score=0.9, live=500.0))
    assert "At the memory of estimate (500 B), nothing here is more accurate." in text


def test_overall():
    assert "backprop wins: the best estimated signal, b, stays 3.0 points behind" in said(
        make("a", "estimated", score=0.9), make("b", "estimated", score=0.95)
    )
    assert "the best estimated signal, b, beats backprop in accuracy." in said(make("b", "estimated", score=0.99))
    assert "the best estimated signal, b, equals backprop within the spread." in said(make("b", "estimated"))
    dear = make("b", "estimated", seconds=6.0, live=4000.0)
    assert "within the spread, for 3.0 x of the seconds and 4.0 x of the live bytes: backprop wins on cost" in said(
        dear
    )
    assert "Overall" not in said(make("b"))


def test_failures_are_said_and_take_no_part():
    broken = replace(
        make("x", "estimated", score=0.99), failure={"error": "at step 12: loss nan", "step": 12, "seed": 1}, finished=1
    )
    text = said(broken)
    assert "x: FAILED at step 12: loss nan, seed 1." in text and "x wins" not in text and "beats" not in text
    assert "FAILED at step 12: loss nan, seed 1 (before: 99.0 ± 0.2 % of 1)" in table([broken])


def test_without_a_reference_there_is_no_verdict():
    failed = replace(BASE, score=None, failure={"error": "at step 0: ValueError: x", "step": 0, "seed": 0})
    assert verdict([failed, make("x")], "backprop") == [
        "No verdict: the reference, backprop, has no finished run.",
        "backprop: FAILED at step 0: ValueError: x, seed 0.",
    ]


def test_a_row_is_mean_and_standard_deviation():
    scores = (0.9, 0.92, 0.94)
    runs = {str(seed): {"test": score, "steps": 5, "seconds": 1.0 + seed} for seed, score in enumerate(scores)}
    found = row(BASE.arm, {"runs": runs, "costs": {}, "failure": None})
    assert (found.score, found.spread, found.finished, found.seconds) == (
        pytest.approx(0.92),
        pytest.approx(0.02),
        3,
        2.0,
    )
    one = row(BASE.arm, {"runs": {"0": runs["0"]}, "costs": {}, "failure": None})
    assert one.spread is None and "| 90.0 % " in table([one])
