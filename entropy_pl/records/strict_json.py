"""Strict JSON of what a probe or a measurement found: numbers of other libraries become Python's, NaN becomes null."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from entropy_pl.records.record import Json


def to_json(record: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    """Return a record as strict JSON on one line.

    Args:
        record: as :meth:`RecordWriter.write` takes it.
        sort_keys: whether keys are sorted, so that equal records give equal text whatever their order.

    Returns:
        The line, without its end.

    Raises:
        TypeError: if the record holds something that JSON has no form for.
    """
    return json.dumps(plain(record), allow_nan=False, sort_keys=sort_keys)


def plain(record: Mapping[str, Any]) -> Json:
    """Return a record in JSON's own types: numbers and arrays of other libraries as Python's, not finite ones as None.

    Args:
        record: as :meth:`RecordWriter.write` takes it.

    Returns:
        A copy.

    Raises:
        TypeError: if the record holds something that JSON has no form for.
    """
    converted: Json = _plain(record, "record")
    return converted


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` in JSON's own types; ``where`` names it in the error."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays alike
        return _plain(value.tolist(), where)
    raise TypeError(f"expected {where} to be JSON-able, got {type(value).__name__}")
