"""Records of schema 1, which older versions wrote, as this version writes them.

| schema 1 | schema 2 |
|---|---|
| ``attribution``: parts, remainders and total per unit η | in nats of the step taken |
| parts with standard errors | and with intervals, where the number of E's prompts is known |
| ``by_sign``: numbers, in nats of the step taken | estimates without error bars |
| ``attribution.first_order``: ⟨∇Ĥ, v⟩ | δH₁ of the step taken, and the remainder ``differences`` between the two |
| ``message`` of a probe that measured | the last of ``warnings`` |
| ``eta_star_stderr`` | not there: η* ± it held 28 % of exact answers at N = 256 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_pl.estimators import interval
from entropy_pl.records.record import Record

LARGEST = 1e150  # of the numbers that are converted: their products are floats


def from_schema_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of schema 1 in schema 2; what it lacks stays away.

    Args:
        record: of schema 1, as JSON has it.

    Raises:
        ValueError: for a study's cell, whose columns are not those of this version, or if the record has something else
            under a record's keys.
    """
    if record.get("kind") == "cell":
        raise ValueError("it is a study's cell of an older version, which is measured again")
    _check(record)
    new = {key: value for key, value in record.items() if key != "eta_star_stderr"} | {"schema": 2}
    if new.get("status", "ok") == "ok" and new.get("message"):
        said = new.get("warnings")
        new |= {"message": None, "warnings": [*(said if isinstance(said, list) else ()), new["message"]]}
    if new.get("attribution"):
        new["attribution"] = _attribution(new)
    return new


def _check(record: Mapping[str, Any]) -> None:
    """Refuse what only looks like a record; ``by_sign`` held plain numbers then, which are no estimates."""
    attribution = record.get("attribution")
    if isinstance(attribution, Mapping) and isinstance(attribution.get("by_sign"), Mapping):
        record = {**record, "attribution": {**attribution, "by_sign": dict.fromkeys(attribution["by_sign"])}}
    if record.get("kind", "probe") in ("probe", "measurement"):
        Record.from_json(record)


def _attribution(record: Mapping[str, Any]) -> dict[str, Any]:
    eta, attribution = _number(record, "lr"), record["attribution"]
    new = dict(attribution)
    for name in ("momentum", "weight_decay", "gradient", "tokens", "first_order"):
        if attribution.get(name):
            new[name] = _with_interval(_scaled(attribution[name], eta), record)
    new["remainder"] = _scaled(attribution.get("remainder") or {}, eta)
    if record.get("first_order") and attribution.get("first_order"):
        whole = _scaled(record["first_order"], eta)
        gap = eta * (_number(record["first_order"], "value") - _number(attribution["first_order"], "value"))
        new["first_order"] |= {name: whole.get(name) for name in ("value", "stderr", "ci_low", "ci_high")}
        new["remainder"]["differences"] = _known(gap)
    new["remainder_sum"] = {"value": _known(sum(_number(new["remainder"], name) for name in new["remainder"]))}
    new["total"] = _known(eta * _number(attribution, "total"))
    by_sign = attribution.get("by_sign") or {}
    new["by_sign"] = {name: {"value": _known(_number(by_sign, name))} for name in by_sign}
    return new


def _with_interval(part: dict[str, float | None], record: Mapping[str, Any]) -> dict[str, float | None]:
    value, stderr, prompts = _number(part, "value"), _number(part, "stderr"), _prompts(record)
    confidence = _number(record, "confidence")
    if not (math.isfinite(value + stderr) and 2 <= prompts < LARGEST and 0 < confidence < 1):
        return part
    low, high = interval(value, stderr, int(prompts), confidence)
    return part | {"ci_low": low, "ci_high": high}


def _prompts(record: Mapping[str, Any]) -> float:
    """Of the E-batch; NaN where the record does not say."""
    each, said = _number(record, "completions_per_prompt"), _number(record.get("e_prompts"), "count")
    return said if said > 0 else _number(record.get("entropy"), "n_sequences") / (each or math.nan)


def _scaled(part: Mapping[str, Any], eta: float) -> dict[str, float | None]:
    return {key: _known(eta * _number(part, key)) for key in part}


def _number(mapping: Any, key: str) -> float:
    """A record may hold anything where a number should be: NaN then."""
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return math.nan
    return float(value)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
