"""Importance weights that collapse: the estimate says so, at which η, and it is right to say so."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from chain import Chain
from enumeration import Enumeration
from foreign import LR, ForeignModule, fit, probe

from entropy_pl import EntropyProbe, TokenStats
from entropy_pl.estimators import linear_combination, snis_delta_entropy
from entropy_pl.reporting import read_records

LENGTHS = (0.2, 0.8)  # η of the enumerated policy: an ESS of 74 % and of 51 % of N were all drawn evenly
COLLAPSED = 1.7  # 9 %


def weighed(weights: list[float]) -> tuple[TokenStats, TokenStats]:
    """Completions of one token with these importance weights."""
    mask = torch.ones(len(weights), 1, dtype=torch.bool)
    zero = torch.zeros(len(weights), 1, dtype=torch.float64)
    return TokenStats(zero, zero + 1, mask), TokenStats(
        torch.tensor(weights, dtype=torch.float64).log()[:, None], zero + 1, mask
    )


@pytest.mark.parametrize(("heavy", "trustworthy"), [(80, True), (50, True), (49, False), (1, False)])
def test_half_of_the_sequences_is_the_limit(heavy, trustworthy):
    """Of 100 completions so many share all the weight: that is their effective sample size."""
    estimate = snis_delta_entropy(*weighed([100 / heavy] * heavy + [1e-300] * (100 - heavy)))
    assert estimate.ess_min == pytest.approx(heavy)
    assert estimate.trustworthy is estimate.to_dict()["trustworthy"] is trustworthy
    assert bool(estimate.collapsed) is not trustworthy


def test_what_is_made_of_it_is_as_little_to_be_trusted():
    good, bad = (snis_delta_entropy(*weighed([100 / n] * n + [1e-300] * (100 - n))) for n in (100, 1))
    assert not bad.scaled(2.0).trustworthy
    assert not linear_combination([(1.0, good), (-1.0, bad)]).trustworthy
    assert linear_combination([(1.0, good), (-1.0, good)]).trustworthy


@pytest.fixture(scope="module")
def enumeration() -> Enumeration:
    return Enumeration.make(seed=1)


@pytest.fixture(scope="module")
def rows(enumeration) -> torch.Tensor:
    """256 completions of the enumerated policy, by their exact probabilities."""
    p = enumeration.probabilities().numpy()
    return torch.from_numpy(np.random.default_rng(5).choice(len(p), 256, p=p / p.sum()))


def measured(enumeration, rows, etas):
    settings = {"etas": etas, "eta_multipliers": (), "at_lr": False, "precision": "float64"}
    rollout = enumeration.rollout.select(rows)
    return EntropyProbe(**settings).measure(enumeration.model, rollout, enumeration.update, clusters=torch.arange(256))


def test_a_sweep_says_from_where(enumeration, rows):
    result = measured(enumeration, rows, [-COLLAPSED, 0.1, 0.2, COLLAPSED])
    assert [point.true.trustworthy for point in result.sweep] == [False, True, True, False]
    assert result.untrustworthy_from == COLLAPSED
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["untrustworthy_from"] == COLLAPSED
    assert [point["true"]["trustworthy"] for point in record["sweep"]] == [False, True, True, False]
    assert all(point["first_order"]["trustworthy"] for point in record["sweep"])  # a derivative at θ has no weights
    [warning] = record["warnings"]
    assert f"must not be used at η = {COLLAPSED}" in warning
    advised = float(re.search(r"Below η = ([\d.e-]+)", warning)[1])
    assert 0.2 < advised < COLLAPSED
    closer = measured(enumeration, rows, [advised]).sweep[0].true
    assert 0.35 * 256 < closer.ess < 0.75 * 256  # about half: weights are log-normal only nearly


@pytest.mark.parametrize("eta", [30.0, 1e4])
def test_a_step_far_too_long_is_answered_with_one_that_would_do(enumeration, rows, eta):
    """However far: an effective sample size of one sequence says nothing of how far."""
    [warning] = measured(enumeration, rows, [eta]).warnings
    assert 0.2 < float(re.search(r"Below η = ([\d.e-]+)", warning)[1]) < COLLAPSED


def test_a_sweep_without_collapse_says_nothing(enumeration, rows):
    result = measured(enumeration, rows, [0.1, 0.2])
    assert result.untrustworthy_from is None
    assert not result.warnings
    assert result.to_dict()["untrustworthy_from"] is None


def test_a_run_records_it_and_goes_on(tmp_path, capsys):
    """A sweep to 30 times the learning rate of a step of size 1e-2 per number: the step itself is measured well."""
    options = {"num_sequences": 64, "completions_per_prompt": 4}  # enough to be believed
    callback = probe(eta_multipliers=(30,), every_n_steps=3, **options)
    module, plain = ForeignModule(), ForeignModule()
    trainer = fit(module, tmp_path / "probed", callback)
    fit(plain, tmp_path / "plain")
    assert trainer.global_step == 6
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    [path] = tmp_path.rglob("records.jsonl")
    still, moved = read_records(path)
    assert (still["status"], moved["status"]) == ("no_movement", "ok")
    assert moved["untrustworthy_from"] == pytest.approx(30 * LR)
    assert any("ΔH must not be used" in warning for warning in moved["warnings"])
    assert moved["message"] is None
    assert [point["true"]["trustworthy"] for point in moved["sweep"]] == [True, False]
    shown = capsys.readouterr().out
    assert "not to be trusted" not in shown  # the table shows the step taken, which is
    assert "caution  (step 3) ΔH must not be used" in shown


# ---------------------------------------------------------------------------- is it right? against exact answers


def draws_of(chain: Chain, eta: float, count: int, seed: int):
    rng = np.random.default_rng(seed)
    while True:
        drawn = chain.draw(count, rng)
        yield chain.scored(*drawn, 0.0), chain.scored(*drawn, eta)


def test_the_chain_is_exact():
    """Its carried distribution against the mean over 20,000 completions drawn from it: z < 4."""
    chain = Chain.make(0)
    drawn = chain.draw(20_000, np.random.default_rng(0))
    entropy, mask = chain.scored(*drawn, 0.0).entropy.numpy(), drawn[2]
    total = entropy.sum(1)
    assert abs(total.mean() - chain.entropy("per_sequence", 0.0)) < 4 * total.std() / math.sqrt(20_000)
    per_token = chain.entropy("per_sequence", 0.0) / chain.entropy("per_token", 0.0)
    assert abs(mask.sum(1).mean() - per_token) < 4 * mask.sum(1).std() / math.sqrt(20_000)


def mean_is_off(base: TokenStats, shifted: TokenStats) -> bool:
    """Whether the mean importance weight is more than 2.5 standard errors from 1, which it should be."""
    weight = (shifted.logp - base.logp).sum(1).exp()
    return abs(float(weight.mean()) - 1) > 2.5 * float(weight.std()) / math.sqrt(len(weight))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalize", "weighting", "count", "least"),
    [
        ("per_token", "prefix", 256, 0.925),
        ("per_sequence", "prefix", 256, 0.925),
        ("per_token", "sequence", 256, 0.925),
        ("per_sequence", "sequence", 256, 0.89),  # heavy weights that were not drawn: see below
        ("per_token", "prefix", 64, 0.925),
        ("per_sequence", "prefix", 64, 0.925),
    ],
)
def test_what_is_trusted_is_covered_and_what_is_not_is_not(normalize, weighting, count, least):
    """Eight random chains at five step sizes each, 100 batches: 4,000 intervals, on both sides of the limit."""
    found = []  # of every batch: interval held the truth, trustworthy, mean weight off, at the largest step
    for seed in range(8):
        chain = Chain.make(seed)
        for eta in (0.1, 0.2, 0.3, 0.5, 1.0):
            exact = chain.entropy(normalize, eta) - chain.entropy(normalize, 0.0)
            draws = draws_of(chain, eta, count, seed=100 * seed + round(10 * eta))
            for _ in range(100):
                base, shifted = next(draws)
                estimate = snis_delta_entropy(base, shifted, normalize=normalize, weighting=weighting)
                held = estimate.ci_low <= exact <= estimate.ci_high
                found.append((held, estimate.trustworthy, mean_is_off(base, shifted), eta == 1.0))
    held, trusted, off, far = map(np.array, zip(*found, strict=True))
    assert 0.3 < trusted.mean() < 0.7
    assert held[trusted].mean() >= least
    assert held[~trusted].mean() < held[trusted].mean() - 0.05
    assert not trusted[far].any()
    assert held[far].mean() < 0.8
    if (normalize, weighting) == ("per_sequence", "sequence"):
        assert held[trusted & off].mean() < 0.6
        assert held[trusted & ~off].mean() >= 0.91
