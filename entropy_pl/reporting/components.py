"""The parts of a record's attribution, by the names under which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPONENTS = ("momentum", "weight_decay", "tokens", "remainder")


def part(record: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """One part of the attribution, an estimate in nats of the step taken; None where the record has none.

    Args:
        record: a probe's record.
        name: of :data:`COMPONENTS`, where ``remainder`` is the sum, ``gradient``, ``first_order``, or a sign of the
            advantage.
    """
    attribution = record.get("attribution") or {}
    key = "remainder_sum" if name == "remainder" else name
    found: Mapping[str, Any] | None = attribution.get(key) or (attribution.get("by_sign") or {}).get(name)
    return found
