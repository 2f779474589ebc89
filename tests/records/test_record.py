"""Records as types: what is read is written back without a change, whatever it holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from entropy_pl.records import EstimateRecord, Record, latest_per_step, number

LINE = """{"schema": 2, "step": 5, "kind": "probe", "later": {"a": [1, null]}, "status": "ok", "message": null,
 "warnings": ["first", "second"], "lr": 1, "entropy": {"value": 0.5, "unit": "nats", "stderr": null, "ess": 12},
 "eta_star": null, "sweep": [{"eta": 0.5, "taken": false}, {"taken": true, "eta": 1, "true": {"value": -2.0}}],
 "exchange_rate": null, "second_order": {},
 "attribution": {"momentum": {"value": 0.25}, "by_sign": {"zero_advantage": null}, "remainder": {"update": 0.0}},
 "predictors": {"steer": null, "cui": {"pearson": 0.5}}, "counterfactuals": {}, "absent": {"reward": "none given"}}"""


@pytest.fixture
def record():
    return Record.from_json(json.loads(LINE))


def test_a_record_has_a_field_for_every_key(record):
    assert (record.schema, record.step, record.kind, record.lr) == (2, 5, "probe", 1)
    assert record.warnings == ("first", "second")
    assert (record.entropy.value, record.entropy.ess) == (0.5, 12)
    assert [point.eta for point in record.sweep] == [0.5, 1]
    assert record.taken.true.value == -2.0
    assert record.attribution.momentum.value == 0.25
    assert record.attribution.part("momentum") is record.attribution.momentum
    assert record.predictors["cui"].pearson == 0.5
    assert record.absent == {"reward": "none given"}


def test_what_is_not_there_is_none_or_empty(record):
    assert record.entropy.stderr is None
    assert record.eta_star is None
    assert record.first_order.value is None
    assert not any((record.exchange_rate, record.second_order, record.expected_reward, record.symmetric))
    assert record.attribution.part("weight_decay").value is None
    assert record.predictors["steer"].pearson is None
    assert Record().taken.true.value is None


def test_what_is_not_known_is_kept(record):
    assert record.extra["later"] == {"a": [1, None]}
    assert record.entropy.extra == {"unit": "nats", "stderr": None}


def test_a_record_is_written_as_it_was_read(record):
    assert json.dumps(record.to_json()) == json.dumps(json.loads(LINE))


def test_a_field_that_is_changed_is_written_in_its_place(record):
    changed = replace(record, message="no", exchange_rate=EstimateRecord(value=3.0, bounded=True), reward=0.5)
    expected = json.loads(LINE) | {"message": "no", "exchange_rate": {"value": 3.0, "bounded": True}, "reward": 0.5}
    assert json.dumps(changed.to_json()) == json.dumps(expected)
    assert Record(step=3, status="failed").to_json() == {"status": "failed", "step": 3}


@pytest.mark.parametrize("none", ["0.5", True, math.nan, math.inf, 10**400, [1], {}, None])
def test_a_number_that_is_none_is_absent_and_kept(none):
    found = Record.from_json({"lr": none, "entropy": {"value": none}, "sweep": [{"eta": none}]})
    if none is not True:  # which is a number to Python
        assert (found.lr, found.entropy.value, found.sweep[0].eta) == (None, None, None)
    assert repr(found.to_json()) == repr({"lr": none, "entropy": {"value": none}, "sweep": [{"eta": none}]})


def test_a_detail_of_another_kind_is_absent_and_kept():
    given = {"seconds": [1.0], "e_prompts": 5, "method": {}, "attribution": {"top_tokens": 3}}
    found = Record.from_json(given)
    assert (found.seconds, found.e_prompts.count, found.method, found.attribution.top_tokens) == ({}, None, None, ())
    assert found.to_json() == given


def test_numbers_of_numpy_are_numbers():
    assert Record.from_json({"lr": np.float32(0.5)}).lr == 0.5


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1", 10**400])
def test_number_of_what_is_none(value):
    assert math.isnan(number(value))
    assert number(np.float32(0.5)) == 0.5


def test_latest_per_step_takes_records_in_either_form(record):
    records = [replace(record, step=step) for step in (0, 5, 10, 5)]
    assert latest_per_step(records) == [records[0], records[3]]
    assert latest_per_step([item.to_json() for item in records]) == [records[0].to_json(), records[3].to_json()]
