"""The bar shows the slowest sample, and is closed whatever happens."""

import pytest
import torch
import tqdm.auto

from dualnn.solvers import odeint
from dualnn.solvers.ode import progress
from tests.solvers.ode.problems import F64

T = torch.tensor([2.0, 4.0], dtype=F64)


@pytest.fixture
def bars(monkeypatch):
    """Every bar made, with the positions it was shown at."""
    made = []

    class Recorded(tqdm.auto.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen, self.closed = [], False
            made.append(self)

        def refresh(self, *args, **kwargs):
            if hasattr(self, "seen"):
                self.seen.append(self.n)
            return super().refresh(*args, **kwargs)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorded)
    monkeypatch.setattr(progress, "PERIOD", 0.0)
    return made


def test_it_follows_the_slowest_sample_to_the_end(bars, capfd):
    rate = torch.tensor([[1.0], [300.0]], dtype=F64)
    y0 = torch.ones(2, 1, dtype=F64)
    _, stats = odeint(lambda t, y, r: -r * y, y0, T, (rate,), "dopri5", options={"progress": True}, full_output=True)
    (bar,) = bars
    assert bar.closed and bar.seen[-1] == 100.0 and bar.seen == sorted(bar.seen)
    assert len(bar.seen) >= int(stats.steps.max()) > 2 * int(stats.steps.min())
    assert "odeint: 100%" in capfd.readouterr().err


def test_it_is_closed_by_an_exception(bars, capfd):
    def fn(t, y):
        if float(t) > 3:
            raise ZeroDivisionError
        return -y

    with pytest.raises(ZeroDivisionError):
        odeint(fn, torch.ones(1, dtype=F64), T, options={"progress": True})
    (bar,) = bars
    assert bar.closed and 0 < bar.seen[-1] < 55


def test_silent_unless_asked(bars, capfd):
    odeint(lambda t, y: -y, torch.ones(1, dtype=F64), T)
    assert not bars and capfd.readouterr().err == ""
