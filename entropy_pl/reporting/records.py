"""Records as JSON has them, for what does not take :class:`entropy_pl.records.Record` yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_pl.records import SCHEMA, RecordWriter, current, latest_per_step, plain, read_records, taken_point, to_json
from entropy_pl.records import number as as_number
from entropy_pl.records.record import Json as Record

__all__ = [
    "SCHEMA",
    "Record",
    "RecordWriter",
    "current",
    "latest_per_step",
    "number",
    "plain",
    "read_records",
    "taken_point",
    "to_json",
]


def number(mapping: Mapping[str, Any] | None, key: str) -> float:
    """Return ``mapping[key]`` as a float; NaN where it is absent, None, not finite or larger than a float can be."""
    return math.nan if mapping is None else as_number(mapping.get(key))
