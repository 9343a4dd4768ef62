"""What is going on, on a terminal as a line that changes, elsewhere as one line for each finished run."""

import logging
import sys
import time
import warnings

from dualnn.training.dual_cli import quiet_lightning


def quiet() -> None:
    """Let Lightning warn, and no more: a comparison says itself what it does."""
    quiet_lightning()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # A short version may have fewer batches than the logging interval.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")


class Status:
    """A status line.

    Args:
        total: How many pieces of work there are.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.finished = 0
        self._live = sys.stderr.isatty()
        self._began = time.perf_counter()

    def doing(self, what: str) -> None:
        """Show what is going on (on a terminal)."""
        if self._live:
            seconds = time.perf_counter() - self._began
            sys.stderr.write(f"\r\x1b[K[{self.finished}/{self.total}, {seconds:.0f} s] {what} …")
            sys.stderr.flush()

    def advance(self) -> None:
        """One piece is finished."""
        self.finished += 1

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.end()
        print(line, flush=True)

    def end(self) -> None:
        """Take the status line away."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
