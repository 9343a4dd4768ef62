import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dualnn
from dualnn.engine.errors import UnknownNameError
from dualnn.training.cli import main
from dualnn.training.dual_cli import DualCLI, named_error

BASE = {
    "data": {"class_path": "Digits"},
    "model": {"class_path": "MLP", "init_args": {"hidden": [8]}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
}
SIGNAL = {"class_path": "ForwardGradient", "init_args": {"tangents": 4}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in an empty folder, and give the path and the environment back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return tmp_path


@pytest.fixture
def write(folder):
    def write(name, content):
        (folder / name).write_text(yaml.safe_dump(content))
        return name

    write("base.yaml", BASE)
    return write


def fit(*words):
    return main(["fit", "--config", "base.yaml", *words])


class TestRuns:
    def test_without_a_dual_section_training_is_stock(self, write):
        cli = DualCLI(BASE, run=False, save_config=False)
        assert not any(isinstance(callback, dualnn.training.DualPropagation) for callback in cli.trainer.callbacks)
        assert fit() == 0

    def test_fit_validate_test_predict(self, write, capsys):
        signal = ["--dual.signal", "ForwardGradient", "--dual.signal.tangents", "4"]
        assert fit(*signal) == 0
        assert "2 steps: train/acc" in capsys.readouterr().out
        (checkpoint,) = Path("logs/fit/version_0/checkpoints").glob("*.ckpt")
        config = yaml.safe_load(Path("logs/fit/version_0/config.yaml").read_text())
        assert config["dual"]["signal"]["init_args"]["tangents"] == 4
        for command in ("validate", "test", "predict"):
            words = [command, "--config", "base.yaml", "--ckpt_path", str(checkpoint), "--weights_only", "true"]
            assert main([*words, *signal]) == 0

    def test_tensorboard_is_on_by_default(self, write):
        assert fit() == 0
        events = EventAccumulator("logs/fit/version_0").Reload()
        assert {"train/loss", "train/acc", "val/acc"} <= set(events.Tags()["scalars"])

    def test_later_configurations_lie_over_earlier_ones(self, write):
        write("signal.yaml", {"dual": {"signal": SIGNAL}})
        write("more.yaml", {"dual": {"signal": {"init_args": {"tangents": 2, "rank": 1}}}})
        assert fit("--config", "signal.yaml", "--config", "more.yaml", "--dual.seed", "5") == 0
        config = yaml.safe_load(Path("logs/fit/version_0/config.yaml").read_text())
        assert config["dual"]["signal"]["class_path"] == "dualnn.signals.ForwardGradient"
        settings = config["dual"]["signal"]["init_args"]
        assert (settings["tangents"], settings["rank"], config["dual"]["seed"]) == (2, 1, 5)

    def test_where(self, write):
        write("where.yaml", {"dual": {"where": ["net.act*"]}})
        assert fit("--config", "where.yaml") == 0
        assert fit("--dual.where", "[net.act0]") == 0

    def test_the_signal_of_the_configuration_is_the_one_that_trains(self, write):
        weights = []
        for section in ({}, {"dual": {"signal": SIGNAL}}):
            cli = DualCLI(BASE | section, run=False, save_config=False)
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            weights.append(cli.model.net.head.weight.detach().clone())
        assert not torch.equal(*weights)

    def test_classes_of_the_current_folder(self, write, folder):
        (folder / "my_model.py").write_text("from dualnn.models import MLP\nclass Mine(MLP):\n    pass\n")
        write("mine.yaml", {"model": {"class_path": "my_model.Mine"}})
        assert fit("--config", "mine.yaml") == 0

    def test_version_and_help(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"dualnn {dualnn.__version__}\n"
        assert main(["--help"]) == 0
        assert "compare" in capsys.readouterr().out
        assert main([]) == 2
        assert main(["fit", "--help"]) == 0
        assert "--dual.signal" in capsys.readouterr().out

    def test_the_command_answers_without_loading_lightning(self, folder):
        code = "import sys, dualnn.training.cli as c; c.main(['--help']); sys.exit('lightning' in sys.modules)"
        path = str(Path(dualnn.__file__).parents[1])
        assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path, "PATH": ""}).returncode == 0

    def test_python_m(self, folder):
        done = subprocess.run(
            [sys.executable, "-m", "dualnn", "--version"],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(Path(dualnn.__file__).parents[1]), "PATH": ""},
        )
        assert done.stdout == f"dualnn {dualnn.__version__}\n", done.stderr


# name: (words after `fit --config base.yaml`, or an overlay; what the message says)
TYPOS = {
    "option": (["--trainer.max_epoch", "3"], "'--trainer.max_epoch': did you mean '--trainer.max_epochs'?"),
    "section of an option": (["--trainr.max_epochs", "3"], "did you mean '--trainer.max_epochs'?"),
    "key": ({"trainer": {"max_epoch": 3}}, "'trainer.max_epoch': did you mean 'trainer.max_epochs'?"),
    "section": ({"trainr": {"max_epochs": 3}}, "did you mean 'trainer.max_epochs'?"),
    "top key": ({"seed_evrything": 3}, "did you mean 'seed_everything'?"),
    "key of dual": ({"dual": {"signl": None}}, "did you mean 'dual.signal'?"),
    "model": ({"model": {"class_path": "MPL"}}, "model: unknown class 'MPL': did you mean 'MLP'?"),
    "model as option": (["--model", "MPL"], "did you mean 'MLP'?"),
    "model's path": (["--model", "dualnn.models.MPL"], "did you mean 'dualnn.models.MLP'?"),
    "model's key": ({"model": {"init_args": {"hiden": [3]}}}, "MLP: unknown key 'hiden': did you mean 'hidden'?"),
    "model's option": (["--model.hiden", "[3]"], "did you mean 'hidden'?"),
    "init_args": ({"model": {"class_path": "MLP", "init_arg": {"hidden": [3]}}}, "did you mean 'init_args'?"),
    "data": ({"data": {"class_path": "Digit"}}, "data: unknown class 'Digit': did you mean 'Digits'?"),
    "signal": ({"dual": {"signal": {"class_path": "ForwrdGradient"}}}, "did you mean 'ForwardGradient'?"),
    "signal as option": (["--dual.signal", "ForwrdGradient"], "did you mean 'ForwardGradient'?"),
    "signal's key": (
        {"dual": {"signal": {"class_path": "ForwardGradient", "init_args": {"tangens": 3}}}},
        "ForwardGradient: unknown key 'tangens': did you mean 'tangents'?",
    ),
    "signal's value": (["--dual.signal", "ForwardGradient", "--dual.signal.sampler", "gausian"], "'gaussian'?"),
    "where": ({"dual": {"where": "al"}}, "did you mean 'all'?"),
    "activation": (["--model.activation", "keplr"], "unknown activation 'keplr': did you mean 'kepler'?"),
    "callback": ({"trainer": {"callbacks": [{"class_path": "EarlyStoping"}]}}, "did you mean 'EarlyStopping'?"),
    "type": ({"model": {"init_args": {"hidden": "x"}}}, "hidden: expected list, got x"),
    "module in where": (["--dual.where", "[net.atc0]"], "net.atc0"),
    "no signal": (["--dual.seed", "3"], "needs a signal"),
}


class TestMistakes:
    @pytest.mark.parametrize("typo", TYPOS)
    def test_one_line_names_the_nearest_choice_and_the_code_is_2(self, typo, write, capsys):
        given, message = TYPOS[typo]
        if isinstance(given, dict):
            given = ["--config", write("typo.yaml", given)]
        assert fit(*given) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dualnn: error:")]
        assert len(said) == 1 and message in said[0], said
        assert not Path("logs/fit/version_0/checkpoints").exists()

    def test_command(self, capsys):
        assert main(["fitt"]) == 2
        assert "unknown command 'fitt': did you mean 'fit'?" in capsys.readouterr().err
        assert main(["compar"]) == 2
        assert "did you mean 'compare'?" in capsys.readouterr().err

    def test_nothing_said_about_the_model(self, capsys):
        assert main(["fit"]) == 2
        assert "model" in capsys.readouterr().err

    def test_a_configuration_of_the_repository_asked_for_elsewhere(self, capsys):
        assert main(["fit", "--config", "configs/base.yaml"]) == 2
        assert "run the command in the repository's root" in capsys.readouterr().err
        assert main(["fit", "--config", "mine.yaml"]) == 2
        said = capsys.readouterr().err
        assert "cannot read the configuration mine.yaml" in said and "repository" not in said

    def test_a_loss_that_is_not_finite_is_a_failed_run(self, write, capsys):
        over = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e30}}}}}
        write("lr.yaml", over)
        code = fit("--config", "lr.yaml", "--dual.signal", "Backprop", "--trainer.limit_train_batches", "8")
        assert code == 1
        assert "at step" in capsys.readouterr().err

    def test_errors_that_are_not_the_librarys_keep_their_traceback(self, write, folder):
        (folder / "broken_model.py").write_text(
            "from dualnn.models import MLP\nclass Broken(MLP):\n"
            "    def training_step(self, batch, batch_idx):\n        raise ZeroDivisionError('mine')\n"
        )
        write("mine.yaml", {"model": {"class_path": "broken_model.Broken"}})
        with pytest.raises(ZeroDivisionError, match="mine"):
            fit("--config", "mine.yaml")


def test_the_librarys_error_is_found_among_causes():
    inner = UnknownNameError("x")
    outer = ValueError("wrapped")
    outer.__cause__ = inner
    assert named_error(outer) is inner
    assert named_error(ValueError("other")) is None
