"""`dualnn conformance`."""

import pytest

from dualnn.conformance import command
from dualnn.engine.errors import UnknownNameError
from dualnn.training.cli import main


def test_it_prints_a_row_and_the_totals(capsys):
    assert main(["conformance", "--no-torch", "--samples", "2", "sin", "nn.Tanh"]) == 0
    out = capsys.readouterr().out
    assert "sin " in out and "first order: 1 of 1 right (100.0 %)" in out and "nn.Tanh" in out


def test_it_writes_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dualnn.conformance.table.TABLES", tmp_path)
    assert command.check(["--write", "--kind", "ops", "--samples", "1", "sin"]) == 0
    (table,) = tmp_path.glob("*.md")
    assert "| sin | 1 | bitwise | right | right | right | right | right |" in table.read_text()


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'sin'"):
        command.check(["sinn"])


def test_a_wrong_derivative_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(command, "silently_wrong", lambda row: True)
    assert command.check(["--no-torch", "--samples", "1", "--kind", "ops", "sin"]) == 1
