"""What is said to a wrong config, in one line: the key, what was expected, what came, and the nearest key there is."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    unknown = _unknown_key(message)
    if unknown is not None:
        return unknown_key(unknown, keys)
    missing = re.search(r"following arguments are required: (\S+)", message)
    if missing is not None:
        return f"expected a value for {missing[1]}, got none"
    key, problem = _innermost(message.removeprefix('Parser key "config": '))
    return " ".join((f"{key}: {_expectation(problem)}" if key else message).split())


def _innermost(problem: str, key: str = "") -> tuple[str, str]:
    """The key that is wrong and what is wrong with it: jsonargparse indents a section's problem below the section."""
    inner = re.search(r'^( *)Parser key "([^"]+)":(.*(?:\n\1 +.*)*)', problem, re.MULTILINE)
    return (key, problem) if inner is None else _innermost(inner[3], f"{key}.{inner[2]}" if key else inner[2])


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
    choices = re.search(r"Literal\[(.*?)\]", problem)
    if choices is not None:
        options = [option.strip("'\" ") for option in choices[1].split(",")]
        return f"expected one of {', '.join(options)}, got {value}{did_you_mean(value, options)}"
    expected = re.search(r"Subtypes: \[(.*)\]\n", problem) or re.search(r"Expected an? (.*?)\. Got", problem)
    if expected is None:
        return problem
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected[1]).replace("NoneType", "null").split(", ")
    return f"expected {' or '.join(names)}, got {value}"
