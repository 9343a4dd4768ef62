"""Who may import whom, read off the syntax trees of the package: the parts stay parts."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dualnn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dualnn"

# part -> the parts it may import, besides itself. The one exception: every part may raise the errors of ERRORS.
CHAIN = ["engine", "solvers", "activations", "layers"]
BELOW_TRAINING = {*CHAIN, "signals", "diagnosis", "conformance", "bench", "data", "models"}
ALLOWED: dict[str, set[str]] = {
    "engine": set(),
    "solvers": {"engine"},
    "activations": {"engine", "solvers"},
    "layers": {"engine", "solvers", "activations"},
    "signals": {"engine"},
    "diagnosis": {*CHAIN, "signals"},
    "conformance": BELOW_TRAINING,
    "bench": BELOW_TRAINING,
    "data": set(),
    "models": {"layers", "activations"},
    "training": BELOW_TRAINING,
}
ERRORS = "dualnn.engine.errors"
LIGHTNING_USERS = {"training", "data", "models"}
OUTSIDE = {"configs", "experiments", "scripts", "tests", "logs"}


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module, whether at the top, inside a function or by importlib."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parent = module.split(".")[: None if is_package and level == 1 else -level + is_package]
                    base = ".".join([*parent, *([base] if base else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports that its part may not."""
    part = module.split(".")[1] if "." in module else ""
    if part in ("", "__main__"):
        part = ""  # dualnn itself and `python -m dualnn` stand above all parts
    found = []
    for line, name in imported(ast.parse(source), module, is_package):
        where = f"{module}:{line}: imports {name}"
        top, *rest = name.split(".")
        if top in OUTSIDE:
            found.append(f"{where}: nothing imports {top}")
        elif top in ("lightning", "pytorch_lightning") and part not in LIGHTNING_USERS:
            found.append(f"{where}: only {', '.join(sorted(LIGHTNING_USERS))} import lightning")
        elif top == "dualnn" and part and not name.startswith(ERRORS + "."):
            if not rest:
                found.append(f"{where}: import the part that is meant, `dualnn` resolves to all of them")
            elif rest[0] in ALLOWED and rest[0] != part and rest[0] not in ALLOWED[part]:
                found.append(f"{where}: {part} may import {', '.join(sorted(ALLOWED[part])) or 'no other part'}")
            elif rest[0] not in ALLOWED and rest[0] != "__version__":
                found.append(f"{where}: no such part; public names come from the part that defines them")
    return found


def modules() -> list[tuple[Path, str]]:
    """(file, dotted name) of every module of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append((file, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def test_every_folder_is_a_part_of_the_design() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ALLOWED)
    assert dualnn._SUBPACKAGES == set(ALLOWED)
    assert all((PACKAGE / part / "__init__.py").is_file() for part in ALLOWED)


@pytest.mark.parametrize("part", ["", *ALLOWED])
def test_imports_point_one_way(part: str) -> None:
    found = []
    for file, module in modules():
        if (module.split(".")[1:2] or [""])[0].replace("__main__", "") == part:
            found += violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dualnn.engine.dual", "from dualnn.layers import Dual"),
        ("dualnn.engine.dual", "def f():\n    import dualnn.signals.exact"),
        ("dualnn.engine.dual", "from dualnn import signals"),
        ("dualnn.engine.dual", "from ..layers.dual import Dual"),
        ("dualnn.engine.dual", "import importlib\nimportlib.import_module('dualnn.layers')"),
        ("dualnn.engine.dual", "import lightning.pytorch as pl"),
        ("dualnn.engine.dual", "import dualnn as dn"),
        ("dualnn.engine.dual", "from dualnn import dual"),
        ("dualnn.solvers.root", "from dualnn.activations import get"),
        ("dualnn.activations.kepler", "from dualnn.layers.dual import Dual"),
        ("dualnn.layers.dual", "from dualnn.signals import Exact"),
        ("dualnn.signals.exact", "from dualnn.layers import Dual"),
        ("dualnn.signals.exact", "from pytorch_lightning import Trainer"),
        ("dualnn.diagnosis.doctor", "from dualnn.training import compare"),
        ("dualnn.bench.root", "from dualnn.training.cli import main"),
        ("dualnn.conformance.run", "from dualnn.training.cli import main"),
        ("dualnn.models.mlp", "from dualnn.signals import Exact"),
        ("dualnn.models.mlp", "from dualnn.engine.dual_tensor import DualTensor"),
        ("dualnn.data.digits", "from dualnn.models import MLP"),
        ("dualnn.training.cli", "from experiments.digits import arms"),
        ("dualnn.training.cli", "import scripts.lib"),
        ("dualnn", "import configs"),
    ],
)
def test_the_checker_sees_a_violation(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dualnn.training.cli", "import lightning\nfrom dualnn.diagnosis import doctor\nfrom dualnn import layers"),
        ("dualnn.training.cli", "from dualnn import __version__"),
        ("dualnn.models.mlp", "from dualnn.engine.errors import DualInputError\nfrom . import cnn"),
        ("dualnn.diagnosis.doctor", "from dualnn.signals import Exact\nfrom ..engine.dual import DualTensor"),
        ("dualnn.engine.dual", "import torch\nfrom .errors import DualnnError"),
        ("dualnn", "from dualnn import training"),
    ],
)
def test_the_checker_lets_the_design_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_relative_import_in_a_package_is_resolved_from_the_package() -> None:
    assert violations("from .dual import DualTensor", "dualnn.engine", is_package=True) == []
    assert len(violations("from ..layers import Dual", "dualnn.engine", is_package=True)) == 1


def test_no_public_function_or_class_is_named_like_a_part() -> None:
    clashes = [
        f"{module}.{node.name}"
        for file, module in modules()
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in ALLOWED
    ]
    assert not clashes, "dualnn.<name> would mean two things: " + ", ".join(clashes)


def test_every_public_name_resolves() -> None:
    for name in dualnn.__all__:
        value = getattr(dualnn, name)
        assert value.__name__ == (f"dualnn.{name}" if name in ALLOWED else name)
        assert name in dir(dualnn)


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'jaccobian'") as caught:
        getattr(dualnn, "jaccobian")  # noqa: B009 - the misspelling is the point
    assert caught.value.name == "jaccobian" and caught.value.obj is dualnn  # what "Did you mean" is made from


def test_import_dualnn_is_light() -> None:
    heavy = ["torch", "lightning", "pytorch_lightning", "torchvision", "sklearn", "mnist1d", "tensorboard"]
    code = f"import sys, dualnn; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_parts_below_training_load_without_lightning() -> None:
    code = f"""
import importlib, sys
for part in {sorted({*ALLOWED} - LIGHTNING_USERS)}:
    importlib.import_module("dualnn." + part)
    for heavy in {{"lightning", "torchvision", "sklearn"}} & set(sys.modules):
        sys.exit(f"dualnn.{{part}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def declared(requirements: list[str]) -> set[str]:
        names = {re.split(r"[\[<>=~! ;]", requirement)[0] for requirement in requirements}
        return {{"scikit-learn": "sklearn", "pyyaml": "yaml"}.get(name, name) for name in names}

    extras = {extra: declared(names) for extra, names in project["optional-dependencies"].items()}
    always = {"dualnn", *declared(project["dependencies"]), *sys.stdlib_module_names}
    # Peers are imported by the benchmarks alone; a test oracle may stand in a function beside what it judges.
    missing = []
    for file, module in modules():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_load = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])
        lines_at_load = {line for line, _ in imported(at_load, module, False)}
        fine = always | (extras["bench"] if module.startswith("dualnn.bench") else set())
        for line, name in imported(tree, module, file.name == "__init__.py"):
            if name.split(".")[0] not in fine | (set() if line in lines_at_load else extras["dev"]):
                missing.append(f"{module}:{line}: {name}")
    assert not missing, "not among the dependencies in pyproject.toml: " + ", ".join(missing)
