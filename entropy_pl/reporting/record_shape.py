"""What lies under a record's keys, checked where records are read, so that nothing that shows them need check it again.

A file may hold anything: another program's lines, an older version's, a slip of the hand. A line whose known keys hold
something else is no record, and is left out with the reason. Keys that are not known are left alone, and so are numbers
of an estimate, which :func:`entropy_pl.reporting.records.number` takes for absent where they are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LARGEST_STEP = 2**53  # beyond it a float, which is what figures are made of, has no room for every whole number
_ANY = "*"  # every key of a mapping
_TEXT, _STEP, _SOME = "text", f"a whole number below {LARGEST_STEP}", "an object"
_EVERY: dict[str, Any] = {_ANY: _SOME}
_POINT = dict.fromkeys(("true", "first_order", "reward_true", "reward_first_order"), _SOME)
_PARTS = dict.fromkeys(
    ("momentum", "weight_decay", "gradient", "tokens", "first_order", "remainder", "remainder_sum", "over_u"), _SOME
)
_RECORD: dict[str, Any] = {
    **dict.fromkeys(("kind", "status", "message", "normalize"), _TEXT),
    "warnings": [_TEXT],
    "step": _STEP,
    "confidence": "a number",
    **dict.fromkeys(("entropy", "first_order", "second_order", "expected_reward", "exchange_rate"), _SOME),
    "power_law": _SOME,
    "sweep": [_POINT],
    "attribution": {**_PARTS, "by_sign": _EVERY},
    "predictors": _EVERY,
    "counterfactuals": {_ANY: dict.fromkeys(("true", "difference", "reward_true", "reward_difference"), _SOME)},
    "absent": _SOME,
}

_OF_SCHEMA_1: dict[str, Any] = {**_RECORD, "attribution": {**_PARTS, "by_sign": _SOME}}  # there plain numbers


def check_shape(record: Mapping[str, Any]) -> None:
    """Refuse what only looks like the record of a probe or of a measurement; None is allowed wherever a value is.

    Args:
        record: as JSON has it.

    Raises:
        ValueError: naming the first key with something else in it, what was expected and what came.
    """
    if record.get("kind", "probe") in ("probe", "measurement"):
        _check(record, _OF_SCHEMA_1 if record.get("schema") == 1 else _RECORD, "")


def _check(value: Any, shape: Any, path: str) -> None:
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise _wrong(path, "a list", value)
        for position, item in enumerate(value):
            if item is None:
                raise _wrong(f"{path}[{position}]", _SOME, item)
            _check(item, shape[0], f"{path}[{position}]")
    elif isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise _wrong(path, _SOME, value)
        for key in value if _ANY in shape else shape.keys() & value.keys():
            if value[key] is not None:
                _check(value[key], shape.get(key, shape.get(_ANY)), f"{path}.{key}" if path else key)
    elif not _is(value, shape):
        raise _wrong(path, shape, value)


def _is(value: Any, shape: str) -> bool:
    if shape == _SOME:
        return isinstance(value, Mapping)
    if shape == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if shape == _STEP else int | float):
        return False
    return shape != _STEP or abs(value) < LARGEST_STEP


def _wrong(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"expected {path!r} to be {expected}, got {type(value).__name__}")
