"""A progress bar: how far the slowest sample is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PERIOD = 0.1  # seconds between two looks, each of which waits for the device

Tell = Callable[[Tensor, Tensor, Tensor], None]


@contextmanager
def progress(start: Tensor, end: Tensor, shown: bool) -> Iterator[Tell]:
    """A function to be told of every step: times, the steps' lengths, and which samples are still running.

    Args:
        start: Time, 0-dim.
        end: Likewise.
        shown: False: the function does nothing.
    """
    if not shown:
        yield lambda now, h, running: None
        return
    from tqdm.auto import tqdm  # Lightning's own dependency; only who asks for a bar imports it

    next_look = 0.0
    # Left as it stands by an exception, and closed.
    with tqdm(total=100.0, unit="%", desc="odeint", bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix}") as bar:

        def tell(now: Tensor, h: Tensor, running: Tensor) -> None:
            nonlocal next_look
            if time.monotonic() < next_look:
                return
            done = torch.where(running, (now - start) / (end - start), 1.0)
            slowest = int(done.argmin())
            bar.n = 100 * float(done.reshape(-1)[slowest])
            bar.set_postfix_str(f"t = {float(now.reshape(-1)[slowest]):.6g}, h = {float(h.reshape(-1)[slowest]):.2g}")
            next_look = time.monotonic() + PERIOD

        yield tell
        bar.n = 100.0
        bar.refresh()
