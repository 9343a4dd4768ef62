import mmap
import os

import pytest

from dualnn.training.compare import load_experiment
from dualnn.training.compare.fresh import FreshProcesses, measure
from dualnn.training.meters import ProcessError

MIB = 2**20


def job_of(mib):
    """Touch pages asked of the system: what malloc had kept free in this process would not raise the child's peak."""

    def job():
        with mmap.mmap(-1, mib * MIB) as pages:
            for at in range(0, len(pages), mmap.PAGESIZE):
                pages[at] = 1

    return job


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # Python 3.12, of this test's process
def test_a_process_of_its_own_reports_its_own_peak():
    code, small = measure(job_of(1))
    assert code == 0
    _, large = measure(job_of(100))
    assert 95 * MIB < large - small < 120 * MIB
    _, small_again = measure(job_of(1))  # the large one left no trace
    assert small_again - small < 10 * MIB


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_job_that_fails_ends_in_its_own_process(capfd):
    def fails():
        raise ZeroDivisionError("mine")

    before = os.getpid()
    assert measure(fails)[0] == 1
    assert os.getpid() == before
    assert "ZeroDivisionError: mine" in capfd.readouterr().err


def test_a_failing_arm_is_reported_and_the_others_are_measured(experiment_file):
    experiment = load_experiment(experiment_file(), fast=True)
    fresh = FreshProcesses(experiment, ["broken", "nowhere", "weights"])
    try:
        assert fresh.peak("weights") > fresh.idle() > 10 * MIB
        with pytest.raises(ProcessError, match="broken failed"):
            fresh.peak("broken")
    finally:
        fresh.close()
    assert not fresh.running
    with pytest.raises(ProcessError, match="arm 'nowhere' is gone"):
        fresh.peak("nowhere")
