"""From scores to a probe's result, against loops: what has a formula of its own there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from enumeration import Enumeration
from scipy import stats

from entropy_pl import EntropyProbe, ProbeResult, UpdateVector, token_stats
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.probe.scores import CounterfactualScores
from entropy_pl.rollout import TokenStats

LR, N = 0.1, 60


@pytest.fixture(scope="module")
def measured() -> tuple[ProbeResult, TokenStats, TokenStats, list[float]]:
    """A probe with rewards and 80 % intervals, and the statistics at θ and at the step taken behind it."""
    enumeration = Enumeration.make(seed=1)
    rows = torch.arange(0, len(enumeration.rollout), len(enumeration.rollout) // N)[:N]
    part, update = enumeration.rollout.select(rows), UpdateVector(enumeration.update.direction, LR)
    rewards = torch.randn(N, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    probe = EntropyProbe(precision="float64", confidence=0.8)
    result = probe.measure(enumeration.model, part, update, rewards=rewards, clusters=torch.arange(N))
    with float64_evaluation(enumeration.model):
        base, shifted = (token_stats(enumeration.model, part, update=update, eta=eta) for eta in (0.0, LR))
    return result, base, shifted, rewards.tolist()


def test_the_change_of_the_reward_goes_from_theta_to_the_step_taken(measured):
    result, base, shifted, rewards = measured
    weights = [math.exp(sum(float(shifted.logp[i, k] - base.logp[i, k]) for k in range(4))) for i in range(N)]
    there = sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)
    change = there - sum(rewards) / N
    [taken] = [point for point in result.sweep if point.taken]
    assert taken.reward_true.value == pytest.approx(change, rel=1e-9)  # float64 through exp and sums
    assert result.exchange_rate.value == pytest.approx(taken.true.value / change, rel=1e-9)


def test_the_interval_of_eta_star_is_of_its_orders_at_their_confidence(measured):
    """Its ends are where slope − ρ·curvature is just told from zero; test_ratio.py has the set itself."""
    result, reach = measured[0], stats.t.ppf(0.9, N - 1)
    first, second = result.first_order, result.second_order
    assert result.eta_star_ci_high is None  # curvature is not told from zero in these few
    for end in (result.eta_star_ci_low,):
        clear = []
        for rho in (end / 2, -end / 2):
            psi = first.influence - rho * second.influence
            clear.append(abs(first.value - rho * second.value) / (reach * float(psi.std()) / math.sqrt(N)))
        assert min(abs(x - 1) for x in clear) < 1e-9  # rounding of the roots of a square
    assert 0 < result.eta_star_ci_low < result.eta_star


def test_every_interval_is_of_the_confidence_asked_for(measured):
    result, reach = measured[0], stats.t.ppf(0.9, N - 1)
    estimates = [result.entropy, result.first_order, result.second_order, result.expected_reward]
    for point in result.sweep:
        estimates += [point.true, point.first_order, point.reward_true, point.reward_first_order]
    for estimate in estimates:
        assert estimate.ci_high - estimate.value == pytest.approx(reach * estimate.stderr, rel=1e-9)
        assert estimate.value - estimate.ci_low == pytest.approx(reach * estimate.stderr, rel=1e-9)


def test_a_counterfactual_is_set_against_the_step_taken():
    enumeration = Enumeration.make(seed=1)
    part, update = enumeration.rollout.select(torch.arange(0, 240, 4)), UpdateVector(enumeration.update.direction, LR)
    probe = EntropyProbe(precision="float64")
    scores = probe.collect(enumeration.model, part, update)
    with float64_evaluation(enumeration.model):
        other = token_stats(enumeration.model, part, update=update, eta=0.5 * LR)
    result = probe.reduce(replace(scores, counterfactuals={"half": CounterfactualScores(other, 1.0, 1.0)}), update)
    found, [taken] = result.counterfactuals["half"], [point for point in result.sweep if point.taken]
    assert abs(found.difference.value) > 0.1 * abs(taken.true.value)
    assert found.difference.value == pytest.approx(found.true.value - taken.true.value, rel=1e-9)
    assert found.true.value == pytest.approx(result.sweep[0].true.value, rel=1e-9)  # η = lr/2 is in the sweep as well
