"""Intervals hold the enumerated truth as often as they say, for every estimator and option; the table is in
docs/reliability.md (`make calibration`).
"""

from __future__ import annotations

from pathlib import Path

import calibration
import pytest
import resampling
import torch
from calibration import CASES, FORGOTTEN, GAE_RESAMPLES, Case, Draws, gae

from entropy_pl import estimators
from entropy_pl.estimators import (
    entropy_estimate,
    first_order_delta_entropy,
    first_order_delta_reward,
    reward_estimate,
    second_order_delta_entropy,
    snis_delta_entropy,
    snis_delta_reward,
)

ROOT = Path(__file__).parents[2]
NO_INTERVAL = {  # what gives none, so that none can be wrong
    "Baseline",
    "Weights",
    "Measure",
    "PowerLaw",
    "Ratio",
    "covariance_prediction",
    "fit_power_law",
    "linear_coefficient",
    "score_return",
    "steer_prediction",
}


@pytest.fixture(scope="module")
def draws() -> Draws:
    return Draws()


def parameter(case: Case, size: int) -> object:
    # those of default options take a second: in every run of the tests
    marks = [] if "defaults, 4" in case.option else [pytest.mark.slow]
    if size in case.off:
        marks.append(pytest.mark.xfail(reason=case.off[size], strict=True))
    return pytest.param(case, size, id=f"{case}-{size}", marks=marks)


@pytest.mark.parametrize(("case", "size"), [parameter(case, size) for case in CASES for size in case.sizes])
def test_intervals_cover(draws: Draws, case: Case, size: int):
    low, high = case.band(size)
    assert low <= case.share(draws.of(case, size)) <= high


def test_forgotten_clusters_would_show(draws: Draws):
    """Completions of one prompt are not independent here: the cases of several a prompt can fail."""
    assert FORGOTTEN.share(draws(256, FORGOTTEN.per_prompt)) < FORGOTTEN.band(256)[0]


@pytest.mark.slow
def test_a_probe_knows_the_noise_of_the_critic_of_gae(draws: Draws):
    """It covers in 95 % ± 3 standard deviations of that share."""
    found = gae(draws(256, count=GAE_RESAMPLES))
    assert 0.91 <= found.probe <= 0.99
    # a standard deviation of 250 is known to 1/√500 = 4.5 %: three times that, and the jackknife's own O(1/N)
    assert found.size == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("per_prompt", [1, calibration.PER_PROMPT])
@pytest.mark.parametrize(
    ("estimate", "names", "rewarded"),
    [
        (entropy_estimate, ("base",), False),
        (snis_delta_entropy, ("base", "shifted"), False),
        (first_order_delta_entropy, ("base", "first"), False),
        (second_order_delta_entropy, ("base", "first", "second"), False),
        (reward_estimate, ("base",), True),
        (snis_delta_reward, ("base", "shifted"), True),
        (first_order_delta_reward, ("base", "first"), True),
    ],
)
def test_batches_side_by_side_are_estimates_one_by_one(draws: Draws, estimate, names, rewarded, per_prompt):
    samples = draws(64, per_prompt, count=3)
    baselines = samples.baseline("position") if estimate is first_order_delta_entropy else None
    found = samples.estimates(estimate, *names, rewarded=rewarded, baseline=baselines, confidence=0.8)
    for number, rows in enumerate(samples.rows):
        rewards = [samples.policy.rewards[rows]] if rewarded else []
        baseline = {} if baselines is None else {"baseline": baselines[number]}
        arguments = [*samples.batch(number, *names), *rewards]
        one = estimate(*arguments, clusters=samples.clusters, confidence=0.8, **baseline)
        for name in ("value", "stderr", "ci_low", "ci_high", "n_tokens"):
            # the same sums in another order
            assert getattr(found[number], name) == pytest.approx(getattr(one, name), rel=1e-10, abs=1e-12)
        torch.testing.assert_close(found[number].influence, one.influence, rtol=1e-10, atol=1e-12)


def test_every_estimator_is_calibrated_or_has_no_interval():
    used = vars(calibration) | vars(resampling)
    calibrated = {name for name in estimators.__all__ if name in used}
    assert calibrated | NO_INTERVAL == set(estimators.__all__)
    assert not {name for name in NO_INTERVAL if name in vars(calibration)}


def test_every_case_is_in_the_document():
    text = (ROOT / "docs/reliability.md").read_text()
    _, _, rest = text.partition("<!-- bench:calibration -->")
    rows = [line for line in rest.partition("<!-- /bench:calibration -->")[0].splitlines() if line.startswith("|")]
    for case in CASES:
        start = f"| {case.what} | {case.option} | {100 * case.confidence:g} |"
        assert sum(row.startswith(start) for row in rows) == 1, f"`make calibration` writes it: {case}"
