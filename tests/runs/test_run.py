"""A run's folder as records and as a table: hand-written records, and the table that they must give."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from printed import ROOT, run_blocks

import entropy_pl
from entropy_pl.runs import load_run

GIVEN_UP = {"step": 5, "kind": "probe", "status": "ok", "lr": 0.5, "sweep": [{"taken": True, "true": {"value": 9.0}}]}
MEASURED = json.loads("""
{"schema": 2, "kind": "probe", "status": "ok", "message": null, "step": 5, "lr": 0.001, "normalize": "per_token",
 "warnings": ["few prompts", "a rough policy"], "update_norm": 3.5, "reward": 0.25, "sampler_gap": 1e-7,
 "entropy": {"value": 0.75, "stderr": 0.125, "ci_low": 0.5, "ci_high": 1.0, "n_sequences": 64, "n_tokens": 900},
 "first_order": {"value": -10.0, "stderr": 1.0, "ci_low": -12.0, "ci_high": -8.0},
 "second_order": {"value": 200.0}, "eta_star": 0.1, "eta_star_ci_low": 0.05, "eta_star_ci_high": null,
 "sweep": [{"eta": 0.0005, "taken": false, "true": {"value": 7.0}},
  {"eta": 0.001, "taken": true, "true": {"value": -0.009, "stderr": 0.001, "ci_low": -0.011, "ci_high": -0.007,
    "ess": 60.5, "ess_min": 58.0, "mean_weight": 1.001, "trustworthy": true},
   "first_order": {"value": -0.01, "stderr": 0.002, "ci_low": -0.014, "ci_high": -0.006},
   "reward_true": {"value": 0.02, "stderr": 0.01}, "reward_first_order": {"value": 0.03}}],
 "expected_reward": {"value": 0.5, "stderr": 0.0625},
 "exchange_rate": {"value": -0.45, "stderr": 0.2, "bounded": false},
 "attribution": {"momentum": {"value": -0.004, "stderr": 0.0005}, "tokens": {"value": -0.005, "stderr_u": 0.003},
  "by_sign": {"positive_advantage": {"value": -0.008, "stderr_u": 0.002}}, "remainder_sum": {"value": -0.001}},
 "predictors": {"cui": {"pearson": 0.5, "step": -3.0}},
 "counterfactuals": {"entropy_bonus": {"true": {"value": 0.004, "stderr": 0.001}}},
 "seconds": {"sampling": 2.0, "total": 12.5}, "overhead": 0.0625}
""")
FAILED = {"schema": 2, "kind": "probe", "status": "failed", "message": "got NaN", "step": 10, "lr": 0.002}
EXPECTED = {
    **{"step": 5, "status": "ok", "message": "", "lr": 0.001, "normalize": "per_token"},
    **{"entropy": 0.75, "entropy_stderr": 0.125, "entropy_ci_low": 0.5, "entropy_ci_high": 1.0},
    **{"delta_h": -0.009, "delta_h_stderr": 0.001, "delta_h_ci_low": -0.011, "delta_h_ci_high": -0.007},
    **{"delta_h1": -0.01, "delta_h1_stderr": 0.002, "delta_h1_ci_low": -0.014, "delta_h1_ci_high": -0.006},
    **{"first_order": -10.0, "first_order_stderr": 1.0, "first_order_ci_low": -12.0, "first_order_ci_high": -8.0},
    **{"second_order": 200.0, "eta_star": 0.1, "eta_star_ci_low": 0.05},
    **{"ess": 60.5, "ess_min": 58.0, "mean_weight": 1.001, "n_sequences": 64.0, "n_tokens": 900.0},
    **{"trustworthy": True, "warnings": "few prompts\na rough policy", "update_norm": 3.5, "reward": 0.25},
    **{"expected_reward": 0.5, "expected_reward_stderr": 0.0625, "delta_j": 0.02, "delta_j_stderr": 0.01},
    **{"delta_j1": 0.03, "exchange_rate": -0.45, "exchange_rate_stderr": 0.2},
    **{"attribution_momentum": -0.004, "attribution_momentum_stderr": 0.0005, "attribution_remainder": -0.001},
    **{"attribution_tokens": -0.005, "attribution_tokens_stderr_u": 0.003},
    **{"attribution_positive_advantage": -0.008, "attribution_positive_advantage_stderr_u": 0.002},
    **{"sampler_gap": 1e-7, "seconds": 12.5, "overhead": 0.0625, "predictor_cui_pearson": 0.5},
    **{"predictor_cui_step": -3.0, "counterfactual_entropy_bonus_delta_h": 0.004},
    **{"counterfactual_entropy_bonus_delta_h_stderr": 0.001},
}
OF_FAILED = {
    **{"step": 10, "status": "failed", "message": "got NaN", "lr": 0.002, "normalize": "", "warnings": ""},
    "trustworthy": False,
}


def write(file: Path, *records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def folder(tmp_path):
    """A Lightning run that was resumed: step 5 was probed twice."""
    write(tmp_path / "version_0/entropy_probe/records.jsonl", GIVEN_UP, {"kind": "note"}, MEASURED, FAILED)
    return tmp_path / "version_0"


def without_nan(row):
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def test_the_probes_as_a_table(folder):
    probes = load_run(folder).probes
    first, second = probes.to_dict("records")
    assert without_nan(first) == EXPECTED
    assert without_nan(second) == OF_FAILED
    assert (probes.step.dtype, probes.delta_h.dtype, probes.trustworthy.dtype) == (np.int64, np.float64, bool)


def test_the_records_are_those_of_the_run_as_it_finally_went(folder):
    run = load_run(folder)
    assert run.path == folder
    assert [record.to_json() for record in run.records] == [MEASURED, FAILED]


@pytest.mark.parametrize("given", [".", "..", "entropy_probe", "entropy_probe/records.jsonl"])
def test_a_run_is_found_from_its_folder_and_its_neighbours(folder, given):
    assert len(load_run(folder / given).records) == 2


def test_a_plain_folder_with_a_records_file(tmp_path):
    write(tmp_path / "mine/records.jsonl", MEASURED)
    assert load_run(str(tmp_path / "mine")).probes.delta_h.tolist() == [-0.009]


def test_an_offline_measurement_has_one_row(tmp_path):
    write(tmp_path / "results.json", MEASURED | {"kind": "measurement", "step": None, "timing": {"total": 3.0}})
    [row] = load_run(tmp_path).probes.to_dict("records")
    assert math.isnan(row["step"])
    assert (row["delta_h"], row["seconds"]) == (-0.009, 3.0)


def test_a_run_without_a_probe_yet_has_all_columns(tmp_path, folder):
    write(tmp_path / "new/records.jsonl")
    empty, columns = load_run(tmp_path / "new").probes, load_run(folder).probes.columns
    assert len(empty) == 0
    assert [name for name in columns if not name.startswith(("predictor_", "counterfactual_"))] == [*empty.columns]


def test_other_folders_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_run(tmp_path / "nowhere")
    write(tmp_path / "version_1/entropy_probe/records.jsonl")
    with pytest.raises(ValueError, match="expected the folder of one run"):
        load_run(tmp_path)


def test_lines_that_cannot_be_read_are_named(folder):
    with open(folder / "entropy_probe/records.jsonl", "a") as file:
        file.write('{"step": 15, "sta\n')
    with pytest.warns(UserWarning, match="line 5 is not a record"):
        assert len(load_run(folder).records) == 2


def test_every_column_is_documented(folder):
    page = (ROOT / "docs/reading-the-curves.md").read_text()
    table = page[page.index("## A run as a table") : page.index("\n## ", page.index("## A run as a table") + 1)]
    parts = re.compile(r"_(stderr|ci_low|ci_high|stderr_u)$|^counterfactual_.*|^predictor_.*")
    names = {parts.sub("", name) for name in load_run(folder).probes.columns} - {""}
    documented = set(re.findall(r"`(\w+)`", table))
    assert names - documented == set()
    docstring = entropy_pl.runs.Run.probes.__doc__
    assert names - set(re.findall(r"``(\w+)``", docstring)) == set()


def test_the_printed_code_runs(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    folder.rename(tmp_path / "runs/quickstart/version_0")
    file = tmp_path / "runs/quickstart/version_0/entropy_probe/records.jsonl"
    write(file, MEASURED)
    monkeypatch.chdir(tmp_path)
    run_blocks("docs/reading-the-curves.md", {})
    assert capsys.readouterr().out.split("\n")[-2] == "-0.004"
