"""Baselines on arrays: each against loops over sequences, positions and folds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from samples import INTEGRAND, OPTIONS, N, T, ragged

from entropy_pl.estimators import score_baseline, score_return
from entropy_pl.estimators.critic import gae_baseline, prefix_columns
from entropy_pl.rollout import TokenStats

PROMPTS = torch.from_numpy(np.random.default_rng(4).permutation(np.arange(N) % 13))  # 13 prompts, 2 or 3 times each


def features(base: TokenStats, width: int = 3) -> torch.Tensor:
    return torch.randn(int(base.mask.sum()), width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
@pytest.mark.parametrize(("clusters", "folds"), [(None, 5), (PROMPTS, 4), (PROMPTS, 99)])
def test_position_is_the_mean_of_the_living_in_other_folds(normalize, weighting, integrand, clusters, folds):
    base, _ = ragged()
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    returns, m = score_return(base, **options).numpy(), base.mask.numpy()
    labels = range(N) if clusters is None else clusters.tolist()
    fold = [sorted(set(labels)).index(c) % min(folds, len(set(labels))) for c in labels]
    expected = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for k in range(T):
            at = k
            while not (living := [j for j in range(N) if fold[j] != fold[i] and m[j, at]]):
                at -= 1
            expected[i, k] = m[i, k] * (sum(returns[j, at] for j in living) / len(living) - (integrand == "surprisal"))
    found = score_baseline("position", base, clusters=clusters, folds=folds, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_position_falls_back_where_nobody_else_lives():
    """Two sequences, of 2 and 1 tokens: at k = 1 the longer is alone, and gets the other's mean at k = 0."""
    mask = torch.tensor([[True, True], [True, False]])
    base = TokenStats(-0.5 * mask.double(), mask * torch.tensor([[1.0, 2.0], [4.0, 0.0]]), mask)
    found = score_baseline("position", base, normalize="per_sequence", weighting="sequence")
    assert found.tolist() == [[4.0, 4.0], [3.0, 0.0]]


@pytest.mark.parametrize("integrand", INTEGRAND)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_its_definition_in_loops(integrand, gae_lambda):
    """A_k = Σ_l λ^l δ_{k+l}, δ_k = r_k + W_{k+1} − W_k, r_k written out for either integrand."""
    base, _ = ragged()
    values = torch.randn(N, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    returns = score_return(base, integrand=integrand)
    m, h, s, w = (x.double().numpy() for x in (base.mask, base.entropy, base.logp, values * base.mask))
    centre = ((h if integrand == "rao_blackwell" else -s) * m).sum() / m.sum()
    advantage = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for k in range(int(m[i].sum())):
            for at in range(k, T):
                following = m[i, at + 1] if at + 1 < T else 0.0
                if integrand == "rao_blackwell":
                    reward = following * (h[i, at + 1] - centre) if following else 0.0
                else:
                    reward = -s[i, at] - centre * following
                delta = reward + (w[i, at + 1] if following else 0.0) - w[i, at]
                advantage[i, k] += m[i, at] * gae_lambda ** (at - k) * delta
    found = returns - gae_baseline(returns, values, base.mask, gae_lambda)
    torch.testing.assert_close(found, advantage, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_gae_one_is_the_critic(normalize, weighting, integrand):
    base, _ = ragged()
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand, "features": features(base)}
    critic = score_baseline("critic", base, **options)
    assert torch.equal(score_baseline("gae", base, gae_lambda=1.0, **options), critic)
    assert not torch.isclose(score_baseline("gae", base, gae_lambda=0.5, **options), critic)[base.mask].all()


@pytest.mark.parametrize("kind", ["position", "critic", "gae"])
def test_baselines_are_zero_behind_the_mask(kind):
    base, _ = ragged()
    dirty = TokenStats(base.logp.masked_fill(~base.mask, 7.0), base.entropy.masked_fill(~base.mask, 9.0), base.mask)
    clean = score_baseline(kind, base, features=features(base))
    assert not clean[~base.mask].any()
    assert clean[base.mask].any()
    assert torch.equal(score_baseline(kind, dirty, features=features(base)), clean)


@pytest.mark.parametrize(("weighting", "integrand"), itertools.product(("prefix", "sequence"), INTEGRAND))
def test_a_critic_sees_neither_its_own_prompt_nor_the_future(weighting, integrand):
    """Another last token for the sequences of one prompt: what is predicted before it stays, for other prompts not."""
    base, _ = ragged()
    options = {"normalize": "per_sequence", "weighting": weighting, "integrand": integrand}
    options |= {"features": features(base), "clusters": PROMPTS}
    own = PROMPTS == 3
    last = base.mask & ~torch.nn.functional.pad(base.mask, (0, 1))[:, 1:]
    moved = 3.0 * (last & own[:, None])
    other = TokenStats(base.logp - moved, base.entropy + moved, base.mask)
    before, after = (score_baseline("critic", stats, **options) for stats in (base, other))
    earlier = base.mask & ~last & own[:, None]
    assert earlier.any()
    torch.testing.assert_close(before[earlier], after[earlier], rtol=0, atol=1e-12)  # rounding of what is behind
    same_fold = (PROMPTS % 5 == 3)[:, None] & base.mask
    assert not torch.isclose(before, after)[base.mask & ~same_fold].any()


def test_sequence_weighting_knows_the_past():
    """Σ_{j≤k} c_ij is fixed by the prefix: what is left to predict is the return to go."""
    base, _ = ragged()
    returns = [score_return(base, weighting=weighting) for weighting in ("sequence", "prefix")]
    critic = [score_baseline("critic", base, weighting=w, features=features(base)) for w in ("sequence", "prefix")]
    torch.testing.assert_close(returns[0] - critic[0], returns[1] - critic[1])


def test_a_critic_finds_what_its_features_hold():
    """Features that hold the return itself leave nothing of it."""
    base, _ = ragged()
    returns = score_return(base)
    telling = torch.cat([features(base), 10 + 1e-3 * returns[base.mask][:, None]], 1)
    error = (returns - score_baseline("critic", base, features=telling))[base.mask]
    assert float(error.square().mean()) < 1e-6 * float(returns[base.mask].var())


def test_prefix_columns_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    base = TokenStats(-mask.double(), mask * torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]]), mask)
    assert prefix_columns(base).tolist() == [[0, 0, 1, 0], [1, 1, 2, 1], [2, 4, 4, 3], [0, 0, 3, 0]]


def test_no_baseline_is_none():
    assert score_baseline("none", ragged()[0]) is None


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("mean", {}, "baseline among .*'position', 'critic', 'gae'.* got 'mean'"),
        ("critic", {}, r"features \[\d+, d\] for the baseline 'critic', got none"),
        ("gae", {"features": torch.zeros(3, 2)}, r"one row per completion token, got \[3, 2\]"),
        ("critic", {"features": torch.full((int(ragged()[0].mask.sum()), 1), float("nan"))}, "finite features"),
        ("gae", {"gae_lambda": 1.5}, "gae_lambda between 0 and 1, got 1.5"),
        ("position", {"folds": 1}, "at least 2 folds and 2 clusters, got 1 and 37"),
        ("position", {"clusters": [0] * N}, "at least 2 folds and 2 clusters, got 5 and 1"),
        ("position", {"clusters": [0, 1]}, r"clusters of shape \[37\]"),
        ("position", {"integrand": "renyi"}, "integrand .*rao_blackwell"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, message):
    base, _ = ragged()
    with pytest.raises(ValueError, match=message):
        score_baseline(kind, base, **arguments)
