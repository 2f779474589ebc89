"""When an estimate must not be believed: weights whose mean is not one, too few prompts, and what is withheld."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from chain import Chain
from scipy import stats

from entropy_pl.estimators import EntropyChange, entropy_estimate, linear_combination, snis_delta_entropy
from entropy_pl.rollout import TokenStats


@pytest.fixture(scope="module")
def pair() -> tuple[TokenStats, TokenStats]:
    """Forty ragged completions of a chain, at θ and at θ+ηv."""
    chain = Chain.make(0)
    drawn = chain.draw(40, np.random.default_rng(1))
    return chain.scored(*drawn, 0.0), chain.scored(*drawn, 0.2)


def weighed(weights: list[float], clusters: list[int] | None = None):
    """ΔH of completions of one token with these importance weights."""
    mask = torch.ones(len(weights), 1, dtype=torch.bool)
    zero = torch.zeros(len(weights), 1, dtype=torch.float64)
    log = torch.tensor(weights, dtype=torch.float64).log()[:, None]
    return snis_delta_entropy(TokenStats(zero, zero + 1, mask), TokenStats(log, zero + 1, mask), clusters=clusters)


@pytest.mark.parametrize("per_prompt", [1, 4])
def test_the_mean_weight_and_its_error_are_those_of_a_loop(pair, per_prompt):
    base, shifted = pair
    count = len(base)
    clusters = [i // per_prompt for i in range(count)]
    found = snis_delta_entropy(base, shifted, clusters=clusters)
    weights = [math.exp(float(shifted.logp[i].sum() - base.logp[i].sum())) for i in range(count)]
    mean, sums = sum(weights) / count, {}
    for cluster, weight in zip(clusters, weights, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + weight - mean
    prompts = len(sums)
    stderr = math.sqrt(prompts / (prompts - 1) * sum(x**2 for x in sums.values())) / count
    assert found.mean_weight == pytest.approx(mean, rel=1e-12)
    assert found.mean_weight_stderr == pytest.approx(stderr, rel=1e-10)


def test_clipping_does_not_hide_the_mean_weight(pair):
    clipped, free = (snis_delta_entropy(*pair, clip_log_weight=c) for c in (0.1, None))
    assert clipped.mean_weight == free.mean_weight


@pytest.mark.parametrize(
    ("weights", "trustworthy"),
    [
        ([1.0] * 128, True),
        ([0.97] * 128, False),  # beyond the tolerance, and no spread to excuse it
        ([0.985] * 128, True),  # within the tolerance
        ([0.5, 1.3] * 64, True),  # 0.9, 2.8 standard errors of 0.035 below 1
        ([0.5, 1.2] * 64, False),  # 0.85, 4.8 of 0.031
    ],
)
def test_a_mean_weight_far_from_one_is_not_trusted(weights, trustworthy):
    found = weighed(weights)
    assert found.trustworthy is found.to_dict()["trustworthy"] is trustworthy
    assert bool(found.off_balance) is not trustworthy


@dataclass
class Fork:
    """A policy of two tokens: the first is a rare one or a common one, and behind the rare one comes a fair coin."""

    rare: float

    def entropy(self) -> float:
        """Per token, exactly."""
        p = self.rare
        return (-p * math.log(p) - (1 - p) * math.log(1 - p) + p * math.log(2)) / 2

    def scored(self, rare: torch.Tensor) -> TokenStats:
        """Completions by whether their first token was the rare one, ``[N]`` bool."""
        p, coin = self.rare, math.log(2) * rare.double()
        first = torch.where(rare, math.log(p), math.log(1 - p)).double()
        of_first = torch.full_like(first, -p * math.log(p) - (1 - p) * math.log(1 - p))
        return TokenStats(torch.stack([first, -coin], 1), torch.stack([of_first, coin], 1), torch.ones(len(rare), 2))


def measured_between(here: Fork, there: Fork, seed: int) -> tuple[EntropyChange, float]:
    """ΔH from completions drawn here, and the exact one."""
    rare = torch.rand(256, generator=torch.Generator().manual_seed(seed)) < here.rare
    return snis_delta_entropy(here.scored(rare), there.scored(rare)), there.entropy() - here.entropy()


@pytest.mark.parametrize(("seed", "later"), [(0, 0.34), (1, 0.2)])
def test_a_change_towards_what_was_hardly_drawn_is_not_trusted_and_its_reverse_is(seed, later):
    """The effective sample size is that of all 256; the mean weight says that a mode is missing."""
    before, after = Fork(1e-4), Fork(later)
    forwards, exact = measured_between(before, after, seed)
    assert forwards.ess_min > 0.99 * 256
    assert abs(forwards.value - exact) > 0.1 * abs(exact)
    assert not forwards.trustworthy
    assert forwards.off_balance
    backwards, exact = measured_between(after, before, seed)
    assert backwards.trustworthy
    assert abs(backwards.value - exact) < 4 * backwards.stderr


@pytest.mark.parametrize(
    ("count", "prompts", "trustworthy"), [(63, 63, False), (64, 64, True), (64, 7, False), (64, 8, True)]
)
def test_few_sequences_or_prompts_are_not_trusted(count, prompts, trustworthy):
    base = TokenStats(torch.zeros(count, 1), torch.rand(count, 1), torch.ones(count, 1))
    clusters = torch.arange(count) % prompts
    found = entropy_estimate(base, clusters=clusters)
    assert found.n_clusters == prompts
    assert found.trustworthy is trustworthy
    # the interval knows of the few: Student's t of the prompts
    reach = stats.t.ppf(0.975, prompts - 1) * found.stderr
    assert (found.ci_low, found.ci_high) == pytest.approx((found.value - reach, found.value + reach))


def test_what_is_withheld_has_no_number_and_says_why(pair):
    estimate = snis_delta_entropy(*pair)
    withheld = estimate.withheld_because("It is not smooth.")
    assert all(math.isnan(x) for x in (withheld.value, withheld.stderr, withheld.ci_low, withheld.ci_high))
    assert withheld.warnings[0] == "It is not smooth."
    assert not withheld.trustworthy
    for made in (withheld.scaled(2.0), linear_combination([(1.0, estimate), (1.0, withheld)])):
        assert math.isnan(made.value)
        assert made.warnings[0] == "It is not smooth."
    record = json.loads(json.dumps(withheld.to_dict(), allow_nan=False))
    assert record["value"] is record["stderr"] is record["ci_low"] is None
    assert record["warnings"][0] == "It is not smooth."
