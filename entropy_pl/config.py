"""Settings from a dict, a YAML file or the command line, as typed dataclasses."""

from __future__ import annotations

import itertools
import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import IO, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from entropy_pl.config_messages import explained, unknown_key

S = TypeVar("S")
LARGEST, DEEPEST = 100_000, 50  # values in a config, aliases written out; sections in sections
ERROR_LOG = "error.log"
"""In a run's folder: the tracebacks of commands that failed there."""


class UsageError(Exception):
    """Words, a config file or a setting that cannot be: what was expected, what came, what to do."""


class SettingsParser(Generic[S]):
    """Reads one dataclass of sections, which are dataclasses themselves.

    A dict, a file and words say the same things and are checked by the same walk: every key must be the dataclass's
    own. Nothing is executed or imported: jsonargparse, which would import what a ``class_path`` names, gets to see only
    known keys in the shape of their sections. YAML's numbers are read as JSON's are: ``1e-5`` without a dot is a
    number.

    Args:
        settings: the dataclass.
        program: what usage lines call the program.
        description: first line of its help.
    """

    def __init__(self, settings: type[S], *, program: str = "entropy-pl", description: str | None = None) -> None:
        self.keys = keys_of(settings)
        self._settings = settings
        self._parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
        self._parser.add_argument("--config", action="config", help="Path to a YAML file with these settings.")
        self._parser.add_class_arguments(settings)
        for action in self._parser._actions:
            if self._is_section(action.dest) and action.metavar == "CONFIG":
                action.metavar, action.help = "{KEY: VALUE, ...}", "Several keys of this section at once."

    def read(self, source: Mapping[str, Any] | str | os.PathLike[str]) -> S:
        """Settings from a mapping or a YAML file.

        Raises:
            ValueError: for an unknown key, a value of another type or an impossible one; the message names the key,
                what was expected, and the nearest key there is.
            FileNotFoundError: if there is no such file.
        """
        given = self._checked(source if isinstance(source, Mapping) else load_file(source))
        return self._settings_of(lambda: self._parser.parse_object(given))

    def parse(self, words: Sequence[str] | None) -> S:
        """Settings from command-line words, ``--config`` files among them; None takes the process's own.

        Of two words, or a word and a file, that give the same key, the later one counts.

        Raises:
            ValueError: as :meth:`read`, or for words that are not ``--KEY VALUE`` or ``--KEY=VALUE``.
            FileNotFoundError: as :meth:`read`.
            SystemExit: with status 0, after ``--help`` or ``--print_config``.
        """
        given: dict[str, Any] = {}
        flags = []
        rest = iter(sys.argv[1:] if words is None else words)
        for word in rest:
            if self._is_flag(word):
                flags.append(word)
                continue
            name, has_value, value = word.partition("=")
            key = name.removeprefix("--")
            if name == key:
                raise ValueError(f"expected --KEY VALUE, got {word!r}")
            if key not in ("config", *self.keys):
                raise ValueError(unknown_key(key, self.keys))
            if not has_value:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise ValueError(f"expected a value for {key}, got none")
            given = _merged(given, self._checked(self._meant(key, value)))
        if flags:  # jsonargparse prints and exits
            return self._settings_of(lambda: self._parser.parse_args(["--config", json.dumps(given), *flags]))
        return self._settings_of(lambda: self._parser.parse_object(given))

    def _is_flag(self, word: str) -> bool:
        section = word.removeprefix("--").removesuffix(".help")
        return (
            word in ("-h", "--help")
            or word.partition("=")[0] == "--print_config"
            or (word == f"--{section}.help" and self._is_section(section))
        )

    def _is_section(self, key: str) -> bool:
        return any(other.startswith(f"{key}.") for other in self.keys)

    def _meant(self, key: str, value: str) -> Mapping[Any, Any]:
        if key == "config":
            return load_file(value)
        return {key: _load_yaml(value, f"--{key}") if self._is_section(key) else value}

    def _checked(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        return _checked_section(given, self._settings, "", self.keys)

    def _settings_of(self, parse: Callable[[], Namespace]) -> S:
        try:
            namespace = parse()
        except (ArgumentError, TypeError) as error:
            raise ValueError(explained(str(error), self.keys)) from error
        made: S = _made(namespace, self._settings, "")
        return made


def keys_of(settings: type) -> list[str]:
    """Every key of a dataclass of sections, with the sections it lies in: ``checkpoint.backbone``."""
    keys = []
    for name, hint in get_type_hints(settings).items():
        section = _section_in(hint)
        keys += [name, *(f"{name}.{key}" for key in (keys_of(section) if section else ()))]
    return keys


def _section_in(hint: Any) -> type | None:
    """The dataclass that a field is, may be or lists, if any."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next(filter(None, map(_section_in, get_args(hint))), None)


def _checked_section(given: Mapping[Any, Any], settings: type, path: str, keys: Sequence[str]) -> dict[str, Any]:
    """What was given, as nested dicts, if every key is one of the dataclass's, and sections stand where they belong."""
    hints = get_type_hints(settings)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        name, _, rest = str(key).partition(".")  # sections can be written as on the command line
        if name not in hints or (rest and _section_in(hints[name]) is None):
            inner = f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""
            raise ValueError(unknown_key(f"{path}{key}{inner}", keys))
        value = _checked_value({rest: value} if rest else value, hints[name], path + name, keys)
        checked[name] = _merged(checked.get(name), value)
    return checked


def _checked_value(value: Any, hint: Any, path: str, keys: Sequence[str]) -> Any:
    kinds, section = (hint, *get_args(hint)), _section_in(hint)
    if value is None:
        if type(None) in kinds:
            return None
        raise ValueError(f"{path}: expected {getattr(hint, '__name__', hint)}, got null: give one or leave it out")
    if section is None:
        if _too_large(value):
            raise ValueError(f"{path}: expected a number that a float has room for, got one of more than 308 digits")
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if section in kinds and get_origin(hint) is not list:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: expected a section with keys of its own, got {value!r}")
        return _checked_section(value, section, f"{path}.", keys)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path}: expected a list of sections, got {value!r}")
    elements = [_checked_value(element, section, f"{path}[{i}]", keys) for i, element in enumerate(value)]
    for field in fields(section):
        for i, element in enumerate(elements):
            if field.default is field.default_factory is MISSING and field.name not in element:
                raise ValueError(f"expected a value for {path}[{i}].{field.name}, got none")
    return elements


def _too_large(value: Any) -> bool:
    """Whether it is, as YAML or on the command line, a whole number that no float can be, or a list with one."""
    if isinstance(value, list | tuple):
        return any(_too_large(item) for item in value if not isinstance(item, list | tuple))
    if isinstance(value, str):
        digits = value.strip("+- ").lstrip("0")
        return digits.isdecimal() and len(digits) > sys.float_info.max_10_exp
    return isinstance(value, int) and abs(value) > sys.float_info.max


def _made(value: Any, hint: Any, path: str) -> Any:
    """The dataclasses that namespaces stand for, made here so that their own messages come with no more than a path."""
    section = _section_in(hint)
    if section is not None and isinstance(value, list):
        return [_made(element, section, f"{path}[{i}]") for i, element in enumerate(value)]
    if section is None or not isinstance(value, Namespace):
        return value
    inner = {
        name: _made(value[name], kind, f"{path}.{name}" if path else name)
        for name, kind in get_type_hints(section).items()
        if name in value
    }
    try:
        return section(**inner)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def _merged(old: Any, new: Any) -> Any:
    """The later one, but key by key where both are sections."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, and a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012, declared so by PyYAML
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        None, None, f"expected every key once, got {key.value!r} again", key.start_mark
                    )
                seen.add(key.value)
        return node


def _load_yaml(stream: str | IO[bytes], source: str) -> Any:
    try:
        loaded = yaml.load(stream, Loader=_Loader)
        _check_size(loaded, itertools.count())
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML from {source}: {' '.join(str(error).split())}") from error
    # what PyYAML's constructors raise for a value that is not of its tag: `!!bool maybe`
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected YAML of plain values from {source}: {error}") from error
    return loaded


def _check_size(value: Any, seen: Iterator[int], within: tuple[int, ...] = ()) -> None:
    """Refuse what would fill the memory as soon as it is written out: a few lines of aliases can stand for billions."""
    if next(seen) > LARGEST or len(within) > DEEPEST:
        raise ValueError(f"it has more than {LARGEST} values, or is nested more than {DEEPEST} deep")
    if id(value) in within:
        return  # a list or mapping in itself, which Python writes as `...`
    parts: Iterable[Any] = value if isinstance(value, list | tuple | set) else ()
    if isinstance(value, Mapping):
        parts = itertools.chain.from_iterable(value.items())
    for part in parts:
        _check_size(part, seen, (*within, id(value)))


def load_file(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """The settings in a YAML file, unchecked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or no mapping.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"expected a config file, got {name}, no such file")
    with open(name, "rb") as file:
        loaded = _load_yaml(file, name)
    if not isinstance(loaded, Mapping):
        got = "nothing" if loaded is None else f"a {type(loaded).__name__}"
        raise ValueError(f"expected a mapping of settings in {name}, got {got}: write `key: value` lines")
    return loaded
