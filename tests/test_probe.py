"""The engine: what it reports is what its parts say, and it is true."""

from __future__ import annotations

import json
import math

import pytest
import torch
from enumeration import LENGTH, PROMPTS, Enumeration

from entropy_pl import EntropyProbe, Rollout, UpdateVector, token_stats
from entropy_pl.estimators import first_order_delta_entropy, snis_delta_entropy
from entropy_pl.policy import micro_batches
from entropy_pl.policy.logits import NonFiniteError
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import prompt_clusters

N = 3000


@pytest.fixture(scope="module")
def enumeration() -> Enumeration:
    return Enumeration.make(seed=1)


@pytest.fixture(scope="module")
def rollout(enumeration: Enumeration) -> Rollout:
    """An E-batch really sampled from the policy that can be enumerated: four tokens, of which the second is EOS."""
    ids = dict(zip("ABCD", range(4), strict=True))

    class FourTokens:
        pad_token_id, eos_token_id, bos_token_id, padding_side = None, 1, None, "left"

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ids[c] for c in text] for text in texts]}

    prompts = ["".join("ABCD"[i] for i in prompt) for prompt in PROMPTS]
    with isolated_rng(3):
        return sample_completions(
            enumeration.model, FourTokens(), prompts, num_completions=N // 2, max_new_tokens=LENGTH, batch_size=N
        )


def update_of(enumeration: Enumeration, lr: float) -> UpdateVector:
    return UpdateVector(enumeration.update.direction, lr)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_sampled_and_measured_it_is_the_enumerated_truth(enumeration, rollout, precision):
    """Sampler, scorer, tangents, reducer and sweep in one: within z < 4 of exact H, ΔH(η) and ⟨∇H, v⟩ at N = 3,000."""
    lr = 0.1
    # The two prompts are all there are, so completions are independent given them: every sequence its own cluster.
    result = EntropyProbe(precision=precision).measure(
        enumeration.model, rollout, update_of(enumeration, lr), clusters=torch.arange(N)
    )
    before = enumeration.exact_entropy("per_token")
    assert abs(result.entropy.value - before) < 4 * result.entropy.stderr
    assert abs(result.first_order.value - enumeration.exact_slope("per_token")) < 4 * result.first_order.stderr
    assert [point.eta for point in result.sweep] == pytest.approx([0.05, 0.1, 0.2])
    for point in result.sweep:
        exact = enumeration.exact_entropy("per_token", point.eta) - before
        assert abs(point.true.value - exact) < 4 * point.true.stderr
        assert abs(exact) > 4 * point.true.stderr, "zero must be told apart from the truth"


def test_parts_agree_with_the_whole(enumeration, rollout):
    options = {"normalize": "per_sequence", "weighting": "sequence", "integrand": "surprisal"}
    part = rollout.select(torch.arange(0, N, 50))
    update = update_of(enumeration, 0.1)
    probe = EntropyProbe(etas=[0.03], eta_multipliers=(), precision="float64", **options)
    result = probe.measure(enumeration.model, part, update)
    with float64_evaluation(enumeration.model):
        base, tangent = token_stats_jvp(enumeration.model, part, update)
        shifted = token_stats(enumeration.model, part, update=update, eta=0.03)
    clusters = prompt_clusters(part)
    expected = snis_delta_entropy(base, shifted, clusters=clusters, **options)
    slope = first_order_delta_entropy(base, tangent, clusters=clusters, **options)
    assert [point.eta for point in result.sweep] == [0.03, 0.1]
    assert result.sweep[0].true.to_dict() == expected.to_dict()
    assert result.first_order.to_dict() == slope.to_dict()
    assert result.method == "forward_mode"
    assert result.eta_star == pytest.approx(2 * abs(slope.value) / abs(result.second_order.value))


def test_the_temperature_is_the_rollouts(enumeration, rollout):
    part, update = rollout.select(torch.arange(0, N, 50)), update_of(enumeration, 0.1)
    found = EntropyProbe().measure(enumeration.model, part.at_temperature(0.5), update)
    said = EntropyProbe(temperature=0.5).measure(enumeration.model, part, update)  # of a rollout that does not say
    stats = token_stats(enumeration.model, part, temperature=0.5)
    assert found.entropy.value == said.entropy.value == pytest.approx(float(stats.entropy.sum() / stats.mask.sum()))
    assert found.to_dict()["temperature"] == said.to_dict()["temperature"] == 0.5
    with pytest.raises(ValueError, match=r"drawn at the probe's temperature, 0\.7, got one drawn at 0\.5"):
        EntropyProbe(temperature=0.7).measure(enumeration.model, part.at_temperature(0.5), update)


def test_eta_star_is_where_the_parabola_doubles_the_line(enumeration, rollout):
    """At η*, |½ v'∇²Hv η²| = |⟨∇H, v⟩ η|."""
    result = EntropyProbe().measure(enumeration.model, rollout, update_of(enumeration, 0.1))
    eta = result.eta_star
    assert abs(result.second_order.value) * eta**2 / 2 == pytest.approx(abs(result.first_order.value) * eta)


@pytest.mark.parametrize("method", ["forward_mode", "central_difference"])
def test_passes_are_announced_in_forward_mode_too(enumeration, rollout, method):
    passes: list[str] = []
    probe, update = EntropyProbe(method=method, precision="float64"), update_of(enumeration, 0.1)
    probe.measure(enumeration.model, rollout.select(torch.arange(0, N, 50)), update, on_pass=passes.append)
    assert len(passes) == probe.passes(update.lr)


def test_float32_and_float64_agree_to_the_error_of_float32(enumeration, rollout):
    part, update = rollout.select(torch.arange(0, N, 12)), update_of(enumeration, 0.1)
    single, double = (
        EntropyProbe(precision=precision).measure(enumeration.model, part, update)
        for precision in ("float32", "float64")
    )
    assert (single.method, double.method) == ("central_difference", "forward_mode")
    # 1e-7 of a log-prob against changes of 0.1; the difference's own h² adds 1e-3
    assert single.first_order.value == pytest.approx(double.first_order.value, rel=5e-3)
    assert single.taken.true.value == pytest.approx(double.taken.true.value, rel=1e-4)


def test_one_line_of_json_holds_it(enumeration, rollout):
    result = EntropyProbe().measure(enumeration.model, rollout, update_of(enumeration, 0.1))
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["sweep"][1]["taken"] is True
    assert record["sweep"][1]["true"]["value"] == result.taken.true.value
    assert set(record["seconds"]) == {"tangents", "check", "sweep"}


def test_every_pass_is_announced(enumeration, rollout):
    passes: list[str] = []
    probe, update = EntropyProbe(etas=[0.01]), update_of(enumeration, 0.1)
    probe.measure(enumeration.model, rollout.select(torch.arange(0, N, 50)), update, on_pass=passes.append)
    assert passes == ["tangents"] * 3 + ["sweep"] * 4  # θ, +h, −h, then 0.01, 0.05, 0.1, 0.2
    assert len(passes) == probe.passes(update.lr)


def test_equal_prompts_share_a_cluster(rollout):
    clusters = prompt_clusters(rollout)
    assert clusters is not None
    assert len(clusters.unique()) == 2
    assert prompt_clusters(rollout.select(torch.tensor([0, N - 1]))) is None


def test_model_is_left_as_it_was(enumeration, rollout):
    model = enumeration.model
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    model.train()
    state = torch.get_rng_state()
    EntropyProbe(precision="float64").measure(
        model, rollout.select(torch.arange(0, N, 400)), update_of(enumeration, 0.1)
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


def test_step_into_nowhere_is_an_error_and_leaves_theta(enumeration, rollout):
    before = {name: p.detach().clone() for name, p in enumeration.model.named_parameters()}
    with pytest.raises(NonFiniteError, match="NaN or infinity at"):
        EntropyProbe(etas=[1e38]).measure(enumeration.model, rollout, update_of(enumeration, 0.1))
    assert all(torch.equal(p, before[name]) for name, p in enumeration.model.named_parameters())


def test_all_passes_have_the_same_micro_batches(enumeration, rollout, monkeypatch):
    """Though less memory is free at every look: rounding that two passes share cancels between them."""
    looks = iter(range(1000))
    monkeypatch.setattr(micro_batches, "_free_bytes", lambda device: 2 ** (24 - next(looks)))
    grouped, budgets = micro_batches.micro_batches, []
    monkeypatch.setattr(
        micro_batches,
        "micro_batches",
        lambda rows, budget, *more: budgets.append(budget) or grouped(rows, budget, *more),
    )
    result = EntropyProbe(precision="float32").measure(enumeration.model, rollout, update_of(enumeration, 0.1))
    assert len(budgets) > 3 + len(result.sweep)  # and the trials of the difference step
    assert len(set(budgets)) == 1
    assert next(looks) == 1  # one look


def test_no_learning_rate_no_step_taken(enumeration, rollout):
    result = EntropyProbe(etas=[0.1]).measure(
        enumeration.model, rollout.select(torch.arange(0, N, 100)), update_of(enumeration, 0.0)
    )
    assert [point.eta for point in result.sweep] == [0.1]
    with pytest.raises(LookupError, match="no step really taken"):
        _ = result.taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"etas": [math.nan]}, "every number in etas finite and not 0, got nan"),
        ({"eta_multipliers": [0]}, "every number in eta_multipliers finite and not 0"),
        ({"temperature": -1.0}, "temperature above 0"),
        ({"precision": "bf16"}, "precision to be one of .*, got 'bf16'"),
        ({"weighting": "none"}, "weighting"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EntropyProbe(**options)
