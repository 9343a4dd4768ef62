"""A small experiment: five arms, one of which cannot work."""

import contextlib
import copy
import io
import os
import sys

import pytest
import yaml

from dualnn.training.cli import main

BASE = {
    "data": {"class_path": "Digits"},
    "model": {
        "class_path": "MLP",
        "init_args": {
            "hidden": [8],
            "activation": "ReLU",
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
    },
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "log_every_n_steps": 1,
    },
}
NEWTON = {"model": {"init_args": {"activation": "dualnn.models.NewtonTanh"}}}
EXPERIMENT = {
    "name": "small",
    "question": "Does it run?",
    "base": "base.yaml",
    "reference": "backprop",
    "seeds": [0, 1],
    "tune": {"grid": [0.01, 0.1, 1e30], "seeds": [100, 101]},
    "fast": {"seeds": [0], "overrides": {"trainer": {"max_epochs": 1}}},
    "arms": {
        "backprop": {"label": "plain", "kind": "exact", "lr": 0.1},
        "broken": {"kind": "exact", "lr": 1e30},
        "hybrid": {"kind": "exact", "lr": 0.1, "overrides": NEWTON | {"dual": {"where": ["net.act*"]}}},
        "naive": {"kind": "control", "control_of": "hybrid", "lr": 0.1, "remark": "cut off", "overrides": NEWTON},
        "weights": {
            "kind": "estimated",
            "lr": 0.01,
            "overrides": {"dual": {"signal": {"class_path": "ForwardGradient", "init_args": {"tangents": 4}}}},
        },
    },
}


def write_experiment(folder, **changes):
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(copy.deepcopy(EXPERIMENT) | changes, sort_keys=False))
    return file


@pytest.fixture
def experiment_file(tmp_path, monkeypatch):
    """Writes the experiment, with changes, into an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return lambda **changes: write_experiment(tmp_path, **changes)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The experiment, run once from the command line: exit code, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("small")
    file = write_experiment(folder)
    before, path = os.environ.get("PL_GLOBAL_SEED"), list(sys.path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["compare", "--config", str(file), "--out", str(folder / "logs")])
    sys.path[:] = path
    if before is None:
        os.environ.pop("PL_GLOBAL_SEED", None)
    else:
        os.environ["PL_GLOBAL_SEED"] = before
    return code, folder, out.getvalue()
