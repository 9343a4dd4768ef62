"""Peak resident size of one process per arm, each forked from a process that has only imported the libraries.

Importing torch and Lightning takes seconds and, for a moment, more memory than a small model's training: in processes
that import for themselves that moment would hide what the arms differ in, and nine of them would take a minute. A
forked process begins with the libraries in place and a peak of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dualnn.training.compare.experiment import Experiment, load_experiment
from dualnn.training.compare.run import build
from dualnn.training.compare.status import quiet
from dualnn.training.errors import ExperimentError
from dualnn.training.meters import ProcessError

_STEPS = 20
_IDLE = ""  # stands for a process that trains nothing


class FreshProcesses:
    """Peak resident sizes of a process per arm, measured one after another in the background.

    Args:
        experiment: The experiment.
        arms: Names of the arms.
    """

    def __init__(self, experiment: Experiment, arms: Sequence[str]) -> None:
        self._codes: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._last_words = ""
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(experiment.file), experiment.mode, *arms]
        env = {
            **os.environ,
            # The same modules as here, installed or not.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            # The stacks and arenas of idle threads would count; and a process with threads should not fork.
            "OMP_NUM_THREADS": str(experiment.threads),
        }
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                name, code, peak = json.loads(line)
                self._codes[name], self._peaks[name] = code, peak

    @property
    def running(self) -> bool:
        """Whether some are still to come."""
        return self._reader.is_alive()

    def peak(self, arm: str) -> int:
        """Bytes.

        Raises:
            ProcessError: The arm's process failed.
        """
        self._reader.join()
        if self._codes.get(arm) != 0:
            raise ProcessError(
                f"the process that measures {arm or 'the libraries'} failed "
                f"(code {self._codes.get(arm)}):\n{self._said()}"
            )
        return self._peaks[arm]

    def idle(self) -> int:
        """Bytes of a process that has the libraries and trains nothing."""
        return self.peak(_IDLE)

    def close(self) -> None:
        """End it, finished or not; what was measured stays."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if not self._errors.closed:
            self._last_words = self._said()
            self._errors.close()

    def _said(self) -> str:
        """The last lines that the processes wrote to stderr."""
        if self._errors.closed:
            return self._last_words
        self._errors.seek(0)
        return "".join(self._errors.readlines()[-20:])


def measure(job: Callable[[], object]) -> tuple[int, int]:
    """Run a job in a forked process; return its exit code and its peak resident bytes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException:  # whatever it was: it is printed, and must not run on in a copy of the parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit


def main(argv: Sequence[str]) -> None:
    """Measure each arm; one line of JSON for each: name, exit code, peak."""
    file, mode, *names = argv
    quiet()
    print(json.dumps([_IDLE, *measure(lambda: None)]), flush=True)
    for name in names:
        print(json.dumps([name, *measure(partial(_train, file, mode, name))]), flush=True)


def _train(file: str, mode: str, name: str) -> None:
    os.dup2(2, 1)  # what training prints must not stand between the lines of JSON
    experiment = load_experiment(file, fast=mode == "fast")
    if name not in experiment.arms:
        raise ExperimentError(f"{file} has changed: arm {name!r} is gone")
    torch.set_num_threads(experiment.threads)
    limits = {"max_epochs": -1, "max_steps": _STEPS, "limit_val_batches": 0}
    cli = build(experiment.arms[name], experiment.seeds[0], limits, [])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)


if __name__ == "__main__":
    main(sys.argv[1:])
