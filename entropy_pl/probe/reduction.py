"""From scores to estimates: no model is needed here, and whoever wants other estimates reduces the scores again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from entropy_pl.estimators import (
    EntropyChange,
    entropy_estimate,
    eta_star,
    first_order_delta_entropy,
    first_order_delta_reward,
    fit_power_law,
    jackknife_standard_error,
    low_variance_delta_entropy,
    ratio,
    reward_baseline,
    reward_estimate,
    score_baseline,
    second_order_delta_entropy,
    snis_delta_entropy,
    snis_delta_reward,
    symmetric_difference,
)
from entropy_pl.probe.result import Counterfactual, ProbeResult, SweepPoint, SymmetricPoint
from entropy_pl.probe.result_warnings import warnings_of
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.settings import ProbeSettings
from entropy_pl.probe.smoothness import judge_derivatives
from entropy_pl.rollout import TokenStats
from entropy_pl.updates.vector import UpdateVector


@dataclass(frozen=True)
class _Quantity:
    """The entropy or the reward of one E-batch: how it changes along v, by all the estimators of it.

    Args:
        plain: statistics at θ+ηv → the change there.
        matched: its derivative at η = 0, per unit η: it shares the plain one's noise.
        first: the same derivative with less noise; ``matched`` itself without a baseline.
        variance: of ``first`` that its influences leave out.
    """

    plain: Callable[[TokenStats], EntropyChange]
    matched: EntropyChange
    first: EntropyChange
    variance: float

    def at(self, eta: float, shifted: TokenStats) -> EntropyChange:
        """The change at θ+ηv, its first-order part replaced by the one with less noise."""
        change = self.plain(shifted)
        if self.first is self.matched:
            return change
        change = low_variance_delta_entropy(change, self.matched, self.first, eta)
        return _less_certain(change, eta**2 * self.variance)

    def without_derivatives(self, reason: str) -> _Quantity:
        """The same with its first order withheld, and so with no noise taken from the change by it."""
        withheld = self.matched.withheld_because(reason)
        return _Quantity(self.plain, withheld, withheld, 0.0)


def reduce_scores(settings: ProbeSettings, scores: ProbeScores, update: UpdateVector) -> ProbeResult:
    """The estimates of a probe, from scores at hand; see :meth:`entropy_pl.probe.EntropyProbe.reduce`."""
    error_bar: dict[str, Any] = {"clusters": scores.clusters, "confidence": settings.confidence}
    derivatives = judge_derivatives(settings, scores)
    scores = replace(scores, tangent=derivatives.tangent, method=derivatives.method)
    entropy = _entropy(settings, scores, error_bar)
    reward = None if scores.rewards is None else _reward(settings, scores, scores.rewards, error_bar)
    second = second_order_delta_entropy(scores.base, scores.tangent, scores.curvature, **settings.estimate, **error_bar)
    if derivatives.withheld is not None:
        entropy = entropy.without_derivatives(derivatives.withheld)
        reward = None if reward is None else reward.without_derivatives(derivatives.withheld)
        second = second.withheld_because(derivatives.withheld)
    sweep = [
        SweepPoint(
            eta=eta,
            taken=eta == update.lr,
            true=entropy.at(eta, shifted),
            first_order=eta * entropy.first,
            reward_true=None if reward is None else reward.at(eta, shifted),
            reward_first_order=None if reward is None else eta * reward.first,
        )
        for eta, shifted in scores.shifted.items()
    ]
    taken = next((point for point in sweep if point.taken), None)
    exchange_rate = None
    if taken is not None and taken.reward_true is not None:
        exchange_rate = ratio(taken.true, taken.reward_true)
    forward = [point for point in sweep if point.eta > 0]
    star, star_low, star_high = eta_star(entropy.first, second)
    of_base: dict[str, Any] = {"normalize": settings.normalize, "integrand": settings.integrand}
    return ProbeResult(
        entropy=entropy_estimate(scores.base, **of_base, **error_bar),
        first_order=entropy.first,
        second_order=second,
        eta_star=star,
        eta_star_ci_low=star_low,
        eta_star_ci_high=star_high,
        sweep=sweep,
        symmetric=[
            SymmetricPoint(eta, _less_certain(odd, entropy.variance), even)
            for eta, plus, minus in _pairs(sweep)
            for odd, even in [symmetric_difference(plus, minus, eta)]
        ],
        power_law=fit_power_law([p.eta for p in forward], [p.true.value for p in forward]),
        lr=update.lr,
        update_norm=update.norm(),
        update_components=update.component_norms(),
        update_gap=update.gap(),
        update_split_absent=update.split_absent,
        method=scores.method,
        difference_step=scores.difference_step,
        difference_error=derivatives.difference_error,
        roughness=derivatives.roughness,
        expected_reward=None if scores.rewards is None else reward_estimate(scores.base, scores.rewards, **error_bar),
        exchange_rate=exchange_rate,
        counterfactuals=_counterfactuals(scores, entropy, reward, scores.shifted.get(update.lr)),
        seconds=dict(scores.seconds),
        settings=settings.recorded | {"temperature": scores.temperature},
        warnings=warnings_of(sweep, entropy.first, derivatives, scores, update.lr),
    )


def baseline_of(settings: ProbeSettings, scores: ProbeScores) -> Tensor | None:
    """What the settings subtract from the score term of the entropy's estimates, ``[N, T]``."""
    return score_baseline(
        settings.baseline,
        scores.base,
        features=scores.features,
        gae_lambda=settings.gae_lambda,
        clusters=scores.clusters,
        **settings.estimate,
    )


def _entropy(settings: ProbeSettings, scores: ProbeScores, error_bar: dict[str, Any]) -> _Quantity:
    options = {**settings.estimate, **error_bar}
    matched = first = first_order_delta_entropy(scores.base, scores.tangent, **options)
    baseline = baseline_of(settings, scores)
    variance = 0.0
    if baseline is not None:
        first = first_order_delta_entropy(scores.base, scores.tangent, baseline=baseline, **options)
        variance = _fit_variance(settings, scores, baseline, options)
        first = _less_certain(first, variance)

    def plain(shifted: TokenStats) -> EntropyChange:
        return snis_delta_entropy(scores.base, shifted, clip_log_weight=settings.clip_log_weight, **options)

    return _Quantity(plain, matched, first, variance)


def _reward(settings: ProbeSettings, scores: ProbeScores, rewards: Tensor, error_bar: dict[str, Any]) -> _Quantity:
    """With a critic of its own where the entropy has one; never ``gae``, whose bias would be another."""
    matched = first = first_order_delta_reward(scores.base, scores.tangent, rewards, **error_bar)
    baseline = reward_baseline(
        "critic" if settings.needs_features else settings.baseline,
        scores.base,
        rewards,
        features=scores.features,
        clusters=scores.clusters,
    )
    if baseline is not None:
        first = first_order_delta_reward(scores.base, scores.tangent, rewards, baseline=baseline, **error_bar)

    def plain(shifted: TokenStats) -> EntropyChange:
        return snis_delta_reward(scores.base, shifted, rewards, clip_log_weight=settings.clip_log_weight, **error_bar)

    return _Quantity(plain, matched, first, 0.0)


def _counterfactuals(
    scores: ProbeScores, entropy: _Quantity, reward: _Quantity | None, taken: TokenStats | None
) -> dict[str, Counterfactual]:
    """Steps of other losses beside the one taken: the same estimator for both, so that they share their noise."""

    def against_taken(quantity: _Quantity, stats: TokenStats) -> tuple[EntropyChange, EntropyChange | None]:
        change = quantity.plain(stats)
        if taken is None:
            return change, None
        return change, change - quantity.plain(taken)

    found = {}
    for name, scored in scores.counterfactuals.items():
        true, difference = against_taken(entropy, scored.stats)
        reward_true, reward_difference = (None, None) if reward is None else against_taken(reward, scored.stats)
        found[name] = Counterfactual(
            true, difference, reward_true, reward_difference, scored.update_norm, scored.cosine
        )
    return found


def _fit_variance(settings: ProbeSettings, scores: ProbeScores, baseline: Tensor, options: dict[str, Any]) -> float:
    """Variance of δH₁ per unit η that its influences leave out: the noise of gae's critic, which moves it.

    Two jackknives over the same groups, with the critic fitted anew and with its baseline as it is: their own noise,
    which a comparison with the influences would take for the critic's, cancels.
    """
    if settings.baseline != "gae" or settings.gae_lambda == 1 or not settings.jackknife_groups:
        return 0.0

    def variance(anew: bool) -> float:
        def estimate(rows: Tensor) -> float:
            part = scores.select(rows)
            subtracted = baseline_of(settings, part) if anew else baseline[rows]
            of_part = {**options, "clusters": part.clusters, "baseline": subtracted}
            return first_order_delta_entropy(part.base, part.tangent, **of_part).value

        groups = settings.jackknife_groups
        return jackknife_standard_error(estimate, len(scores), clusters=scores.clusters, groups=groups) ** 2

    return max(variance(anew=True) - variance(anew=False), 0.0)


def _less_certain(estimate: EntropyChange, variance: float) -> EntropyChange:
    """The estimate with a variance its influences do not hold."""
    return estimate.with_stderr(math.hypot(estimate.stderr, math.sqrt(variance))) if variance else estimate


def _pairs(sweep: list[SweepPoint]) -> list[tuple[float, EntropyChange, EntropyChange]]:
    """Every η > 0 with the changes at η and at −η, where the sweep holds both."""
    at = {point.eta: point.true for point in sweep}
    return [(eta, at[eta], at[-eta]) for eta in at if eta > 0 and -eta in at]
