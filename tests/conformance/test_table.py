"""The committed table: what it promises, and that a rerun on the installed torch says the same."""

import pytest

from dualnn.conformance.command import run
from dualnn.conformance.opinfo import module_entries, op_entries
from dualnn.conformance.sweep import COLUMNS, Row
from dualnn.conformance.table import committed, markdown, read, share, totals
from dualnn.conformance.verdicts import RIGHT, WRONG
from dualnn.engine.errors import DualInputError

OWN = COLUMNS[:4]
TABLED = pytest.mark.skipif(not committed("ops").exists(), reason="no table is committed for this torch")

# One or two of every family of rules, and everything that torch itself gets wrong or refuses.
FAMILIES = [
    "add",
    "addmm",
    "atan2",
    "cat",
    "cdist",
    "cholesky_solve",
    "clamp",
    "cumprod",
    "einsum",
    "fft.rfft",
    "gather",
    "index_reduce.prod",
    "linalg.eigh",
    "linalg.lu",
    "linalg.solve",
    "logcumsumexp",
    "masked.softmax",
    "nn.functional.batch_norm",
    "nn.functional.conv2d",
    "nn.functional.cross_entropy",
    "nn.functional.ctc_loss",
    "nn.functional.embedding_bag",
    "nn.functional.glu",
    "nn.functional.huber_loss",
    "nn.functional.hardsigmoid",
    "nn.functional.instance_norm",
    "nn.functional.layer_norm",
    "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss",
    "nn.functional.pairwise_distance",
    "nn.functional.scaled_dot_product_attention",
    "nn.functional.soft_margin_loss",
    "ormqr",
    "pow",
    "scatter_reduce.prod",
    "_segment_reduce.lengths",
    "sort",
    "special.i1",
    "std",
    "view_as_complex",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_ops_are_right(name):
    if name not in op_entries():
        pytest.skip("this torch has no such op")
    (row,) = run("ops", [name], limit=3, torch_too=False)
    assert {c: row.outcomes[c] for c in OWN[1:]} == dict.fromkeys(OWN[1:], RIGHT), row.why


def test_boundary_samples_are_right_or_say_nan():
    for row in run("boundary", torch_too=False):
        assert row.outcomes["first"] == RIGHT, (row.name, row.why)
        assert WRONG not in row.outcomes.values(), (row.name, row.why)


@pytest.mark.parametrize("name", ["abs", "linalg.svd", "linalg.vector_norm", "mul", "pow", "var"])
def test_complex_ops_are_right(name):
    (row,) = run("complex", [name], limit=3, torch_too=False)
    assert {c: row.outcomes[c] for c in OWN[1:]} == dict.fromkeys(OWN[1:], RIGHT), row.why


@pytest.mark.parametrize("name", ["nn.BatchNorm1d", "nn.LSTM", "nn.MultiheadAttention", "nn.CTCLoss", "nn.GroupNorm"])
def test_modules_are_right(name):
    assert name in module_entries()
    (row,) = run("modules", [name], limit=2, torch_too=False)
    assert WRONG not in row.outcomes.values()
    assert row.outcomes["first"] == RIGHT, row.why


@TABLED
@pytest.mark.parametrize(
    ("kind", "first", "second"), [("ops", 0.98, 0.95), ("complex", 0.98, 0.95), ("modules", 0.98, 0.95)]
)
def test_the_committed_table_keeps_its_promises(kind, first, second):
    if not committed(kind).exists():
        pytest.skip(f"no table of {kind} is committed for this torch")
    rows = list(read(committed(kind)).values())
    assert len(rows) > 90
    for column, least in (("first", first), ("second", second)):
        right, total = share(rows, column)
        assert right / total >= least
    silent = [row.name for row in rows if WRONG in {row.outcomes[c] for c in OWN}]
    assert not silent


@TABLED
@pytest.mark.parametrize("name", ["mul", "nn.functional.layer_norm", "linalg.qr", "nn.functional.max_pool2d", "trace"])
def test_a_rerun_agrees_with_the_committed_table(name):
    (row,) = run("ops", [name], torch_too=False)
    kept = read(committed("ops"))[name]
    assert {c: row.outcomes[c] for c in OWN} == {c: kept.outcomes[c] for c in OWN}


@TABLED
@pytest.mark.sweep  # many minutes, and a table for exactly this torch: run it after `dualnn conformance --write`
@pytest.mark.parametrize("kind", ["ops", "complex", "modules", "boundary"])
def test_a_full_rerun_agrees_with_the_committed_table(kind):
    if not committed(kind).exists():
        pytest.skip(f"no table of {kind} is committed for this torch")
    kept = read(committed(kind))
    rows = run(kind, torch_too=False)
    assert {r.name for r in rows} == set(kept)
    # All of them in one message: a run takes minutes.
    apart = {
        f"{row.name}, {c}": f"{row.outcomes[c]}, committed {kept[row.name].outcomes[c]}: {row.why.get(c)}"
        for row in rows
        for c in OWN[1:]
        if row.outcomes[c] != kept[row.name].outcomes[c]
    }
    assert apart == {}


def test_a_table_survives_writing_and_reading(tmp_path):
    row = Row("op", 8, dict.fromkeys(COLUMNS, RIGHT) | {"value": "close", "second": WRONG}, {"second": 7})
    path = tmp_path / "table.md"
    path.write_text(markdown("Ops", [row]), encoding="utf-8")
    assert read(path)["op"].outcomes == row.outcomes
    assert "WRONG (7/8)" in path.read_text()
    assert "second order: 0 of 1 right (0.0 %): 1 WRONG" in totals([row])


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(DualInputError, match=r"no conformance table torch-1\.0-ops\.md"):
        read(tmp_path / "torch-1.0-ops.md")
