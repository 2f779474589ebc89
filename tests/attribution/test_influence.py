"""Attribution against sums, steps of single tokens, and everything a loss and an optimizer can do to its identity."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from steps import T, direction_of, direction_of_sequence, log_probs, mean_entropy, take_steps

from entropy_pl import token_stats, token_stats_jvp
from entropy_pl.attribution import attribute_update
from entropy_pl.estimators import first_order_delta_entropy, score_baseline, snis_delta_entropy
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.updates import UpdateVector

# float64 all the way; 1e-6 is what is asked for, and the sums have some 1e4 terms of 1e-16 each
EXACT = 1e-6


def attributed(step, **options):
    told = {"token_coefficients": step.coefficients, "gradient_scale": step.scale}
    with float64_evaluation(step.model):
        found = attribute_update(step.model, step.e, step.u, step.update, **(told | options))
    # whatever happens, nothing is dropped: to rounding
    assert found.total + sum(found.remainder.values()) == pytest.approx(found.first_order, rel=1e-12)
    return found


def change_along(step, direction, **options):
    """δH₁ per unit η by forward mode over E."""
    with float64_evaluation(step.model):
        base, tangent = token_stats_jvp(step.model, step.e, direction, temperature=options.pop("temperature", 1.0))
    return first_order_delta_entropy(base, tangent, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "adam_l2", "sgd", "sgd_momentum"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_norm": 0.05, "beta": 0.1}, {"steps": 3, "updates_per_rollout": 3, "beta": 0.1}],
    ids=["plain", "clipped with KL", "third update of a rollout"],
)
def test_the_parts_add_up(loss_type, optimizer, settings):
    """total = momentum + weight decay + Σ tokens = ⟨∇Ĥ, v⟩, and that is the probe's own δH₁."""
    step = take_steps(loss_type=loss_type, optimizer=optimizer, **settings)
    found = attributed(step)
    assert (step.scale < 1) == ("max_norm" in settings)
    assert found.total == pytest.approx(found.momentum + found.weight_decay + float(found.per_token.sum()))
    assert found.total == pytest.approx(found.first_order, rel=EXACT)
    assert found.first_order == pytest.approx(change_along(step, step.update).value, rel=EXACT)
    for part, direction in step.update.components.items():
        expected = change_along(step, UpdateVector(direction, lr=0.0)).value
        assert getattr(found, part) == pytest.approx(expected, rel=EXACT, abs=EXACT * abs(found.first_order))
    assert torch.equal(found.per_token != 0, step.u.completion_mask & (step.coefficients != 0))
    assert torch.equal(found.per_sequence, found.per_token.sum(1))


OPTIONS = [
    {"normalize": n, "weighting": w, "integrand": i}
    for n, w, i in itertools.product(
        ("per_token", "per_sequence"), ("prefix", "sequence"), ("rao_blackwell", "surprisal")
    )
]
IDS = ["-".join(options.values()) for options in OPTIONS]


@pytest.fixture(scope="module")
def clipped():
    """A step with KL whose gradient was clipped by norm, from an older rollout; two of its tokens by ratio."""
    return take_steps(loss_type="dapo", max_norm=0.05, beta=0.1, steps=3, updates_per_rollout=3)


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[-1:], ids=IDS[:1] + IDS[-1:])
@pytest.mark.parametrize("token", [0, 7, -1])
def test_one_token(clipped, token, options):
    """What a token did is the change along the step that its own term of the loss asked for."""
    found = attributed(clipped, **options)
    i, k = clipped.u.completion_mask.nonzero()[token].tolist()
    with float64_evaluation(clipped.model):
        logp = log_probs(clipped.model, clipped.u)
        direction = direction_of(clipped, clipped.loss.term(logp[i, k], i, k))
    assert float(found.per_token[i, k]) == pytest.approx(change_along(clipped, direction, **options).value, rel=EXACT)


@pytest.mark.parametrize("row", [0, 5])
def test_moving_theta_along_one_sequence(clipped, row):
    """ΔH(η) at θ + ηv_u is η δH_u but for curvature, which shrinks as η²."""
    slope = float(attributed(clipped).per_sequence[row])
    with float64_evaluation(clipped.model):
        v = direction_of_sequence(clipped, row)
        base, tangent = token_stats_jvp(clipped.model, clipped.e, v)
        unit = 1e-2 / float(tangent.logp.sum(1).abs().max())  # log weights of 1e-2 at most: there curvature is small
        off = []
        for eta in (unit, unit / 2, unit / 8):
            moved = token_stats(clipped.model, clipped.e, update=v, eta=eta)
            off.append(abs(snis_delta_entropy(base, moved).value - eta * slope) / (eta * abs(slope)))
    assert off[0] < 0.1
    # Relative to the change they halve with η; the next order is 1e-2 of that.
    assert off[1] == pytest.approx(off[0] / 2, rel=0.1)
    assert off[2] == pytest.approx(off[0] / 8, rel=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_whatever_the_coefficients(clipped, temperature):
    """Any ∂L/∂log π at any temperature; here of a single token, whose log-prob is then the loss."""
    i, k = 2, 0
    coefficients = torch.zeros_like(clipped.coefficients)
    coefficients[i, k] = -0.7
    found = attributed(clipped, token_coefficients=coefficients, temperature=temperature)
    with float64_evaluation(clipped.model):
        ids = torch.cat([clipped.u.prompt_ids, clipped.u.completion_ids], 1)
        logits = clipped.model(input_ids=ids).logits[i, clipped.u.prompt_ids.shape[1] - 1 + k]
        direction = direction_of(clipped, -0.7 * (logits / temperature).log_softmax(-1)[clipped.u.completion_ids[i, k]])
    expected = change_along(clipped, direction, temperature=temperature).value
    assert found.tokens == pytest.approx(expected, rel=EXACT)
    assert found.first_order == pytest.approx(
        change_along(clipped, clipped.update, temperature=temperature).value, rel=EXACT
    )


@pytest.mark.parametrize("baseline", ["none", "position", "critic"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_every_estimate(clipped, options, baseline):
    with float64_evaluation(clipped.model):
        base, tangent = token_stats_jvp(clipped.model, clipped.e, clipped.update)
    features = torch.randn(int(base.mask.sum()), 3, generator=torch.Generator().manual_seed(8))
    values = score_baseline(baseline, base, features=features, **options)
    found = attributed(clipped, base=base, baseline=values, **options)
    expected = first_order_delta_entropy(base, tangent, baseline=values, **options)
    assert found.first_order == pytest.approx(expected.value, rel=EXACT)
    assert found.total == pytest.approx(found.first_order, rel=EXACT)


class TestRemainder:
    def test_an_entropy_bonus(self):
        """Without its coefficients it is of the gradient's remainder, with them an entry of its own: one number."""
        bonus = 0.05
        step = take_steps(entropy_bonus=bonus, max_norm=0.05)
        mask = step.u.completion_mask
        unnamed = attributed(step)
        named = attributed(step, entropy_coefficients=-bonus * mask / mask.sum())
        # The oracle: θ moved along the bonus's own step, both ways.
        with float64_evaluation(step.model):
            v = direction_of(step, -bonus * mean_entropy(step.model, step.u))
            base = token_stats(step.model, step.e)
            eta = 1e-4 / v.norm()
            up, down = (
                snis_delta_entropy(base, token_stats(step.model, step.e, update=v, eta=sign * eta)).value
                for sign in (1, -1)
            )
        expected = (up - down) / (2 * eta)  # off by 1e-8 of the third order, and 1e-16/1e-4 of rounding
        assert abs(expected) > 1e-3 * abs(named.first_order)
        assert named.remainder["entropy_term"] == pytest.approx(expected, rel=1e-5)
        assert unnamed.remainder["gradient"] == pytest.approx(expected, rel=1e-5)
        assert unnamed.remainder["entropy_term"] == 0
        small = EXACT * abs(named.first_order)
        assert named.remainder["gradient"] == pytest.approx(0, abs=small)
        assert named.remainder["update"] == pytest.approx(0, abs=small)
        assert torch.equal(named.per_token, unnamed.per_token)

    def test_clipping_by_value(self):
        """Tokens are told what they asked for; what clipping by value took from them is the remainder."""
        step = take_steps(max_value=0.003)
        found = attributed(step)
        with float64_evaluation(step.model):
            asked = direction_of(step, step.loss.total(log_probs(step.model, step.u)))
        tokens = change_along(step, asked).value
        taken = change_along(step, UpdateVector(step.update.components["gradient"], lr=0.0)).value
        assert abs(taken - tokens) > 0.01 * abs(taken)
        assert found.tokens == pytest.approx(tokens, rel=EXACT)
        assert found.remainder["gradient"] == pytest.approx(taken - tokens, rel=EXACT)

    def test_a_wrong_scale_shows(self, clipped):
        """Nothing is fitted to make the sum come out."""
        right, wrong = attributed(clipped), attributed(clipped, gradient_scale=1.5 * clipped.scale)
        assert wrong.tokens == pytest.approx(1.5 * right.tokens, rel=EXACT)
        assert wrong.remainder["gradient"] == pytest.approx(-0.5 * right.tokens, rel=EXACT)
        assert wrong.first_order == right.first_order
        assert abs(wrong.total - wrong.first_order) > 0.01 * abs(wrong.first_order)

    def test_components_that_do_not_make_the_step(self, clipped):
        """θ was rounded, or moved by something else: what the parts leave of the step."""
        more = {name: 1.01 * value for name, value in clipped.update.direction.items()}
        found = attributed(replace(clipped, update=replace(clipped.update, direction=more)))
        expected = 0.01 * attributed(clipped).first_order
        assert found.remainder["update"] == pytest.approx(expected, rel=EXACT)


def test_central_differences_instead_of_forward_mode(clipped):
    exact, found = attributed(clipped, method="forward_mode"), attributed(clipped, method="central_difference")
    # h²/6 times the third derivative, for log-probs that move by 1e-3; of the largest
    largest = float(exact.per_token.abs().max())
    torch.testing.assert_close(found.per_token, exact.per_token, rtol=0, atol=1e-5 * largest)
    assert found.first_order == exact.first_order  # E's gradient is exact either way
    torch.testing.assert_close(found.stats.logp, exact.stats.logp, rtol=1e-12, atol=1e-12)  # attention kernels differ


@pytest.mark.parametrize("method", ["auto", "forward_mode"])
def test_in_float32(clipped, method):
    exact = attributed(clipped)
    names = {name: p.data for name, p in clipped.model.named_parameters()}
    clipped.model.float()
    found = attribute_update(
        clipped.model,
        clipped.e,
        clipped.u,
        clipped.update,
        token_coefficients=clipped.coefficients,
        gradient_scale=clipped.scale,
        method=method,
    )
    for name, parameter in clipped.model.named_parameters():
        parameter.data = names[name]
    # Differences move log-probs by 0.05, off by 1e-3 at most; float32's gradients are off by 1e-6.
    tolerance = 3e-3 if method == "auto" else 1e-5
    largest = float(exact.per_token.abs().max())
    torch.testing.assert_close(found.per_token, exact.per_token, rtol=0, atol=tolerance * largest)
    for part in ("momentum", "weight_decay", "gradient", "first_order"):
        assert getattr(found, part) == pytest.approx(getattr(exact, part), abs=1e-4 * abs(exact.first_order))
    assert found.total == pytest.approx(found.first_order, rel=10 * tolerance)  # tokens of both signs cancel


@pytest.mark.parametrize("budget", [1, 20])
def test_in_micro_batches(clipped, budget):
    whole, parts = attributed(clipped), attributed(clipped, max_batch_tokens=budget)
    torch.testing.assert_close(parts.per_token, whole.per_token, rtol=1e-9, atol=1e-12)  # roundings
    assert parts.first_order == pytest.approx(whole.first_order, rel=1e-9)


def test_what_is_at_hand_is_not_computed(clipped):
    with float64_evaluation(clipped.model):
        base, tangent = token_stats_jvp(clipped.model, clipped.e, clipped.update)
    alone, given = [], []
    options = {"method": "central_difference"}
    expected = attributed(clipped, on_pass=alone.append, **options)
    found = attributed(clipped, base=base, tangent=tangent, on_pass=given.append, **options)
    # U: θ and both differences; E: the step, its momentum and its weight decay, the tokens, and what is left.
    rest = ["gradient of the loss", "tangents", "tangents"]
    assert alone == ["scoring E", "gradient of H", *["tangents"] * 6, *rest]
    assert given == ["gradient of H", *["tangents"] * 5, *rest]
    torch.testing.assert_close(found.per_token, expected.per_token, rtol=1e-9, atol=1e-12)
    assert found.over_e["first_order"].influence == pytest.approx(
        first_order_delta_entropy(base, tangent).stderr, rel=1e-12
    )
    assert found.over_e["momentum"].influence == pytest.approx(expected.over_e["momentum"].influence, rel=1e-9)


def test_no_pass_for_a_component_that_is_zero():
    passes = []
    found = attributed(take_steps(optimizer="sgd"), on_pass=passes.append)
    # U's, the whole step's, the tokens', and that of what rounding leaves
    assert passes == ["scoring E", "gradient of H", "tangents", "tangents", "gradient of the loss", *["tangents"] * 2]
    assert found.momentum == found.weight_decay == 0
    assert found.over_e["momentum"].influence == found.over_e["weight_decay"].jackknife == 0
    assert found.over_e["gradient"].influence == found.over_e["first_order"].influence


@pytest.mark.parametrize("method", ["forward_mode", "central_difference"])
def test_the_model_is_left_as_it_was(clipped, method):
    model = clipped.model
    model.train()
    model.lm_head.eval()  # modes that differ from part to part
    try:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        modes, random = [module.training for module in model.modules()], torch.get_rng_state()
        attribute_update(
            model, clipped.e, clipped.u, clipped.update, token_coefficients=clipped.coefficients, method=method
        )
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == before[name][0]
            assert torch.equal(parameter, before[name][1])
            assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
    finally:
        model.eval()
        model.zero_grad()


def test_errors_are_named(clipped):
    bare = UpdateVector(clipped.update.direction, lr=1e-3, split_absent="Lion is not of Adam's family")
    with pytest.raises(ValueError, match="update with components and preconditioner, got none: Lion is not of"):
        attributed(replace(clipped, update=bare))
    with pytest.raises(ValueError, match="got none: read it with record_update, or give components="):
        attributed(replace(clipped, update=UpdateVector(clipped.update.direction, lr=1e-3)))
    for name in ("token_coefficients", "entropy_coefficients"):
        with pytest.raises(ValueError, match=rf"{name} of the U-batch's shape \[6, {T}\], got \[6, 1\]"):
            attributed(clipped, **{name: torch.zeros(6, 1)})
