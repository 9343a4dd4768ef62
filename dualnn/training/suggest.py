"""A parser whose errors fit on a line and name what was probably meant."""

import difflib
import importlib
import inspect
import os
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from dualnn.training.errors import UsageError

# The words in which jsonargparse reports each kind of mistake (a test fails if another release says it otherwise).
_INNER = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")
_NO_SUCH_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_IMPORT = re.compile(r"Problem with given class_path '([\w.]+)':\s+(?:No module named|module .* has no attribute)")
_OPTION_OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_OPTION_OF_COMMAND = re.compile(r"Subcommand '\w+' does not accept option '([\w.]+)'")
_OPTION = re.compile(r"Option '([\w.]+)' is not accepted")
_LITERAL = re.compile(r"Subtypes: \[typing\.Literal\[(.*?)\].*Given value: (.*)", re.DOTALL)
_COMMAND = re.compile(r"invalid choice: '(\S+)' \(choose from (.*)\)")
_KEY = re.compile(r'Parser key "([\w.]+)"')
_NO_FILE = re.compile(r"(?:Parser key \"(?:\w+\.)?config\":|Unable to load config).*?([^\s'\"]+\.ya?ml)", re.DOTALL)
_WRONG_TYPE = re.compile(r'Parser key "([\w.]+)":\s+Expected an? (.*?)\. Got value: (.*)')
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")


class SuggestingParser(LightningArgumentParser):
    """Lightning's argument parser, with one-line errors that say "did you mean"."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UsageError` (argparse would print all options and exit)."""
        if not self.exit_on_error:
            # A parser that jsonargparse makes for the arguments of one class: its message comes back to the outer
            # parser inside a longer one, where the marks let it be found.
            super().error(f"[[{explain(self, message)}]]", ex)
        raise UsageError(explain(self, message)) from ex


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The nearest choice as the end of a sentence, or nothing where none is near.

    Example:
        >>> did_you_mean("max_epoch", ["max_epochs", "max_steps"])
        ": did you mean 'max_epochs'?"
    """
    near = difflib.get_close_matches(name, sorted(set(choices)), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def explain(parser: Any, message: str) -> str:
    """Turn a message of jsonargparse into one line with the nearest choice, where the mistake is of a known kind."""
    key = _KEY.findall(message)
    where = f"{key[0]}: " if key else ""
    if inner := _INNER.findall(message):
        # A union of types has a complaint from each; the one that knows a near name is about what was meant.
        best = next((text for text in inner if "did you mean" in text), inner[-1])
        owner = _CLASS.findall(message)
        return f"{where}{owner[-1].rsplit('.', 1)[-1] + ': ' if owner else ''}{best}"
    if found := _UNRECOGNIZED.search(message):
        option = found[1].split("=")[0]
        return f"unknown option {option!r}{did_you_mean(option, _options(parser))}"
    if found := _COMMAND.search(message):
        commands = ["compare", *re.findall(r"[\w-]+", found[2])]
        return f"unknown command {found[1]!r}{did_you_mean(found[1], commands)}"
    if found := _OPTION_OF_GROUP.search(message):
        inside = [dest.removeprefix(found[1] + ".") for dest in _dests(parser) if dest.startswith(found[1] + ".")]
        return f"{found[1]} has no option {found[2]!r}{did_you_mean(found[2], inside)}"
    if found := _OPTION_OF_COMMAND.search(message) or _OPTION.search(message):
        return f"unknown key {found[1]!r}{_nearest_dest(found[1], _dests(parser))}"
    if found := _NO_SUCH_CLASS.search(message):
        names = sorted(_classes_for(parser, message))
        choices = f" Choices: {', '.join(names)}" if len(names) <= 12 else ""
        return f"{where}unknown class {found[1]!r}{did_you_mean(found[1], names)}{choices}"
    if found := _NO_IMPORT.search(message):
        paths = [f"{found[1].rsplit('.', 1)[0]}.{name}" for name in _classes_for(parser, message)]
        return f"{where}cannot import class {found[1]!r}{did_you_mean(found[1], paths)}"
    if found := _LITERAL.search(message):
        value, choices_in = found[2].strip(), re.findall(r"'([^']+)'", found[1])
        return f"{where}unknown value {value!r}{did_you_mean(value, choices_in)} Choices: {', '.join(choices_in)}"
    if found := _NO_FILE.search(message):
        path = os.path.relpath(found[1])
        return f"cannot read the configuration {path}.{elsewhere(path)}"
    if found := _WRONG_TYPE.search(message):
        kind = re.sub(r"<class '(\w+)'>", r"\1", found[2])
        return f"{where if found[1] not in where else ''}{found[1]}: expected {kind}, got {found[3]}"
    if found := _REQUIRED.search(message):
        return f"nothing is said about {found[1]}: give it as an option or in a --config file"
    return message.strip()


def elsewhere(path: str) -> str:
    """What to do when a file of the repository is asked for in another folder."""
    if path.startswith(("configs/", "experiments/", "./configs/", "./experiments/")):
        return (
            " configs/ and experiments/ belong to the repository, not to the installed package: run the command in "
            "the repository's root, or give the path of your own file"
        )
    return ""


def _nearest_dest(key: str, dests: list[str]) -> str:
    first = key.split(".")[0]
    if "." in key and first != "init_args" and (hint := did_you_mean(first, ["init_args"])):
        return hint
    # Compare a whole dotted key first; a key that is one word may also be a misspelt section.
    sections = {dest.split(".")[0] for dest in dests}
    return did_you_mean(key, dests) or did_you_mean(first, sections)


def _parsers(parser: Any) -> Iterator[Any]:
    yield parser
    if (commands := getattr(parser, "_subcommands_action", None)) is not None:
        yield from commands._name_parser_map.values()


def _options(parser: Any) -> list[str]:
    return [option for one in _parsers(parser) for option in one._option_string_actions if option.startswith("--")]


def _dests(parser: Any) -> list[str]:
    return [action.dest for one in _parsers(parser) for action in one._actions]


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None  # the class itself is what could not be found: there is nothing to compare with


def _parameters(path: str) -> list[str]:
    owner = _import(path)
    return list(inspect.signature(owner).parameters) if owner is not None else []


def _classes_for(parser: Any, message: str) -> set[str]:
    """Short names of the classes that may stand where the message says an unknown one stands."""
    keys = _KEY.findall(message)
    owners = _CLASS.findall(message)
    hint: Any = None
    if owners and len(keys) > 1 and (owner := _import(owners[-1])) is not None:
        hint = typing.get_type_hints(owner.__init__).get(keys[-1].split(".")[0])
    elif keys:
        hint = next(
            (getattr(a, "_typehint", None) for one in _parsers(parser) for a in one._actions if a.dest == keys[0]), None
        )
    return {name for base in _bases(hint) for name in _subclasses(base)} - {base.__name__ for base in _bases(hint)}


def _bases(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and hint not in (str, int, float, bool, type(None), list, dict, tuple):
        yield hint
    for inner in typing.get_args(hint):
        yield from _bases(inner)


def _subclasses(base: type) -> Iterator[str]:
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base.__name__
    below: list[type] = base.__subclasses__()
    for sub in below:
        yield from _subclasses(sub)
