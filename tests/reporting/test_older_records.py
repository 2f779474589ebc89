"""Records that an older version wrote, read by this one: the literal below is one of schema 1's own, cut to a page."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest

from entropy_pl.reporting import read_records, read_run, scalars, taken_point

OLD: dict[str, Any] = json.loads("""
{"schema": 1, "kind": "probe", "step": 2, "status": "ok", "lr": 0.001, "confidence": 0.8, "normalize": "per_token",
 "message": "expected an effective sample size of at least half the 12 sequences, got 1 at η = 3",
 "e_prompts": {"count": 6, "sha256": "00000000", "in_u": null},
 "entropy": {"value": 2.3874429, "stderr": 0.073479995, "ess": 12.0, "n_sequences": 12},
 "first_order": {"value": 0.841908, "stderr": 4.1452682, "ci_low": -5.2760272, "ci_high": 6.9598432, "ess": 12.0},
 "eta_star": 0.0055915154, "eta_star_stderr": 0.025717743,
 "sweep": [{"eta": 0.001, "taken": true,
   "true": {"value": 0.00090927757, "stderr": 0.0041091737, "ess": 11.914578, "n_sequences": 12},
   "first_order": {"value": 0.000841908, "stderr": 0.0041452682, "ci_low": -0.0052760272, "ci_high": 0.0069598432}}],
 "attribution": {
   "first_order": {"value": 0.84190789, "stderr": 4.1452682, "stderr_jackknife": 3.6490006},
   "momentum": {"value": 0.40962226, "stderr": 4.1090802, "stderr_jackknife": 4.320994},
   "weight_decay": {"value": 0.21909034, "stderr": 0.021787494, "stderr_jackknife": 0.027405413},
   "gradient": {"value": 0.2131953, "stderr": 2.2530756, "stderr_jackknife": 3.1146572},
   "tokens": {"value": 0.21319417, "stderr_u": 2.5856316, "stderr_u_jackknife": 2.9088356},
   "remainder": {"entropy_term": 0.0, "gradient": 1.1303392e-06, "update": -8.2267526e-14}, "total": 0.84190676,
   "by_sign": {"positive_advantage": -0.0039569608, "negative_advantage": 0.0041701549, "zero_advantage": 0.0},
   "tokens_by_sign": {"positive_advantage": 6, "negative_advantage": 6, "zero_advantage": 0}}}
""")
T5 = 1.475884  # Student's t, 80 %, 5 degrees of freedom, from a printed table


def read(tmp_path, record):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = read_records(file)
    return found


@pytest.fixture
def new(tmp_path):
    return read(tmp_path, OLD)


def test_the_attribution_is_in_nats_of_the_step(new):
    found = new["attribution"]
    assert new["schema"] == 2
    assert found["momentum"]["value"] == pytest.approx(0.40962226e-3)
    assert found["momentum"]["stderr_jackknife"] == pytest.approx(4.320994e-3)
    assert found["tokens"]["stderr_u"] == pytest.approx(2.5856316e-3)
    assert found["remainder"]["gradient"] == pytest.approx(1.1303392e-9)
    assert found["total"] == pytest.approx(0.84190676e-3)
    assert {name: part["value"] for name, part in found["by_sign"].items()} == OLD["attribution"]["by_sign"]
    # eight digits are stored
    by_sign = sum(part["value"] for part in found["by_sign"].values())
    assert by_sign == pytest.approx(found["tokens"]["value"], rel=1e-6)


def test_parts_and_remainders_add_up_to_the_one_first_order_of_the_record(new):
    found = new["attribution"]
    parts = math.fsum(found[name]["value"] for name in ("momentum", "weight_decay", "tokens"))
    whole = found["first_order"]["value"]
    assert whole == pytest.approx(taken_point(new)["first_order"]["value"], rel=1e-12)
    assert parts + sum(found["remainder"].values()) == pytest.approx(whole, rel=1e-6)  # of eight digits
    assert found["remainder"]["differences"] == pytest.approx(0.001 * (0.841908 - 0.84190789), rel=1e-6)
    assert found["remainder_sum"]["value"] == pytest.approx(sum(found["remainder"].values()))


def test_intervals_are_students_at_the_records_confidence(new):
    for name, value, stderr in (("momentum", 0.40962226, 4.1090802), ("gradient", 0.2131953, 2.2530756)):
        part = new["attribution"][name]
        assert part["ci_low"] == pytest.approx(1e-3 * (value - T5 * stderr), rel=1e-6)
        assert part["ci_high"] == pytest.approx(1e-3 * (value + T5 * stderr), rel=1e-6)
    assert "ci_low" not in new["attribution"]["tokens"], "it had no error bar over E"
    assert "entropy_probe/attribution/momentum_ci_low" in scalars(new)
    assert new["attribution"]["first_order"]["ci_low"] == pytest.approx(-0.0052760272)


def test_prompts_are_counted_where_the_record_says(tmp_path):
    counted = {key: value for key, value in OLD.items() if key != "e_prompts"}
    part = read(tmp_path, counted | {"completions_per_prompt": 2})["attribution"]["momentum"]
    assert part["ci_high"] == pytest.approx(1e-3 * (0.40962226 + T5 * 4.1090802), rel=1e-6)
    assert "ci_high" not in read(tmp_path, counted)["attribution"]["momentum"]


def test_what_was_said_of_collapsed_weights_is_a_warning(new, tmp_path):
    assert new["message"] is None
    assert new["warnings"] == [OLD["message"]]
    assert "eta_star_stderr" not in new
    assert new["eta_star"] == OLD["eta_star"]
    failed = {"schema": 1, "kind": "probe", "status": "failed", "message": "got NaN", "step": 5, "lr": 1e-4}
    assert read(tmp_path, failed) == failed | {"schema": 2}


def test_results_of_a_measurement_are_converted_too(tmp_path, new):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text(json.dumps(OLD | {"kind": "measurement"}))
    [found] = read_run(tmp_path / "results").records
    assert found.to_json() == new | {"kind": "measurement"}


def test_a_studys_cell_is_measured_again(tmp_path):
    (tmp_path / "cells.jsonl").write_text(json.dumps({"schema": 1, "kind": "cell", "cell": "N = 64", "tables": {}}))
    with pytest.warns(UserWarning, match="a study's cell of an older version, which is measured again"):
        assert read_records(tmp_path / "cells.jsonl") == []


@pytest.mark.parametrize(
    "broken",
    [
        {"lr": None},
        {"lr": 1e308, "confidence": 5},
        {"e_prompts": {"count": 1e308}, "completions_per_prompt": 0},
        {"entropy": None, "first_order": None},
        {"attribution": {"momentum": {"value": 10**400, "stderr": "x"}, "by_sign": {"positive_advantage": []}}},
    ],
)
def test_numbers_that_are_none_are_absent(tmp_path, broken):
    found = read(tmp_path, copy.deepcopy(OLD) | broken)
    assert json.dumps(found, allow_nan=False)
    scalars(found)
