"""How theories do over a run, against SciPy's correlations of numbers written down here."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from entropy_pl.reporting import add_step_agreement, step_evidence

PREDICTED, MEASURED, RATES = [0.1, -0.3, 0.2, 0.5, -0.1], [1e-3, -2e-3, 5e-4, 4e-3, 1e-3], [1.0, 1.0, 0.5, 1.0, 2.0]


def record(step: int, predicted: float | None, measured: float, lr: float) -> dict:
    estimate = {"value": measured, "stderr": 1e-4}
    return {
        "step": step,
        "status": "ok",
        "lr": lr,
        "sweep": [{"eta": lr, "taken": True, "true": estimate, "first_order": estimate}],
        "predictors": {} if predicted is None else {"cui": {"step": predicted}},
    }


def run() -> list[dict]:
    return [record(10 * i, *numbers) for i, numbers in enumerate(zip(PREDICTED, MEASURED, RATES, strict=True))]


@pytest.mark.parametrize("kept", [dict, step_evidence], ids=["records", "evidence"])
def test_correlations_over_the_steps_so_far(kept):
    *earlier, last = run()
    add_step_agreement(last, [kept(other) for other in earlier])
    found = last["predictors"]["cui"]
    per_rate = [m / lr for m, lr in zip(MEASURED, RATES, strict=True)]
    assert found["n_steps"] == 5
    assert found["step_pearson"] == pytest.approx(stats.pearsonr(PREDICTED, per_rate).statistic)
    assert found["step_spearman"] == pytest.approx(stats.spearmanr(PREDICTED, per_rate).statistic)
    assert found["step_pearson_ci_low"] < found["step_pearson"] < found["step_pearson_ci_high"]


def test_a_schedule_is_no_theory():
    """A linear decay, and predictions that know nothing of ΔH/lr: no correlation (|r| < 4/sqrt(200))."""
    rng = random.Random(0)
    rates = [1 - i / 200 for i in range(200)]
    *earlier, last = [record(i, 1 + rng.gauss(0, 1), lr * (1 + rng.gauss(0, 1)), lr) for i, lr in enumerate(rates)]
    add_step_agreement(last, earlier)
    assert abs(last["predictors"]["cui"]["step_pearson"]) < 4 / 200**0.5


def test_too_few_steps_and_steps_without_a_prediction():
    *earlier, last = run()[:4]
    earlier.append(record(15, None, 1.0, 1.0))
    earlier.append({"step": 17, "status": "failed", "message": "x"})
    add_step_agreement(last, sorted(earlier, key=lambda r: r["step"]))
    assert last["predictors"]["cui"]["n_steps"] == 4
    assert last["predictors"]["cui"]["step_pearson"] is not None
    *earlier, last = run()[:3]
    add_step_agreement(last, earlier)
    assert last["predictors"]["cui"] == {
        "step": 0.2,
        "n_steps": 3,
        "step_pearson": None,
        "step_pearson_ci_low": None,
        "step_pearson_ci_high": None,
        "step_spearman": None,
    }


def test_a_step_probed_again_counts_once():
    """A resumed run takes steps again: the later record of a step replaces the earlier one and all behind it."""
    *earlier, last = run()
    add_step_agreement(last, [*earlier, record(20, 9.0, 9.0, 9.0), *earlier[2:]])
    again = run()[-1]
    add_step_agreement(again, earlier)
    assert last == again


def test_constants_have_no_correlation():
    *earlier, last = [record(i, 0.5, m, 1.0) for i, m in enumerate(MEASURED)]
    add_step_agreement(last, earlier)
    assert last["predictors"]["cui"]["step_pearson"] is None


def test_a_record_without_predictors_stays_as_it_is():
    last = {"step": 1, "status": "skipped"}
    add_step_agreement(last, run()[:1])
    assert last == {"step": 1, "status": "skipped"}
