"""What ./scripts/demo and ./scripts/test say when the machine is not as they need it: played through with fakes.

A fake Python stands in for every program the scripts start through it (venv, pip, pytest, the library), so that
no environment is made and no network is asked.
"""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if shutil.which("bash") is None:
    pytest.skip("the scripts are written for bash", allow_module_level=True)

FAKE_PYTHON = r"""#!/usr/bin/env bash
# answers as a Python would; FAKE_* say which one
printf '%s\n' "$*" >>"$FAKE_CALLS"
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.12}" ;;
    *"import venv"*) exit "${FAKE_NO_VENV:-0}" ;;
    "-m venv "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && touch "$4/pyvenv.cfg" ;;
    *"import torch"*) printf '%s' "${FAKE_IMPORT_ERROR:-}" >&2; [ -z "${FAKE_IMPORT_ERROR:-}" ] ;;
    "-m pip install --log "*)
        echo "Collecting torch"
        [ -z "${FAKE_BREAK_OFF:-}" ] || { kill -TERM 0; sleep 10; }
        [ -z "${FAKE_PIP_ERROR:-}" ] || { printf '%s\n' "$FAKE_PIP_ERROR" >"$5"; exit 1; }
        ;;
    "-m pip list"*) printf 'torch       2.14.1\ntorchvision 0.20.0\n' ;;
    "-m pip config get"*) echo "https://me:secret@index.example/simple" ;;
    "-m pytest"* | "-m dualnn"*) echo "ran: $*"; exit "${FAKE_EXIT:-0}" ;;
esac
"""
FAKE_DF = (
    'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "disk 9 9 $(($FAKE_FREE_GB * 1048576)) 1% /"\n'
)

REFUSED = "NewConnectionError('Failed to establish a new connection: [Errno 111] Connection refused')"

Run = Callable[..., subprocess.CompletedProcess[str]]


def executable(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of what the scripts need, at a path with a space in it."""
    repo = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", repo / "scripts")
    shutil.copy(ROOT / "pyproject.toml", repo)
    return repo


@pytest.fixture
def run(repo: Path, tmp_path: Path) -> Run:
    """Run a script of the copy from another folder; FAKE_* settings as keywords."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    executable(bin_ / "df", "#!/usr/bin/env bash\n" + FAKE_DF)
    python = executable(tmp_path / "fake python", FAKE_PYTHON)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "DUALNN_", "PYTHON"))}
    base = {
        **inherited,
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(python),
        "FAKE_FREE_GB": "100",
        "FAKE_CALLS": str(tmp_path / "calls"),
    }

    def run(script: str, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [repo / "scripts" / script, *args],
            cwd=tmp_path,
            env=base | settings,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # FAKE_BREAK_OFF ends the script and what it started, not the tests
        )

    return run


def calls(tmp_path: Path) -> list[str]:
    """How the fake Python was called."""
    return (tmp_path / "calls").read_text(encoding="utf-8").splitlines()


def test_demo_installs_and_compares(run: Run, tmp_path: Path) -> None:
    done = run("demo", "--fast")
    assert done.returncode == 0, done.stderr
    assert "ran: -m dualnn compare --config experiments/digits/compare.yaml --fast" in done.stdout
    assert "Collecting torch" in done.stdout
    assert "experiments/digits/README.md" in done.stdout and "tensorboard --logdir logs/digits" in done.stdout
    assert [c for c in calls(tmp_path) if c.startswith("-m pip install") and c.endswith(" -e .")]


def test_demo_passes_the_exit_code_on(run: Run) -> None:
    done = run("demo", FAKE_EXIT="3")
    assert done.returncode == 3
    assert "tensorboard --logdir" in done.stdout


def test_test_passes_its_arguments_to_pytest(run: Run, tmp_path: Path) -> None:
    assert "ran: -m pytest -n auto" in run("test").stdout
    assert "ran: -m pytest tests/engine -k a b\n" in run("test", "tests/engine", "-k", "a b").stdout
    assert [c for c in calls(tmp_path) if c.startswith("-m pip install") and c.endswith(" -e .[dev]")]


def test_a_second_call_installs_nothing(run: Run, repo: Path, tmp_path: Path) -> None:
    def installs() -> int:
        return sum(c.startswith("-m pip install") for c in calls(tmp_path))

    run("demo")
    assert installs() == 1
    run("demo")
    assert installs() == 1
    run("test")  # asks for more than demo did
    assert installs() == 2
    run("demo")
    run("test")
    assert installs() == 2
    with (repo / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    run("test")
    assert installs() == 3


def test_a_copied_folder_installs_again(run: Run, repo: Path, tmp_path: Path) -> None:
    run("demo")
    stamp = repo / ".venv" / ".dualnn-installed"
    before = stamp.read_text(encoding="utf-8")
    copy = repo.with_name("copy")
    shutil.copytree(repo, copy)
    subprocess.run(
        [copy / "scripts" / "demo"],
        env=os.environ | {"FAKE_CALLS": str(tmp_path / "calls"), "DUALNN_MIN_FREE_GB": "0"},
        check=True,
    )
    assert (copy / ".venv" / ".dualnn-installed").read_text(encoding="utf-8") != before


@pytest.mark.parametrize("script", ["demo", "test"])
def test_python_too_old(run: Run, script: str) -> None:
    done = run(script, FAKE_VERSION="3.10")
    assert done.returncode == 1
    assert "too old" in done.stderr and "(3.10)" in done.stderr and "3.11 or newer" in done.stderr
    assert "PYTHON=" in done.stderr


def test_python_2_is_too_old(run: Run) -> None:
    assert "too old" in run("demo", FAKE_VERSION="2.7").stderr


def test_no_python(run: Run) -> None:
    done = run("demo", PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "no Python found at PYTHON=/nowhere/python3" in done.stderr


def test_no_venv_module(run: Run) -> None:
    done = run("demo", FAKE_NO_VENV="1")
    assert done.returncode == 1
    assert "venv module is missing" in done.stderr and "apt install python3.12-venv" in done.stderr


def test_disk_full_before_the_install(run: Run, repo: Path) -> None:
    done = run("demo", FAKE_FREE_GB="2")
    assert done.returncode == 1
    assert "disk is too full: 2 GB free" in done.stderr
    assert not (repo / ".venv").exists()
    assert run("demo", FAKE_FREE_GB="2", DUALNN_MIN_FREE_GB="1").returncode == 0


def test_disk_is_not_asked_for_once_torch_is_there(run: Run, repo: Path) -> None:
    run("demo")
    (repo / ".venv" / "lib" / "python3.12" / "site-packages" / "torch").mkdir(parents=True)
    assert run("test", FAKE_FREE_GB="2").returncode == 0


@pytest.mark.parametrize(
    ("pip_says", "we_say"),
    [
        (
            f"WARNING: Retrying: {REFUSED}\nERROR: No matching distribution found for hatchling",
            "packages cannot be reached",
        ),
        ("ERROR: Exception:\nTraceback\nReadTimeoutError: Read timed out.", "packages cannot be reached"),
        ("ERROR: Could not install packages due to an OSError: SSLError: bad handshake", "packages cannot be reached"),
        (f"WARNING: Retrying: {REFUSED}\nerror: metadata-generation-failed", "pip failed"),  # a retry that helped
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk ran full"),
        ("ERROR: No matching distribution found for torch>=2.11", "lacks a package"),
        ("ERROR: ResolutionImpossible: for help visit", "contradict each other"),
        ("ERROR: something nobody thought of", "pip failed"),
    ],
)
def test_pip_fails(run: Run, repo: Path, pip_says: str, we_say: str) -> None:
    done = run("demo", FAKE_PIP_ERROR=pip_says)
    assert done.returncode == 1
    assert we_say in done.stderr
    assert "secret" not in done.stderr
    assert "ran:" not in done.stdout
    assert not (repo / ".venv" / ".dualnn-installed").exists()
    assert run("demo").returncode == 0  # and goes on once pip works


def test_an_install_that_breaks_off_is_not_taken_for_done(run: Run, repo: Path) -> None:
    stamp = repo / ".venv" / ".dualnn-installed"
    run("demo")
    assert stamp.exists()
    run("test", FAKE_PIP_ERROR="half of the packages are new")
    assert not stamp.exists()


def test_interrupted(run: Run, repo: Path) -> None:
    done = run("demo", FAKE_BREAK_OFF="1")
    assert done.returncode == 1
    assert "interrupted" in done.stderr and "goes on where it stopped" in done.stderr
    assert "pip failed" not in done.stderr
    assert not (repo / ".venv" / ".dualnn-installed").exists()
    assert run("demo").returncode == 0


def test_unreachable_packages_name_the_index(run: Run) -> None:
    done = run("demo", FAKE_PIP_ERROR=f"{REFUSED}\nERROR: No matching distribution found for torch")
    assert "https://***@index.example/simple" in done.stderr and "PIP_INDEX_URL=" in done.stderr


def test_torch_and_torchvision_do_not_match(run: Run, repo: Path) -> None:
    done = run("demo", FAKE_IMPORT_ERROR="RuntimeError: operator torchvision::nms does not exist")
    assert done.returncode == 1
    assert "do not belong together" in done.stderr
    assert "torch 2.14.1" in done.stderr and "torchvision 0.20.0" in done.stderr
    assert not (repo / ".venv" / ".dualnn-installed").exists()


def test_an_import_that_fails_otherwise_is_shown(run: Run) -> None:
    done = run("demo", FAKE_IMPORT_ERROR="ImportError: libgomp.so.1: cannot open shared object file")
    assert done.returncode == 1
    assert "libgomp" in done.stderr and "cannot be imported" in done.stderr


def test_an_unfinished_environment_is_made_anew(run: Run, repo: Path, tmp_path: Path) -> None:
    (repo / ".venv").mkdir()
    (repo / ".venv" / "pyvenv.cfg").touch()
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "making .venv anew" in done.stdout
    assert [c for c in calls(tmp_path) if c.startswith("-m venv --clear")]


def test_a_folder_that_is_no_environment_is_left_alone(run: Run, repo: Path) -> None:
    (repo / ".venv").mkdir()
    (repo / ".venv" / "diary").touch()
    done = run("demo")
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert (repo / ".venv" / "diary").exists()


def test_help_of_demo_needs_nothing(run: Run, tmp_path: Path) -> None:
    done = run("demo", "--help")
    assert done.returncode == 0
    assert "--fast" in done.stdout and "#" not in done.stdout
    assert not (tmp_path / "calls").exists()


def test_the_scripts_ask_for_the_python_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    minor = re.search(r"^OLDEST_MINOR=(\d+)", (ROOT / "scripts" / "lib.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert minor is not None
    assert project["requires-python"] == f">=3.{minor[1]}"


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
