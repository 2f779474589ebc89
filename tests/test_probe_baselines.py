"""Less noise in ΔH and δH₁, from the same passes: what the probe makes of a baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import build_model, build_tokenizer

from entropy_pl import EntropyProbe, UpdateVector
from entropy_pl.estimators import first_order_delta_entropy, score_baseline
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.probe import ProbeScores

ETA = 1e-3


@pytest.fixture(scope="module")
def scored() -> tuple[ProbeScores, UpdateVector]:
    """160 completions of 80 prompts, scored along a random direction, with features for a critic."""
    model, tokenizer = build_model(seed=2, logit_scale=3.0), build_tokenizer()
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
    update = UpdateVector(direction, lr=ETA)
    with isolated_rng(1):
        rollout = sample_completions(
            model, tokenizer, [f"what is {i}?" for i in range(80)], num_completions=2, max_new_tokens=40
        )
    probe = EntropyProbe(baseline="critic", eta_multipliers=(), symmetric=True)
    return probe.collect(model, rollout, update), update


def reduced(scored, **options):
    scores, update = scored
    return EntropyProbe(**options).reduce(scores, update)


@pytest.mark.parametrize("baseline", ["position", "critic", "gae"])
def test_the_pair_still_differs_by_curvature_alone(scored, baseline):
    """ΔH − η·δH₁ is the same number whatever is subtracted from both: 1e-9 of ΔH, float64 arithmetic on sums."""
    plain, other = reduced(scored), reduced(scored, baseline=baseline)
    assert other.first_order.value != plain.first_order.value
    for point, reference in zip(other.sweep, plain.sweep, strict=True):
        assert point.true.value - point.first_order.value == pytest.approx(
            reference.true.value - reference.first_order.value, abs=1e-9 * abs(reference.true.value)
        )


def test_gae_carries_the_noise_of_its_critic(scored):
    """Its variance is the influences' and what leaving groups out adds once the critic is fitted anew, in a loop."""
    scores, _ = scored
    options = {"baseline": "gae", "gae_lambda": 0.95}
    plain = reduced(scored, **options, jackknife_groups=0)
    honest = reduced(scored, **options, jackknife_groups=16)
    features = {"features": scores.features, "gae_lambda": 0.95, "clusters": scores.clusters}
    kept = score_baseline("gae", scores.base, **features)
    group = scores.clusters % 16

    def first_order(rows, baseline):
        return first_order_delta_entropy(
            scores.base.select(rows), scores.tangent.select(rows), baseline=baseline, clusters=scores.clusters[rows]
        ).value

    anew, fixed = [], []
    for j in range(16):
        rows = (group != j).nonzero()[:, 0]
        part = scores.select(rows)
        refitted = score_baseline(
            "gae", part.base, features=part.features, gae_lambda=0.95, clusters=scores.clusters[rows]
        )
        anew.append(first_order(rows, refitted))
        fixed.append(first_order(rows, kept[rows]))
    # the textbook's jackknife, groups being of one size: (g − 1)/g Σ (θ_j − mean)²
    added = 15 * (np.var(anew) - np.var(fixed))
    assert added > 0, "nothing to be honest about"
    assert honest.first_order.value == plain.first_order.value
    assert honest.first_order.stderr**2 - plain.first_order.stderr**2 == pytest.approx(float(added), rel=1e-8)
    for point, other in zip(honest.sweep, plain.sweep, strict=True):
        assert point.true.stderr == pytest.approx(
            math.sqrt(other.true.stderr**2 + point.eta**2 * float(added)), rel=1e-8
        )
        widened = point.true.stderr / other.true.stderr
        assert point.true.ci_high - point.true.value == pytest.approx(
            widened * (other.true.ci_high - other.true.value), rel=1e-9
        )


def test_a_critic_without_features_is_refused(scored):
    scores, update = scored
    bare = ProbeScores(scores.base, scores.tangent, scores.curvature, scores.shifted, scores.clusters, None, "", None)
    with pytest.raises(ValueError, match="expected features"):
        EntropyProbe(baseline="critic").reduce(bare, update)


def test_selected_rows_are_as_if_the_others_had_never_been_drawn(scored):
    """Scores of half the prompts against a probe of their rows alone: features, clusters and all."""
    scores, _ = scored
    rows = torch.arange(0, 160, 2)
    part = scores.select(rows)
    assert len(part.features) == int(scores.base.mask[rows].sum())
    owner = scores.base.mask.nonzero()[:, 0]
    assert torch.equal(part.features, scores.features[torch.isin(owner, rows)])
    assert part.clusters.tolist() == scores.clusters[rows].tolist()
