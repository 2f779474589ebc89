"""What is said to a wrong config, in one line: the key, what was expected, what came, and the nearest key there is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches

from entropy_pl.registry import did_you_mean


def unknown_key(unknown: str, keys: Iterable[str]) -> str:
    """The answer to a key there is none of.

    Args:
        unknown: the key as it was written, with its sections.
        keys: every key there is, with its sections.
    """
    keys = list(keys)
    plain = re.sub(r"\[\d+\]", "", unknown)  # study.options[1].name is a key as study.options.name is
    section, _, name = plain.rpartition(".")
    siblings = [key for key in keys if section and key.startswith(f"{section}.")]
    if siblings:
        near = [key for key in siblings if get_close_matches(name, [key.removeprefix(f"{section}.")])]
        nearest = did_you_mean(plain, near)
    else:
        siblings = sorted({key.split(".")[0] for key in keys})
        nearest = did_you_mean(plain, keys, cutoff=0.8) or did_you_mean(plain.split(".")[0], siblings, cutoff=0.7)
    return f"unknown key {unknown!r}" + (nearest or f": expected one of {', '.join(siblings)}")


def explained(message: str, keys: Iterable[str]) -> str:
    """Jsonargparse's message in one line.

    Args:
        message: jsonargparse's.
        keys: every key there is, with its sections.
    """
    message = re.sub(r"\n\s*\n", "\n", message).removeprefix('Parser key "config": ')
    key, problem = _outermost(message)
    if _of_class(problem) is not None:
        return " ".join(_class_message(key, problem).split())
    unknown = _unknown_key(message)
    if unknown is not None:
        return unknown_key(unknown, keys)
    missing = re.search(r"following arguments are required: (?:fit\.)?(\S+)", message)
    if missing is not None:
        return f"expected a value for {missing[1]}, got none: give --{missing[1]}, or a --config file that has it"
    key, problem = _innermost(message)
    return " ".join((f"{key}: {_expectation(problem)}" if key else message).split())


def _of_class(problem: str) -> tuple[str, str] | None:
    """The class that a key names, and what is wrong with it or with an argument of it."""
    given = re.search(r"^( *)-? *Problem with given class_path '([^']+)':(.*(?:\n\1  +.*)*)", problem, re.MULTILINE)
    if given is not None:
        return given[2], given[3]
    given = re.search(r"expects a function or a callable class: (.*)", problem, re.DOTALL)
    if given is None:
        return None
    name = re.search(r"class_path='([^']+)'", given[1]) or re.search(r"Got value: (\S+)", given[1])
    return name[1] if name else "it", given[1].partition(". Got value:")[0]


def _class_message(key: str, problem: str) -> str:
    of_class = _of_class(problem)
    if of_class is None:
        return f"{key}: {_expectation(problem)}"
    path, wrong = of_class
    name = path.rpartition(".")[2]
    inner, within = _outermost(wrong)
    if inner:
        return _class_message(f"{key}{_arguments_of(path)}.{inner}", within)
    option = re.search(r"Option '([^']+)' is not accepted", wrong)
    if option is not None:
        return f"unknown key '{key}{_arguments_of(path)}.{option[1]}': {name} has no such argument"
    required = re.search(r"Requirement '([^']+)' not met", wrong)
    if required is not None:
        said = f"{name} needs a package that is not installed: pip install '{required[1]}'"
        return f"{key}: {said}" if key else said
    absent = re.search(r"No module named '([^']+)'", wrong)
    if absent is not None:
        return f"{key}: expected the name or path of a class, got {path}: there is no module {absent[1]}"
    if "has no attribute" in wrong or "Import path" in wrong:
        return f"{key}: expected the name or path of a class, got {path}: there is none of that name"
    return f"{key}: {name}: {wrong}"


def _arguments_of(path: str) -> str:
    """What stands between a class's key and its arguments: nothing where the class is a section of settings."""
    module, _, name = path.rpartition(".")
    return "" if is_dataclass(getattr(sys.modules.get(module), name, None)) else ".init_args"


def _innermost(problem: str, key: str = "") -> tuple[str, str]:
    """The key that is wrong and what is wrong with it: jsonargparse indents a section's problem below the section."""
    name, within = _outermost(problem)
    return _innermost(within, f"{key}.{name}" if key else name) if name else (key, problem)


def _outermost(problem: str) -> tuple[str, str]:
    """The first key that is named and what is below it; no key and the problem itself where none is."""
    inner = re.search(r'^( *)(?:\S.*: )?Parser key "([^"]+)":(.*(?:\n\1 +.*)*)', problem, re.MULTILINE)
    return ("", problem) if inner is None else (inner[2], inner[3])


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"(?P<group>)Subcommand '\w+' does not accept option '(?P<key>[^']+)'",
        r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
        r'Parser key "(?P<group>[^"]+)":.*Option \'(?P<key>[^\']+)\' is not accepted',
        r"(?P<group>)Option '(?P<key>[^']+)' is not accepted",
        r"(?P<group>)unrecognized arguments: --(?P<key>[^\s=]+)",
    ):
        found = re.search(pattern, message, re.DOTALL)
        if found is not None:
            group, key = found["group"], found["key"]
            return key if not group or key.startswith(f"{group}.") else f"{group}.{key}"
    return None


def _expectation(problem: str) -> str:
    """``Expected a <class 'float'>. Got value: x`` and its like, shorter."""
    got = re.search(r"Given value: (.*)$", problem, re.DOTALL) or re.search(r"Got value: (.*)$", problem, re.DOTALL)
    value = got[1].strip() if got else "something else"
    choices = re.findall(r"Literal\[(.*?)\]", problem)
    if choices:
        options = list(dict.fromkeys(option.strip("'\" ") for choice in choices for option in choice.split(",")))
        return f"expected one of {', '.join(options)}, got {value}{did_you_mean(value, options)}"
    path = re.search(r"Expected a dot import path string: (.*)", problem)
    if path is not None and not re.search(r"Expected a <class '(?:int|float|str)'>", problem):
        return f"expected the name or path of a class, got {path[1]}"
    expected = re.search(r"Subtypes: \[(.*)\]\n", problem) or re.search(r"Expected an? (.*?)\. Got", problem)
    if expected is None:
        return problem
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected[1]).replace("NoneType", "null").split(", ")
    return f"expected {' or '.join(names)}, got {value}"
