"""Prompts that repeat: their completions are no independent evidence, and the error bars know it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import build_model

from entropy_pl import EntropyProbe, Rollout, TokenStats, UpdateVector, token_stats
from entropy_pl.estimators import snis_delta_entropy

PROMPTS, EACH = 9, 4
N = PROMPTS * EACH


def sandwich(influence: np.ndarray, labels: list[int]) -> float:
    """The cluster-robust standard error of a mean, written out: sums within clusters, then their squares."""
    total: dict[int, float] = {}
    for psi, label in zip(influence, labels, strict=True):
        total[label] = total.get(label, 0.0) + psi
    count = len(total)
    return math.sqrt(count / (count - 1) * sum(s**2 for s in total.values())) / len(influence)


def influences(base: TokenStats, shifted: TokenStats) -> np.ndarray:
    """Of ΔH per sequence by classical importance sampling: ψ_i = w_i (H_i(η) − Ĥ(η))/w̄ − (H_i − Ĥ), in loops."""
    weights = [
        math.exp(sum(a - b for a, b in zip(s, t, strict=True))) for s, t in zip(shifted.logp, base.logp, strict=True)
    ]
    after, before = ([float(h.sum()) for h in stats.entropy] for stats in (shifted, base))
    mean = sum(weights) / len(weights)
    moved = sum(w * h for w, h in zip(weights, after, strict=True)) / sum(weights)
    still = sum(before) / len(before)
    return np.array([w * (a - moved) / mean - (b - still) for w, a, b in zip(weights, after, before, strict=True)])


def correlated(share: float) -> tuple[TokenStats, TokenStats, list[int]]:
    """Statistics of which a share is the prompt's and the rest the completion's, prompt by prompt in a mixed order."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randperm(N, generator=generator) % PROMPTS

    def draw(scale: float) -> torch.Tensor:
        of_prompt = torch.randn(PROMPTS, 3, generator=generator, dtype=torch.float64)[labels]
        own = torch.randn(N, 3, generator=generator, dtype=torch.float64)
        return scale * (math.sqrt(share) * of_prompt + math.sqrt(1 - share) * own)

    mask = torch.ones(N, 3, dtype=torch.bool)
    base = TokenStats(-draw(1.0).abs(), draw(1.0).abs(), mask)
    return base, TokenStats(base.logp + draw(0.1), base.entropy + draw(0.1), mask), labels.tolist()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_error_bar_is_the_cluster_sandwich(share):
    base, shifted, labels = correlated(share)
    options = {"normalize": "per_sequence", "weighting": "sequence"}
    estimate = snis_delta_entropy(base, shifted, clusters=torch.tensor(labels), **options)
    psi = influences(base, shifted)
    assert estimate.stderr == pytest.approx(sandwich(psi, labels), rel=1e-10)
    apart = snis_delta_entropy(base, shifted, **options)
    assert apart.stderr == pytest.approx(sandwich(psi, list(range(N))), rel=1e-10)
    assert apart.value == estimate.value
    if share == 1:  # completions that say the same: N is the number of prompts, √4 times the error
        assert estimate.stderr == pytest.approx(2 * apart.stderr, rel=0.1)  # C/(C−1) against N/(N−1): 1.046
    if share == 0.5:
        assert estimate.stderr > 1.2 * apart.stderr


def test_a_probe_finds_the_repeated_prompts_by_itself():
    """Six prompts of different lengths, each twice with the same completion, scattered: as if it had been told."""
    model, generator = build_model(), torch.Generator().manual_seed(2)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 5, 3, 0, 1, 4, 2])
    prompts = torch.randint(4, 40, (6, 4), generator=generator)[rows]
    prompt_mask = (torch.arange(4) >= torch.tensor([0, 1, 2, 0, 1, 2])[:, None])[rows]
    completions, mask = torch.randint(4, 40, (6, 3), generator=generator)[rows], torch.ones(12, 3, dtype=torch.bool)
    rollout = Rollout(prompts, prompt_mask, completions, mask)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }
    update = UpdateVector(direction, lr=1e-2)
    probe = EntropyProbe(eta_multipliers=(), normalize="per_sequence", weighting="sequence")
    result = probe.measure(model, rollout, update)
    base, shifted = (token_stats(model, rollout, update=update, eta=eta) for eta in (0.0, 1e-2))
    psi = influences(base, shifted)
    # the two scorings group their micro-batches differently: float32's rounding of log-probs
    assert result.taken.true.stderr == pytest.approx(sandwich(psi, rows.tolist()), rel=1e-3)
    once = math.sqrt(6 / 5 * 2 / (12 / 11))  # of pairs that say the same: half the evidence, and fewer to tell it by
    assert sandwich(psi, rows.tolist()) == pytest.approx(once * sandwich(psi, list(range(12))), rel=1e-3)
