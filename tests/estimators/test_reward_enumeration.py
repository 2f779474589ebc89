"""The change of expected reward against exact answers: every completion written down, each with its reward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from enumeration import Enumeration
from samples import ETA, at, exact_reward, exact_reward_slope, prefix_features, rewards_of
from test_critic_enumeration import sampled
from torch import Tensor

from entropy_pl.estimators import (
    first_order_delta_reward,
    low_variance_delta_entropy,
    reward_baseline,
    reward_estimate,
    snis_delta_reward,
)


@pytest.fixture(scope="module")
def rewards(enumeration: Enumeration) -> Tensor:
    return rewards_of(enumeration)


@pytest.fixture(scope="module")
def hidden(enumeration: Enumeration) -> Tensor:
    return prefix_features(enumeration)


@pytest.fixture(scope="module")
def change(enumeration, rewards) -> float:
    return exact_reward(enumeration, rewards, ETA) - exact_reward(enumeration, rewards, 0.0)


@pytest.fixture(scope="module")
def slope(enumeration, rewards) -> float:
    return exact_reward_slope(enumeration, rewards)


def test_the_reward_is_the_enumerated_one(enumeration, scored, drawn, rewards):
    estimate = reward_estimate(scored["base"].select(drawn), rewards[drawn])
    assert abs(estimate.value - exact_reward(enumeration, rewards, 0.0)) / estimate.stderr < 4


def test_the_change_is_the_enumerated_one(scored, drawn, rewards, change):
    estimate = snis_delta_reward(*at(scored, drawn, "base", "shifted"), rewards[drawn])
    assert abs(change) > 10 * estimate.stderr, "the change must stand out, or z says nothing"
    assert abs(estimate.value - change) / estimate.stderr < 4


@pytest.mark.parametrize("kind", ["none", "position", "critic"])
def test_the_first_order_is_the_enumerated_gradient(scored, hidden, drawn, rewards, slope, kind):
    base, first, features = sampled(scored, hidden, drawn)
    r = rewards[drawn]
    plain = first_order_delta_reward(base, first, r)
    baseline = reward_baseline(kind, base, r, features=features)
    estimate = first_order_delta_reward(base, first, r, baseline=baseline)
    assert abs(slope) > 10 * estimate.stderr
    assert abs(estimate.value - slope) / estimate.stderr < 4
    # the mean of those alive at k predicts no worse than everybody's, but for the noise of fitting it
    assert estimate.stderr < {"none": 1.0001, "position": 1.02, "critic": 0.95}[kind] * plain.stderr


def test_the_low_variance_change_is_the_enumerated_one(scored, hidden, drawn, rewards, change, slope):
    """As for ΔH: with a critic unbiased, and with the exact slope only curvature's noise is left."""
    base, first, features = sampled(scored, hidden, drawn)
    r = rewards[drawn]
    true = snis_delta_reward(base, scored["shifted"].select(drawn), r)
    matched = first_order_delta_reward(base, first, r)
    critic = first_order_delta_reward(base, first, r, baseline=reward_baseline("critic", base, r, features=features))
    exact = dataclasses.replace(matched, value=slope, influence=torch.zeros_like(matched.influence))
    for low, share in ((critic, 1.0), (exact, 0.7)):
        found = low_variance_delta_entropy(true, matched, low, ETA)
        assert abs(found.value - change) / found.stderr < 4
        assert found.stderr < share * true.stderr
