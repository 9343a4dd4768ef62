"""What the documentation shows runs: Python snippets of Markdown pages, docstring examples, paths in shell snippets."""

import doctest
import importlib
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for part in ("dualnn", "experiments", "configs") for p in (ROOT / part).rglob("*.md"))]
)
FILES = [p.relative_to(ROOT).with_suffix("") for p in sorted((ROOT / "dualnn").rglob("*.py"))]
MODULES = [".".join(p.parts).removesuffix(".__init__") for p in FILES if p.name != "__main__"]


def blocks(text: str, *languages: str) -> Iterator[tuple[int, str]]:
    """(line number, code) of every fenced block in one of the languages."""
    for match in FENCE.finditer(text):
        if match[1] in languages:
            yield text.count("\n", 0, match.start(2)), textwrap.dedent(match[2])


def run_snippets(text: str, name: str) -> int:
    """Run a page's Python blocks in order, in one namespace; the number of blocks. Tracebacks show the page's lines."""
    namespace: dict = {"__name__": "__main__"}
    found = list(blocks(text, "python"))
    for line, code in found:
        exec(compile("\n" * line + code, name, "exec"), namespace)
    return len(found)


def with_python(pages: list[Path]) -> list[Path]:
    return [p for p in pages if any(blocks(p.read_text(encoding="utf-8"), "python"))]


def ident(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_shows_python() -> None:
    assert ROOT / "README.md" in with_python(PAGES)


@pytest.mark.parametrize("page", with_python(PAGES), ids=ident)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a snippet writes stays out of the checkout
    assert run_snippets(page.read_text(encoding="utf-8"), str(page)) > 0


def test_a_failing_snippet_fails_with_its_line() -> None:
    page = (
        "# Title\n```python\na = 1\n```\n```bash\nnot python\n```\n- item\n  ```python\n  assert a == 2, 'no'\n  ```\n"
    )
    with pytest.raises(AssertionError, match="no") as caught:
        run_snippets(page, "page.md")
    assert caught.traceback[-1].lineno + 1 == page[: page.index("assert")].count("\n") + 1


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see the output"


@pytest.mark.parametrize("page", PAGES, ids=ident)
def test_files_named_in_shell_snippets_exist(page: Path) -> None:
    code = "\n".join(code for _, code in blocks(page.read_text(encoding="utf-8"), "bash", "sh", "console", "shell"))
    scripts = re.findall(r"(?:^|\s)\./(scripts/[\w.-]+)", code)
    configs = re.findall(r"(?:--config[= ]|\s)((?:configs|experiments)/[\w./-]+\.ya?ml)", code)
    missing = [name for name in [*scripts, *configs] if not (ROOT / name).is_file()]
    missing += [f"{name} (not executable)" for name in scripts if not os.access(ROOT / name, os.X_OK)]
    assert not missing, f"{ident(page)} names {', '.join(missing)}"
