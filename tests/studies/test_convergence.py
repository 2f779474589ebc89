from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from entropy_pl.estimators import entropy_estimate, first_order_delta_entropy, snis_delta_entropy
from entropy_pl.studies import STUDIES
from entropy_pl.studies.convergence import COLUMNS, FIT_COLUMNS, exponents
from entropy_pl.studies.pool import SCORES, pool_order
from entropy_pl.studies.stored import scored_once

STUDY = STUDIES["convergence"]


@pytest.fixture(scope="module")
def settings(settings_of, tmp_path_factory):
    return settings_of("convergence", tmp_path_factory.mktemp("convergence") / "study", {"sizes": [8, 16]})


@pytest.fixture(scope="module")
def outcome(settings):
    return STUDY.run(settings, progress_bar=False)


@pytest.fixture(scope="module")
def table(outcome):
    return pd.read_csv(outcome.folder / "table.csv")


def test_values_are_those_of_the_first_sequences(settings, outcome, table):
    assert list(table) == list(COLUMNS)
    assert len(table) == 3 * 4
    scores = scored_once(outcome.folder / SCORES, lambda: pytest.fail("the pool is not there"))
    order = pool_order(settings)
    for size in (8, 16, 32):
        stretches = order[: 32 // size * size].view(-1, size).sort().values
        direct = []
        for rows in stretches:
            base = scores.base.select(rows)
            direct.append(
                {
                    ("entropy", None): entropy_estimate(base),
                    ("delta_h1", None): first_order_delta_entropy(base, scores.tangent.select(rows)),
                    ("delta_h", 1e-4): snis_delta_entropy(base, scores.shifted[1e-4].select(rows)),
                    ("delta_h", 1e-3): snis_delta_entropy(base, scores.shifted[1e-3].select(rows)),
                }
            )
        for (quantity, eta), change in direct[0].items():
            row = table[(table["quantity"] == quantity) & (table["n"] == size)]
            row = row[row["eta"].isna() if eta is None else row["eta"] == eta]
            for name in ("value", "stderr", "ci_low", "ci_high", "ess"):
                assert row[name].item() == pytest.approx(getattr(change, name), rel=1e-12)
            spread = [float(found[quantity, eta].influence.numpy().std(ddof=1)) / np.sqrt(size) for found in direct]
            assert row["stderr_typical"].item() == pytest.approx(np.sqrt(np.mean(np.square(spread))), rel=1e-9)


def test_exponents_of_a_known_law():
    rows = [
        {"quantity": quantity, "eta": eta, "n": n, "stderr_typical": 3.0 * n**power}
        for quantity, eta, power in (("entropy", np.nan, -0.5), ("delta_h", 1e-3, -0.25))
        for n in (64, 128, 512)
    ]
    fits = exponents(pd.DataFrame(rows))
    assert list(fits) == list(FIT_COLUMNS)
    assert fits["exponent"].tolist() == pytest.approx([-0.5, -0.25])
    assert fits["exponent_stderr"].max() < 1e-6
    assert exponents(pd.DataFrame(rows[:2]))["exponent"].isna().all()  # two points are always on a line


def test_report_and_figures(outcome, table):
    report = outcome.report.read_text()
    assert all(f"{value:.6g}" in report for value in table.loc[table["quantity"] == "entropy", "value"])
    assert all(path.name in report and path.is_file() for path in [*outcome.tables, *outcome.figures])
    assert "exponent" in outcome.text


def test_a_cell_that_is_missing_is_all_that_is_done_again(settings, outcome, table, monkeypatch):
    cells = outcome.folder / "cells.jsonl"
    first, second, third = cells.read_text().splitlines()
    assert [json.loads(line)["cell"] for line in (first, second, third)] == ["N = 8", "N = 16", "N = 32"]
    cells.write_text(f"{third}\n{first}\n{second[:40]}")  # another order, one of them cut short
    before = (outcome.folder / "table.csv").read_bytes()
    with pytest.warns(UserWarning, match="is not a record"):
        STUDY.run(settings, progress_bar=False)
    assert (outcome.folder / "table.csv").read_bytes() == before
    assert json.loads(cells.read_text().splitlines()[-1])["cell"] == "N = 16"
