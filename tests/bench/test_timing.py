"""The framework: agreement before timing, turns, ratios, arms that cannot run."""

import os

import pytest
import torch

from dualnn.bench import Arm, Benchmark, DisagreementError, Settings, Unavailable, run
from dualnn.bench.result import Result, Timing
from dualnn.bench.timing import agree, as_numbers, interleaved, one_thread
from dualnn.engine.errors import DualInputError

QUICK = Settings(quick=True)


def bench(rtol=1e-8, contest=True, **arms):
    made = {name: arm if isinstance(arm, Arm) else Arm(lambda f=arm: f, "ours") for name, arm in arms.items()}
    return Benchmark("demo", "case", {"n": 3}, made, next(iter(made)), rtol, contest=contest)


def one():
    return torch.ones(3)


class TestAgreement:
    def test_arms_that_differ_are_not_timed(self):
        calls = []

        def two():
            calls.append(1)
            return torch.full((3,), 2.0)

        with pytest.raises(DisagreementError, match=r"demo/case \(n=3\): result of 'b' and 'a' differ by 1"):
            run(bench(a=one, b=two), QUICK)
        assert len(calls) == 1

    @pytest.mark.parametrize("other", [torch.ones(1, 3), torch.tensor([1.0, float("nan"), 1.0]), (one(), one())])
    def test_shapes_nan_and_structure_count(self, other):
        with pytest.raises(DisagreementError):
            run(bench(a=one, b=lambda: other), QUICK)

    def test_nan_on_both_sides_is_no_agreement(self):
        with pytest.raises(DisagreementError):
            run(bench(a=lambda: one() * float("nan"), b=lambda: one() * float("nan")), QUICK)

    @pytest.mark.parametrize(("rtol", "fine"), [(1e-3, True), (1e-5, False)])
    def test_the_tolerance_is_relative_to_the_largest_number(self, rtol, fine):
        made = bench(rtol, a=lambda: torch.tensor([1000.0, 0.0]), b=lambda: torch.tensor([1000.0, 0.1]))
        if fine:
            run(made, QUICK)
        else:
            with pytest.raises(DisagreementError):
                run(made, QUICK)

    def test_shared_names_are_compared_and_others_are_not(self):
        run(bench(a=lambda: {"loss": one(), "gradient": one()}, b=lambda: {"loss": one(), "noise": 7 * one()}), QUICK)
        with pytest.raises(DisagreementError, match="loss"):
            run(bench(a=lambda: {"loss": one()}, b=lambda: {"loss": 2 * one()}), QUICK)

    def test_an_arm_that_cannot_be_checked_raises(self):
        with pytest.raises(DisagreementError, match=r"\['c'\] returned nothing that another"):
            run(bench(a=one, b=one, c=lambda: {"else": one()}), QUICK)

    def test_a_floor_need_not_be_comparable(self):
        floor = Arm(lambda: lambda: {"value": one()}, "floor")
        result = run(bench(a=one, b=one, f=floor), QUICK)
        assert len(result.timings) == 3 and result.winner != "f"

    def test_the_check_itself_compares_every_leaf(self):
        numbers = {"a": as_numbers((one(), one())), "b": as_numbers((one(), 2 * one()))}
        with pytest.raises(DisagreementError):
            agree(bench(a=one, b=one), numbers, incomplete=False)

    def test_arrays_and_numbers_are_numbers(self):
        import numpy as np

        found = as_numbers({"x": [np.ones(2, dtype=np.float32), 3, one()]})
        assert [t.dtype for t in found["x"]] == [torch.float64] * 3 and float(found["x"][1]) == 3


class TestTurns:
    def test_arms_take_turns_forwards_and_backwards(self):
        log = []
        interleaved({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 3, Settings(seconds=0.0))
        assert "".join(log)[-6:] == "abbaab"

    def test_short_arms_are_repeated(self):
        calls = {"a": 0}

        def count():
            calls["a"] += 1

        spans = interleaved({"a": count}, 2, Settings(seconds=0.001))
        assert len(spans["a"]) == 2 and calls["a"] > 20 and all(0 < s < 1e-4 for s in spans["a"])

    def test_one_thread_and_what_was_before_afterwards(self):
        before = torch.get_num_threads()
        seen = []
        with one_thread():
            seen.append(torch.get_num_threads())
        assert seen == [1] and torch.get_num_threads() == before

    def test_arms_are_built_one_by_one_just_before(self):
        log = []

        def make(name):
            def build():
                log.append(f"build {name}")
                return lambda: (log.append(name), one())[1]

            return Arm(build, "ours")

        run(bench(a=make("a"), b=make("b")), QUICK)
        assert log[:4] == ["build a", "a", "build b", "b"]

    def test_the_compiler_starts_from_nothing_and_the_cache_is_given_back(self, monkeypatch):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
        seen = []
        arm = Arm(lambda: lambda: (seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]), one())[1], "peer", compiled=True)
        result = run(bench(a=arm), QUICK)
        assert seen[0] != "mine" and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
        assert result.timings[0].first > 0


class TestMissing:
    def unavailable(self):
        raise Unavailable("jax is not installed")

    def test_a_missing_peer_is_said(self):
        result = run(bench(a=one, jax=Arm(self.unavailable, "peer")), QUICK)
        assert result.missing == {"jax": "jax is not installed"} and [t.name for t in result.timings] == ["a"]
        assert result.verdict == "a ran alone"

    def test_a_missing_reference_is_replaced(self):
        result = run(bench(jax=Arm(self.unavailable, "peer"), a=one, b=one), QUICK)
        assert result.reference == "a" and result.timings[0].ratio == 1

    def test_a_peer_that_fails_is_a_row_and_we_are_not(self):
        def fails():
            raise RuntimeError("no rule\nmore")

        result = run(bench(a=one, peer=Arm(lambda: fails, "peer")), QUICK)
        assert result.missing == {"peer": "fails: RuntimeError: no rule"}
        with pytest.raises(RuntimeError, match="no rule"):
            run(bench(a=one, b=fails), QUICK)

    def test_arms_can_be_left_out(self):
        def never():
            raise AssertionError("built")

        slow = Arm(never, "peer", compiled=True)
        assert run(bench(a=one, slow=slow), Settings(quick=True, without=("s*",))).missing == {"slow": "left out"}

    def test_without_any_arm_nothing_ran(self):
        assert run(bench(jax=Arm(self.unavailable, "peer")), QUICK).verdict == "no arm ran"

    def test_a_reference_that_is_no_arm_raises(self):
        with pytest.raises(DualInputError, match="reference 'z' is not among the arms"):
            Benchmark("demo", "case", {}, {"a": Arm(lambda: one, "ours")}, "z")


class TestVerdict:
    def result(self, ours, theirs, contest=True):
        made = bench(contest=contest, us=one, them=Arm(lambda: one, "peer"))

        def timing(name, side, taken):
            middle = sorted(taken)[len(taken) // 2]
            return Timing(name, side, middle, min(taken), max(taken), 1, 1, 1, None, taken=taken)

        return Result(made, "us", [timing("us", "ours", ours), timing("them", "peer", theirs)], {})

    def test_we_win(self):
        result = self.result([1.0, 1.0, 1.0], [2.0, 2.5, 3.0])
        assert result.winner == "us" and result.verdict == "us wins: 2.50x [2.00, 3.00] faster than them"

    def test_the_other_wins_and_is_named(self):
        result = self.result([2.0, 2.5, 5.0], [1.0, 1.0, 1.0])
        assert result.winner == "them" and result.verdict == "them wins: 2.50x [2.00, 5.00] faster than us"

    def test_the_spread_of_the_rounds_decides_on_level(self):
        # the medians differ, but one round went the other way
        assert self.result([1.0, 1.0, 1.0], [1.2, 1.2, 0.9]).verdict == "level: us and them, 1.20x [0.90, 1.20]"
        # absolute times overlap, the ratio within a round never does
        assert "us wins: 2.00x [2.00, 2.00]" in self.result([1.0, 5.0, 1.0], [2.0, 10.0, 2.0]).verdict

    def test_different_jobs_have_no_winner(self):
        assert self.result([1.0], [2.0], contest=False).verdict == "cheapest: us"

    def test_ratios_are_taken_within_a_round(self, monkeypatch):
        taken = {"a": [1.0, 10.0, 2.0], "b": [2.0, 10.0, 6.0]}
        monkeypatch.setattr("dualnn.bench.timing.interleaved", lambda *args: taken)
        second = run(bench(a=one, b=one), Settings()).timings[1]
        assert (second.ratio, second.ratio_low, second.ratio_high) == (2.0, 1.0, 3.0)
        assert (second.median, second.low, second.high) == (6.0, 2.0, 10.0)
