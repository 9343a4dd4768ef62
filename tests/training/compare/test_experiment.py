import pytest

from dualnn.engine.errors import UnknownNameError
from dualnn.training import ExperimentError, RunNameError
from dualnn.training.cli import main
from dualnn.training.compare import load_experiment
from dualnn.training.compare.experiment import overlay, plain_name
from dualnn.training.compare.run import run_folder

ESCAPES = [
    "..",
    ".",
    "",
    "../x",
    "a/b",
    "/tmp/x",
    "a\\b",
    "a..b",
    ".hidden",
    "a b",
    "a\n",
    "x" * 65,
    "~",
    "-x",
    "a:b",
    "é",
    "a.",
    "$HOME",
]
ARM = {"kind": "exact", "lr": 0.1}


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_could_leave_the_folder_of_logs_are_refused(name, experiment_file, tmp_path, capsys):
    before = sorted(tmp_path.parent.iterdir())
    for changes in ({"arms": {"good": ARM, name: ARM}, "reference": "good"}, {"name": name}):
        file = experiment_file(**changes)
        with pytest.raises(RunNameError, match="cannot name an"):
            load_experiment(file)
        assert main(["compare", "--config", str(file)]) == 2
        assert "dualnn: error:" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.yaml", "compare.yaml"]
    assert sorted(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["a", "activity-k16", "weights_rank1", "lr0.1", "7", "x" * 64])
def test_plain_names_are_taken(name):
    assert plain_name("arm", name) == name


def test_names_that_yaml_reads_as_something_else(experiment_file):
    with pytest.raises(RunNameError, match="must be text, got False: put it in quotes"):
        load_experiment(experiment_file(arms={False: ARM}))


def test_a_link_out_of_the_folder_of_logs_is_refused(experiment_file, tmp_path):
    experiment = load_experiment(experiment_file())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs" / "small").mkdir(parents=True)
    (tmp_path / "logs" / "small" / "backprop-s0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunNameError, match="outside"):
        run_folder(experiment, experiment.arms["backprop"], 0, tmp_path / "logs")
    assert run_folder(experiment, experiment.arms["backprop"], 1, tmp_path / "logs").name == "backprop-s1"


def test_arms_are_overlays_on_the_base_and_the_short_version_lies_on_top(experiment_file):
    full, fast = (load_experiment(experiment_file(), fast) for fast in (False, True))
    assert full.seeds == (0, 1) and fast.seeds == (0,)
    assert full.arms["hybrid"].config["trainer"]["max_epochs"] == 2
    assert fast.arms["hybrid"].config["trainer"]["max_epochs"] == 1
    for experiment in (full, fast):
        hybrid = experiment.arms["hybrid"].config
        assert hybrid["dual"] == {"where": ["net.act*"]}
        assert hybrid["model"]["init_args"]["activation"] == "dualnn.models.NewtonTanh"
        assert hybrid["model"]["init_args"]["hidden"] == [8]
        assert hybrid["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
        assert "dual" not in experiment.arms["backprop"].config


def test_another_class_takes_none_of_the_arguments_below_it():
    below = {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1, "momentum": 0.9}}}
    assert overlay(below, {"optimizer": {"class_path": "Adam"}}) == {"optimizer": {"class_path": "Adam"}}
    same = overlay(below, {"optimizer": {"class_path": "SGD", "init_args": {"lr": 2}}})
    assert same["optimizer"]["init_args"] == {"lr": 2, "momentum": 0.9}
    assert below["optimizer"]["init_args"]["lr"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key.*'seed': did you mean 'seeds'"),
        ({"arms": {"a": ARM | {"learning_rate": 1}}}, "unknown key of arm 'a' 'learning_rate'"),
        ({"arms": {"a": ARM | {"kind": "exakt"}}}, "did you mean 'exact'"),
        ({"arms": {"a": ARM | {"control_of": "b"}}, "reference": "a"}, "control_of of 'a'"),
        ({"reference": "backprob"}, "did you mean 'backprop'"),
        ({"tune": {"gird": [1.0], "seeds": [9]}}, "did you mean 'grid'"),
        ({"fast": {"override": {}}}, "did you mean 'overrides'"),
    ],
)
def test_misspelt_keys(changes, message, experiment_file):
    with pytest.raises(UnknownNameError, match=message):
        load_experiment(experiment_file(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "at least one"),
        ({"arms": {"a": {"kind": "exact"}}}, "'lr' is missing"),
        ({"arms": {"a": ARM | {"lr": "1e-3"}}}, "lr must be a positive number, got '1e-3'"),
        ({"arms": {"a": ARM | {"lr": -1}}}, "lr must be a positive number, got -1"),
        ({"arms": {"a": 3}}, "expected keys and values, got 3"),
        ({"seeds": [0, 0]}, "different integers"),
        ({"seeds": []}, "at least one"),
        ({"tune": {"grid": [0.1], "seeds": [1, 9]}}, r"\[1\] stand in tune.seeds and in seeds"),
        ({"tune": {"grid": [0.1], "seeds": 9}}, "tune.seeds must be a list of integers"),
        ({"tune": {"grid": [0.3, 0.1], "seeds": [9]}}, "rising"),
        ({"base": "bases.yaml"}, "cannot read .*bases.yaml"),
    ],
)
def test_what_an_experiment_must_say(changes, message, experiment_file):
    with pytest.raises(ExperimentError, match=message):
        load_experiment(experiment_file(**changes))


def test_files_that_are_no_experiment(tmp_path):
    for text, message in (("a: [", "is not YAML"), ("- 1", "expected keys and values, got list"), ("", "got NoneType")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ExperimentError, match=message):
            load_experiment(tmp_path / "x.yaml")
