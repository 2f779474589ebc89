from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from entropy_pl.estimators import (
    EntropyChange,
    first_order_delta_entropy,
    low_variance_delta_entropy,
    score_baseline,
    snis_delta_entropy,
)
from entropy_pl.estimators.estimate import make_estimate
from entropy_pl.measurements import EntropyMeasurements
from entropy_pl.studies import STUDIES
from entropy_pl.studies.options import PoolEstimates, variance_ratio
from entropy_pl.studies.pool import SCORES, pool_order
from entropy_pl.studies.stored import scored_once
from entropy_pl.studies.variance import COLUMNS, POOL_COLUMNS, SUBSET_COLUMNS
from entropy_pl.studies.variance_table import variance_table

STUDY = STUDIES["variance"]
KEYS = ["option", "quantity", "eta", "n"]
OPTIONS = {
    "options": [
        {"name": "sequence", "weighting": "sequence"},
        {"name": "prefix+surprisal", "integrand": "surprisal"},
        {"name": "prefix+critic", "baseline": "critic"},
        {"name": "gae", "baseline": "gae", "gae_lambda": 0.8},
    ],
    "sizes": [8, 16],
    "max_subsets": 3,
    "jackknife_groups": 8,
    "jackknife_subsets": 2,
}


@pytest.fixture(scope="module")
def settings(settings_of, tmp_path_factory):
    batch = {"completions_per_prompt": 2}
    return settings_of("variance", tmp_path_factory.mktemp("variance") / "whole", OPTIONS, batch_config=batch)


@pytest.fixture(scope="module")
def outcome(settings):
    return STUDY.run(settings, progress_bar=False)


@pytest.fixture(scope="module")
def tables(outcome):
    return {path.stem: pd.read_csv(path) for path in outcome.tables}


@pytest.fixture(scope="module")
def scores(outcome):
    return scored_once(outcome.folder / SCORES, lambda: pytest.fail("the pool is not there"))


def of(table, option, quantity, eta=None, **others):
    chosen = table[(table["option"] == option) & (table["quantity"] == quantity)]
    chosen = chosen[chosen["eta"].isna() if eta is None else chosen["eta"] == eta]
    for column, value in others.items():
        chosen = chosen[chosen[column] == value]
    return chosen


def direct(scores, option: str, rows: torch.Tensor) -> dict[float | None, EntropyChange]:
    """δH₁ (under None) and ΔH(η) of an option from the estimators themselves."""
    base, tangent, clusters = scores.base.select(rows), scores.tangent.select(rows), scores.clusters[rows]
    how = {
        "weighting": "sequence" if option == "sequence" else "prefix",
        "integrand": "surprisal" if option == "prefix+surprisal" else "rao_blackwell",
        "clusters": clusters,
    }
    matched = first_order_delta_entropy(base, tangent, **how)
    true = {eta: snis_delta_entropy(base, stats.select(rows), **how) for eta, stats in scores.shifted.items()}
    if option not in ("prefix+critic", "gae"):
        return {None: matched, **true}
    tokens = torch.repeat_interleave(torch.arange(len(scores)), scores.base.mask.sum(1))
    features = torch.cat([scores.features[tokens == row] for row in rows])
    kind = "gae" if option == "gae" else "critic"
    baseline = score_baseline(kind, base, features=features, gae_lambda=0.8, clusters=clusters)
    low = first_order_delta_entropy(base, tangent, baseline=baseline, clusters=clusters)
    return {
        None: low,
        **{eta: low_variance_delta_entropy(true[eta], matched, low, eta) for eta in true},
    }


def test_columns(tables):
    assert [list(tables[name]) for name in ("table", "pool", "subsets")] == [
        list(COLUMNS),
        list(POOL_COLUMNS),
        list(SUBSET_COLUMNS),
    ]
    assert tables["table"].groupby("option").size().tolist() == [9, 9, 9, 9]  # 3 quantities, 3 sizes
    assert of(tables["table"], "gae", "delta_h1")["n_subsets"].tolist() == [3, 2, 1]
    assert of(tables["table"], "gae", "delta_h1")["n_jackknife"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("option", ["sequence", "prefix+surprisal", "prefix+critic", "gae"])
def test_estimates_on_subsets(option, settings, tables, scores):
    order = pool_order(settings)
    for size, number in ((8, 2), (16, 1), (32, 0)):
        rows = order[number * size : (number + 1) * size].sort().values
        for eta, expected in direct(scores, option, rows).items():
            found = of(tables["subsets"], option, "delta_h1" if eta is None else "delta_h", eta, n=size, subset=number)
            assert found["value"].item() == pytest.approx(expected.value, rel=1e-9, abs=1e-15)
            psi = np.bincount(rows // 2, weights=expected.influence.numpy())  # the E-batch is prompt-major
            psi = psi[np.unique(rows // 2)]
            error = psi.std(ddof=1) * np.sqrt(len(psi)) / size
            assert found["stderr"].item() == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("option", ["sequence", "gae"])
def test_jackknife_on_a_subset(option, settings, tables, scores):
    """Eight prompts, eight groups: leave one out, the textbook's."""
    rows = pool_order(settings)[:16].sort().values
    prompts = np.unique(rows // 2)
    for eta in (None, 1e-3):
        values = [direct(scores, option, rows[rows // 2 != prompt])[eta].value for prompt in prompts]
        error = np.sqrt(7 / 8 * np.square(values - np.mean(values)).sum())
        found = of(tables["subsets"], option, "delta_h1" if eta is None else "delta_h", eta, n=16, subset=0)
        assert found["stderr_jackknife"].item() == pytest.approx(error, rel=1e-8)


def test_error_bars_agree_roughly(tables):
    """Of an option without a critic, on 16 prompts: the jackknife is a little larger, by a factor below two."""
    whole = tables["table"][(tables["table"]["n"] == 32) & tables["table"]["option"].isin(["sequence"])]
    assert whole["jackknife_to_influence"].between(0.8, 2).all()


def test_table_from_subsets(tables):
    subsets, table = tables["subsets"], tables["table"].set_index(KEYS)
    assert len(subsets) == 4 * 3 * (3 + 2 + 1)
    for key, group in subsets.groupby(KEYS, dropna=False):
        row, n = table.loc[key], key[-1]
        assert row["mean"] == pytest.approx(np.mean(group["value"]))
        assert row["variance_influence"] == pytest.approx(n * np.mean(group["stderr"] ** 2))
        jackknifed = group.dropna(subset="stderr_jackknife")
        assert row["variance_jackknife"] == pytest.approx(n * np.mean(jackknifed["stderr_jackknife"] ** 2))
        if len(group) > 1:
            assert row["variance_empirical"] == pytest.approx(n * np.var(group["value"], ddof=1))
            assert row["variance_empirical_relative_sd"] == pytest.approx(np.sqrt(2 / (len(group) - 1)))


def test_ratios(tables):
    table = tables["table"]
    wide = table.pivot_table(index=KEYS[1:], columns="option", values="variance_influence", dropna=False)
    for _, row in table.iterrows():
        unit = of(table, "sequence", row["quantity"], None if np.isnan(row["eta"]) else row["eta"], n=row["n"])
        for kind in ("influence", "jackknife", "empirical"):
            expected = row[f"variance_{kind}"] / unit[f"variance_{kind}"].item()
            assert row[f"ratio_{kind}"] == pytest.approx(expected, nan_ok=True)
    assert set(wide.columns) == set(table["option"])
    assert (table.loc[table["option"] == "sequence", "ratio_influence"] == 1).all()


def test_differences_from_the_reference_on_the_whole_pool(tables, scores):
    everything = torch.arange(32)
    reference = direct(scores, "prefix+critic", everything)
    for option in ("sequence", "gae"):
        for eta, change in direct(scores, option, everything).items():
            row = of(tables["pool"], option, "delta_h1" if eta is None else "delta_h", eta)
            psi = (change.influence - reference[eta].influence).reshape(16, 2).sum(1)
            assert row["difference"].item() == pytest.approx(change.value - reference[eta].value, rel=1e-7)
            assert row["difference_stderr"].item() == pytest.approx(float(psi.std()) * 4 / 32, rel=1e-7)
            # 16 prompts in 8 groups of two: groups of one size, prompt number c in group c modulo 8
            apart = []
            for group in range(8):
                kept = everything[scores.clusters % 8 != group]
                apart.append(direct(scores, option, kept)[eta].value - direct(scores, "prefix+critic", kept)[eta].value)
            error = np.sqrt(7 / 8 * np.square(apart - np.mean(apart)).sum())
            assert row["difference_stderr_jackknife"].item() == pytest.approx(error, rel=1e-6)
    own = tables["pool"][tables["pool"]["option"] == "prefix+critic"]
    assert (own["difference"] == 0).all()


def test_report(outcome, tables):
    report = outcome.report.read_text()
    shown = tables["pool"][tables["pool"]["quantity"] == "delta_h1"]
    for column in ("variance_ratio", "difference", "stderr"):
        assert all(f"{value:.6g}" in report for value in shown[column])
    assert all(path.name in report and path.is_file() for path in [*outcome.tables, *outcome.figures])


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_and_does_not_score_again(settings, outcome, tmp_path, monkeypatch):
    again = replace(settings, output_directory=str(tmp_path / "again"))
    changes, calls = PoolEstimates.changes, []

    def killed(self, option, rows):
        calls.append(option)
        if len(calls) == 60:
            raise Killed
        return changes(self, option, rows)

    monkeypatch.setattr(PoolEstimates, "changes", killed)
    with pytest.raises(Killed):
        STUDY.run(again, progress_bar=False)
    assert 0 < len((tmp_path / "again" / "cells.jsonl").read_text().splitlines()) < 16
    monkeypatch.setattr(EntropyMeasurements, "draw", None)
    monkeypatch.setattr(EntropyMeasurements, "score", None)
    resumed = STUDY.run(again, progress_bar=False)
    for one, other in zip(outcome.tables, resumed.tables, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_coverage_of_a_reference_that_holds_the_subsets():
    """Means of N = 100 out of pools of 200: a raw count says 99.4 % where 95 % is true; corrected it says 95 %."""
    pools, n, size = 1500, 100, 200
    values = np.random.default_rng(0).normal(size=(pools, size))
    subsets, on_pool = [], []
    for eta, pool in enumerate(values):
        label = {"option": "mean", "quantity": "delta_h", "eta": float(eta)}
        on_pool.append({**label, "value": pool.mean(), "difference_stderr": 0.0})
        for number in range(2):
            part = pool[number * n : (number + 1) * n]
            error = part.std(ddof=1) / np.sqrt(n)
            interval = {"ci_low": part.mean() - 1.984 * error, "ci_high": part.mean() + 1.984 * error}
            row = {"n": n, "subset": number, "value": part.mean(), "stderr": error, "stderr_jackknife": np.nan}
            subsets.append(label | row | interval)
    table, _ = variance_table(
        pd.DataFrame(subsets), pd.DataFrame(on_pool), size=size, reference="mean", compared_to="mean"
    )
    # the two halves of a pool miss it by the same: 1500 independent trials, z = 4
    assert table["coverage"].mean() == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / pools))
    assert table["coverage_uncorrected"].mean() == pytest.approx(0.9942, abs=4 * np.sqrt(0.9942 * 0.0058 / pools))


@pytest.mark.parametrize("each", [1, 2])
def test_error_of_a_variance_ratio(each):
    """Against the spread of the ratio over repetitions, whose own relative error is 1/√(2 · 1000)."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(200).repeat_interleave(each)

    def change(psi):
        mask = torch.ones(len(psi), 1, dtype=torch.bool)
        return make_estimate(torch.tensor(0.0), psi - psi.mean(), clusters=clusters, confidence=0.95, mask=mask)

    found = []
    for _ in range(1000):
        shared, own = torch.randn(2, 200, generator=generator, dtype=torch.float64).repeat_interleave(each, 1)
        found.append(variance_ratio(change(0.6 * shared + 0.3 * own), change(shared), clusters))
    ratios, errors = np.array(found).T
    assert ratios.mean() == pytest.approx(0.45, rel=0.02)
    assert errors.mean() == pytest.approx(ratios.std(), rel=4 / np.sqrt(2000))
