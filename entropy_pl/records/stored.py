"""JSON objects as frozen dataclasses, and back without a change: :class:`Stored` goes by a class's fields alone."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

SomeStored = TypeVar("SomeStored", bound="Stored")

_TEXT, _LIST, _OBJECT = "text", "a list", "an object"
DETAIL = {"detail": True}  # of a field, see detail()
_OWN = ("extra", "names", "null")
_KEYS: dict[type[Any], dict[str, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A JSON object whose known keys are the fields of a subclass.

    What a file holds may have been written by an older version, by another program or by hand. So a key that is not
    there leaves its field at the default, a number or a flag that is none counts as absent (None), and a key that is
    not known is kept in ``extra``. But where text, a list or an object is expected, something else is refused, unless
    the field is a :func:`detail`. An object that is not there, or null, is an empty one, which is false.

    Args:
        extra: what the fields do not hold, by key: keys that are not known, and values that count as absent.
        names: the keys in the order in which they were read.
        null: whether null stood in the place of the object.
    """

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    null: bool = field(default=False, repr=False)

    @classmethod
    def from_json(cls: type[SomeStored], found: Mapping[str, Any]) -> SomeStored:
        """Read an object as JSON has it.

        Args:
            found: numbers may be NumPy's as well.

        Raises:
            ValueError: naming the first key that holds something of another kind, what was expected and what came.
        """
        value: SomeStored = _object(cls, found, "")
        return value

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` was given, the order of its keys included, with the fields changed since."""
        changed = [name for name, key in _keys(type(self)).items() if getattr(self, name) != key.default]
        return {
            name: _plain(getattr(self, name)) if name in changed or name not in self.extra else self.extra[name]
            for name in dict.fromkeys((*self.names, *changed))
        }

    def __bool__(self) -> bool:
        return not self.null and bool(self.to_json())


def detail(default: Any = None) -> Any:
    """Declare a field that little rests on: what is of another kind there counts as absent, and is not refused.

    Args:
        default: of the field.

    Returns:
        For a dataclass's field.
    """
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=DETAIL)
    return field(default=default, metadata=DETAIL)


def number(value: object) -> float:
    """Return a value as a float; NaN where it is absent, None, not finite or larger than a float can be.

    Args:
        value: of a record.

    Returns:
        The number, or NaN.
    """
    with suppress(OverflowError):
        return float(value) if isinstance(value, Real) and math.isfinite(value) else math.nan
    return math.nan


def wrong_kind(path: str, expected: str, value: object) -> ValueError:
    """Return the error for a key that holds something else than expected.

    Args:
        path: of the key within the whole object.
        expected: kind of value, in words.
        value: what came.

    Returns:
        To be raised.
    """
    return ValueError(f"expected {path!r} to be {expected}, got {type(value).__name__}")


@dataclass(frozen=True)
class _Key:
    kind: Any
    default: Any
    is_detail: bool


def _keys(cls: type[Stored]) -> dict[str, _Key]:
    """Return the keys that a class knows; they are looked up once."""
    if cls not in _KEYS:
        empty, hints = cls(), get_type_hints(cls)
        _KEYS[cls] = {
            each.name: _Key(hints[each.name], getattr(empty, each.name), "detail" in each.metadata)
            for each in fields(cls)
            if each.name not in _OWN
        }
    return _KEYS[cls]


def _object(cls: type[SomeStored], found: object, path: str) -> SomeStored:
    if found is None:
        return cls(null=True)
    if not isinstance(found, Mapping):
        raise wrong_kind(path, _OBJECT, found)
    known, extra = {}, {}
    for name, raw in found.items():
        value, key = None, _keys(cls).get(name)
        if key is not None:
            with suppress(ValueError) if key.is_detail else nullcontext():
                value = _value(key.kind, raw, f"{path}.{name}" if path else name)
        if value is None:
            extra[name] = raw
        else:
            known[name] = value
    return cls(**known, extra=extra, names=tuple(found))


def _value(kind: Any, raw: object, path: str) -> Any:
    """Return the value of one field, None where it counts as absent."""
    if get_origin(kind) in (Union, types.UnionType):
        [kind] = [each for each in get_args(kind) if each is not type(None)]
    if isinstance(kind, type) and issubclass(kind, Stored):
        return _object(kind, raw, path)
    if raw is None:
        return None
    if get_origin(kind) is tuple:
        return _items(get_args(kind)[0], raw, path)
    if get_origin(kind) is Mapping:
        return _by_name(get_args(kind)[1], raw, path)
    if kind is str:
        if not isinstance(raw, str):
            raise wrong_kind(path, _TEXT, raw)
        return raw
    if kind is bool:
        return raw if isinstance(raw, bool) else None
    if kind is int:
        return raw if isinstance(raw, int) and not isinstance(raw, bool) else None
    return None if math.isnan(number(raw)) else raw


def _items(kind: Any, raw: object, path: str) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple):
        raise wrong_kind(path, _LIST, raw)
    for position, item in enumerate(raw):
        if item is None:
            raise wrong_kind(f"{path}[{position}]", _TEXT if kind is str else _OBJECT, item)
    return tuple(_value(kind, item, f"{path}[{position}]") for position, item in enumerate(raw))


def _by_name(kind: Any, raw: object, path: str) -> Mapping[str, Any]:
    """Return a mapping whose values are of one class of ours, or whatever they are where they are not known."""
    if not isinstance(raw, Mapping):
        raise wrong_kind(path, _OBJECT, raw)
    if isinstance(kind, type) and issubclass(kind, Stored):
        return {name: _object(kind, item, f"{path}.{name}") for name, item in raw.items()}
    return raw


def _plain(value: Any) -> Any:
    if isinstance(value, Stored):
        return None if value.null else value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
