from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from entropy_pl.measurements import EntropyMeasurements, MeasurementSettings
from entropy_pl.studies import STUDIES
from entropy_pl.studies.linear_regime import COLUMNS, FIT_COLUMNS, LinearRegimeOptions

STUDY = STUDIES["linear-regime"]
OPTIONS = {"seeds": [0, 5], "fit_max": 1e-3}
ETAS = {"eta_list": [1e-5, 1e-4, 1e-3, 1e-2], "symmetric": True}


@pytest.fixture(scope="module")
def settings(settings_of, tmp_path_factory):
    return settings_of("linear-regime", tmp_path_factory.mktemp("linear") / "whole", OPTIONS, estimator=ETAS)


@pytest.fixture(scope="module")
def outcome(settings):
    return STUDY.run(settings, progress_bar=False)


@pytest.fixture(scope="module")
def table(outcome):
    return pd.read_csv(outcome.folder / "table.csv")


@pytest.fixture(scope="module")
def fits(outcome):
    return pd.read_csv(outcome.folder / "fits.csv")


def test_every_point_is_there(table, fits):
    assert list(table) == list(COLUMNS)
    assert list(fits) == list(FIT_COLUMNS)
    assert len(table) == 2 * 2 * 8
    assert fits[["seed", "precision"]].to_numpy().tolist() == [[s, p] for s in (0, 5) for p in ("float64", "float32")]


def test_points_are_those_of_a_single_measurement(settings, table):
    single = {name: getattr(settings, name) for name in MeasurementSettings.__dataclass_fields__}
    single |= {"seed": 5, "output_directory": None}
    results = EntropyMeasurements(MeasurementSettings(**single)).run_experiments(progress_bar=False)
    rows = table[(table["seed"] == 5) & (table["precision"] == "float64")]
    for (_, row), point in zip(rows.iterrows(), results["sweep"], strict=True):
        assert row["eta"] == point["eta"]
        # the same passes over the same batches; v's components are summed in the other order
        assert row["delta_h"] == pytest.approx(point["deltaH_true"], rel=1e-9)
        assert row["delta_h_stderr"] == pytest.approx(point["true"]["stderr"], rel=1e-9)
        assert row["delta_h1"] == pytest.approx(point["deltaH_approx"], rel=1e-9)
        eta, slope, curvature = row["eta"], results["first_order"]["value"], results["second_order"]["value"]
        assert row["second_order_prediction"] == pytest.approx(eta * slope + eta**2 * curvature / 2, rel=1e-9)


def test_precisions_score_the_same_tokens(table):
    double, single = (table[table["precision"] == precision].reset_index() for precision in ("float64", "float32"))
    # float32 tells a ΔH of about 1e-2 to 1e-6; other tokens would be off by a standard error, a hundred times that
    largest = double["eta"] == 1e-2
    assert (double["delta_h"] - single["delta_h"])[largest].abs().max() < 1e-2 * double["delta_h_stderr"][largest].min()


def test_deviations(table):
    expected = table["delta_h"] / table["delta_h1"] - 1
    assert np.allclose(table["relative_deviation"], expected, rtol=1e-6, atol=1e-12)
    # noise that ΔH and δH₁ share is in neither the deviation nor its error
    small = table[(table["eta"] == 1e-5) & (table["precision"] == "float64")]
    assert (small["relative_deviation_stderr"] < 0.01 * (small["delta_h_stderr"] / small["delta_h"].abs())).all()


def test_fits(table, fits):
    for (_, fit), (_, rows) in zip(fits.iterrows(), table.groupby(["seed", "precision"], sort=False), strict=True):
        inside = rows[(rows["eta"] > 0) & (rows["eta"] <= 1e-3)]
        assert (fit["fit_from"], fit["fit_to"], fit["n_points"] + fit["n_left_out"]) == (1e-5, 1e-3, 3)
        if fit["n_left_out"] == 0:
            line = stats.linregress(np.log(inside["eta"]), np.log(inside["delta_h"].abs()))
            assert fit["loglog_slope"] == pytest.approx(line.slope, abs=1e-9)
            assert fit["r_squared"] == pytest.approx(line.rvalue**2, abs=1e-9)
        # np.polyfit weighs residuals, not their squares: η for the weights η²
        _, slope = np.polyfit(inside["eta"], inside["delta_h"] / inside["eta"], 1, w=inside["eta"])
        assert fit["slope"] == pytest.approx(slope, rel=1e-6)
        assert fit["first_order_deviation"] == pytest.approx(fit["first_order"] / fit["slope"] - 1, rel=1e-6, abs=1e-12)
        plus, minus = (rows.loc[rows["eta"] == eta, "delta_h"].item() for eta in (1e-3, -1e-3))
        assert fit["symmetric_first"] == pytest.approx((plus - minus) / 2e-3)
        assert fit["symmetric_second"] == pytest.approx((plus + minus) / 1e-6)
    double = fits[fits["precision"] == "float64"]
    # of η + η²/η* the log-log slope is 1 + η/η*, to first order, and on average less
    assert ((double["loglog_slope"] - 1).abs() < 1.5 * double["fit_to"] / double["eta_star"]).all()
    assert double["first_order_deviation"].abs().max() < 1e-3  # what the parabola leaves is third order


def test_range_of_the_fits():
    assert LinearRegimeOptions().fit_range(2.0) == (0.0, 0.02)
    assert LinearRegimeOptions(fit_min=1e-3, fit_max=1.0).fit_range(2.0) == (1e-3, 1.0)
    assert LinearRegimeOptions().fit_range(math.inf) == (0.0, math.inf)


def test_report(outcome, fits):
    report = outcome.report.read_text()
    assert all(f"{slope:.6g}" in report for slope in fits["loglog_slope"])
    assert all((outcome.folder / name).is_file() for name in ("delta_h.png", "deviation.png", "config.yaml"))
    assert all(path.name in report for path in [*outcome.tables, *outcome.figures])
    assert str(outcome.report) in outcome.text


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on(settings, outcome, tmp_path, monkeypatch):
    again = replace(settings, output_directory=str(tmp_path / "again"))
    score, calls = EntropyMeasurements.score, []

    def killed_in_the_second(self, drawn, *args, **options):
        calls.append(drawn)
        if len(calls) == 2:
            raise Killed
        return score(self, drawn, *args, **options)

    monkeypatch.setattr(EntropyMeasurements, "score", killed_in_the_second)
    with pytest.raises(Killed):
        STUDY.run(again, progress_bar=False)
    cells = tmp_path / "again" / "cells.jsonl"
    assert len(cells.read_text().splitlines()) == 1
    with open(cells, "a") as file:
        file.write('{"schema": 1, "kind": "cell", "cell": "seed 0, float32", "tabl')

    with pytest.warns(UserWarning, match="is not a record"):
        resumed = STUDY.run(again, progress_bar=False)
    assert len(calls) == 2 + 3
    for one, other in zip(outcome.tables, resumed.tables, strict=True):
        assert one.read_bytes() == other.read_bytes()

    monkeypatch.setattr(EntropyMeasurements, "score", None)
    monkeypatch.setattr(EntropyMeasurements, "draw", None)  # finished: the tables are made of what is there
    with pytest.warns(UserWarning, match="is not a record"):
        STUDY.run(again, progress_bar=False)
    assert resumed.tables[0].read_bytes() == outcome.tables[0].read_bytes()
