"""The parts of a record's attribution, as estimates of the step really taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_pl.reporting.records import Record, number

COMPONENTS = ("momentum", "weight_decay", "tokens", "remainder")
Z95 = 1.96  # half-width of a 95 % interval in standard errors


def per_step(record: Mapping[str, Any], name: str) -> Record:
    """One part of the attribution, η multiplied in, with what error bars the record has of it.

    Args:
        record: a probe's record.
        name: a key of ``record["attribution"]`` that holds an estimate per unit η; of ``remainder`` the sum of its
            parts.

    Returns:
        ``value``, ``stderr`` and ``stderr_u`` (over E, and over the prompts of the U-batch), ``ci_low`` and ``ci_high``
        (95 %, over E), in nats of the step taken; NaN where the record does not say.
    """
    attribution, eta = record.get("attribution") or {}, number(record, "lr")
    part = attribution.get(name)
    if name == "remainder" and part is not None:
        part = {"value": math.fsum(number(part, key) for key in part)}
    value, stderr = eta * number(part, "value"), eta * number(part, "stderr")
    return {
        "value": value,
        "stderr": stderr,
        "stderr_u": eta * number(part, "stderr_u"),
        "ci_low": value - Z95 * stderr,
        "ci_high": value + Z95 * stderr,
    }
