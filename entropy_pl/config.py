"""Settings from a dict, a YAML file or the command line, as typed dataclasses; and what is said to a wrong one."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from entropy_pl.registry import did_you_mean

S = TypeVar("S")


class UsageError(Exception):
    """Words, a config file or a setting that cannot be: what was expected, what came, what to do."""


class SettingsParser(Generic[S]):
    """Reads one dataclass of sections, which are dataclasses themselves.

    YAML's numbers are read as JSON's are: ``1e-5`` without a dot is a number. Nothing in a file is executed.

    Args:
        settings: the dataclass.
        program: what usage lines call the program.
        description: first line of its help.
    """

    def __init__(self, settings: type[S], *, program: str = "entropy-pl", description: str | None = None) -> None:
        self._settings = settings
        self._parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
        self._parser.add_argument("--config", action="config", help="Path to a YAML file with these settings.")
        self._parser.add_class_arguments(settings)

    @property
    def keys(self) -> list[str]:
        """Every key there is, with its sections: ``checkpoint.backbone``."""
        return keys_of(self._settings)

    def read(self, source: Mapping[str, Any] | str | os.PathLike[str]) -> S:
        """Settings from a mapping or a YAML file.

        Raises:
            ValueError: for an unknown key, a value of another type or an impossible one; the message names the key,
                what was expected, and the nearest key there is.
            FileNotFoundError: if there is no such file.
        """
        if isinstance(source, Mapping):
            return self._settings_of(lambda: self._parser.parse_object(dict(source)))
        if not os.path.isfile(source):
            raise FileNotFoundError(f"expected a config file, got {os.fspath(source)}, no such file")
        return self._settings_of(lambda: self._parser.parse_path(os.fspath(source)))

    def parse(self, words: Sequence[str] | None) -> S:
        """Settings from command-line words, ``--config`` files among them; None takes the process's own.

        Raises:
            ValueError: as :meth:`read`.
        """
        return self._settings_of(lambda: self._parser.parse_args(None if words is None else list(words)))

    def _settings_of(self, parse: Any) -> S:
        try:
            namespace: Namespace = parse()
        except (ArgumentError, TypeError) as error:
            raise ValueError(explained(str(error), self.keys)) from error
        namespace.pop("config", None)
        _refuse_empty(namespace, self._settings)
        made = self._parser.instantiate(namespace)
        return self._settings(**{field.name: made[field.name] for field in fields(self._settings)})  # type: ignore[arg-type]


def keys_of(settings: type) -> list[str]:
    """Every key of a dataclass of sections, with the sections it lies in."""
    sections = _sections(settings)
    keys = []
    for field in fields(settings):
        keys.append(field.name)
        if field.name in sections:
            keys += [f"{field.name}.{key}" for key in keys_of(sections[field.name])]
    return keys


def _refuse_empty(given: Namespace, settings: type, path: str = "") -> None:
    """Jsonargparse lets null and, for a section, a plain value pass where neither has a meaning."""
    sections = _sections(settings)
    for name, hint in get_type_hints(settings).items():
        value = given.get(name)
        if value is None and type(None) not in (hint, *get_args(hint)):
            raise ValueError(
                f"{path}{name}: expected {getattr(hint, '__name__', hint)}, got null: give one or leave it out"
            )
        if name in sections and get_origin(hint) is not list and value is not None:
            if not isinstance(value, Namespace):
                raise ValueError(f"{path}{name}: expected a section with keys of its own, got {value!r}")
            _refuse_empty(value, sections[name], f"{path}{name}.")


def _sections(settings: type) -> dict[str, type]:
    """The fields that are dataclasses themselves, or may be."""
    found = {}
    for name, hint in get_type_hints(settings).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind) and isinstance(kind, type)]
        if kinds:
            found[name] = kinds[0]
    return found


def explained(message: str, keys: Iterable[str]) -> str:
    """Jsonargparse's message in one line: the key, what was expected, what came, and the nearest key there is."""
    keys = list(keys)
    unknown = _unknown_key(message)
    if unknown is not None:
        section = [key for key in keys if key.startswith(unknown.rpartition(".")[0] + ".")]
        siblings = section if "." in unknown and section else sorted({key.split(".")[0] for key in keys})
        nearest = did_you_mean(unknown, keys, cutoff=0.8) or did_you_mean(unknown.split(".")[0], siblings, cutoff=0.7)
        return f"unknown key '{unknown}'" + (nearest or f": expected one of {', '.join(siblings)}")
    missing = re.search(r"following arguments are required: (\S+)", message)
    if missing is not None:
        return f"expected a value for {missing[1]}, got none"
    wrong = re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL)
    if wrong is None:
        return message
    return f"{wrong[1]}: {_expectation(wrong[2])}"


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"(?P<group>)Subcommand '\w+' does not accept option '(?P<key>[\w.]+)'",
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'",
        r'Parser key "(?P<group>[\w.]+)":.*Option \'(?P<key>[\w.]+)\' is not accepted',
        r"(?P<group>)Option '(?P<key>[\w.]+)' is not accepted",
        r"(?P<group>)unrecognized arguments: --(?P<key>[\w.]+)",
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
        return " ".join(problem.split())
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected[1]).replace("NoneType", "null").split(", ")
    return f"expected {' or '.join(names)}, got {value}"
