from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from written import written_rollout

from entropy_pl.groups import Groups
from entropy_pl.objectives import LossSettings, LossType
from entropy_pl.policy import LoraSettings, Policy, PolicySettings, float64_evaluation, load_policy_from
from entropy_pl.policy.score import token_stats
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch
from entropy_pl.rollout import Rollout

T_MAX = 8
CLIP = {"clip_low": 0.2, "clip_high": 0.3, "max_completion_length": T_MAX}
# Every term of the loss, alone and with others.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl_coefficient": 0.3},
    "entropy_bonus": {"entropy_coefficient": 0.2},
    "clip_higher": {"clip_high": 0.5},
    "clip_cov": {"clip_cov_fraction": 0.2, "clip_cov_bounds": (0.0, 9.0)},
    "kl_cov": {"kl_cov_fraction": 0.2, "kl_cov_coefficient": 0.7},
    "positive_only": {"advantage_sign": "positive", "kl_coefficient": 0.3},
    "negative_only": {"advantage_sign": "negative", "entropy_coefficient": 0.2},
    "all": {"kl_coefficient": 0.3, "entropy_coefficient": 0.2, "kl_cov_fraction": 0.2, "advantage_sign": "negative"},
}
CASES = [(loss_type, name) for loss_type in get_args(LossType) for name in OPTIONS]


def loop_loss(
    logp: list[list[Any]],
    entropy: list[list[Any]],
    old: list[list[float]],
    ref: list[list[float]],
    advantages: list[float],
    chosen: list[list[bool]],
    settings: LossSettings,
) -> Any:
    """The loss, token by token, of numbers or of tensors with a graph; rows hold as many as a completion has tokens."""
    exp = torch.exp if isinstance(logp[0][0], Tensor) else math.exp
    lengths = [len(row) for row in logp]
    total: Any = 0.0
    for i, a in enumerate(advantages):
        for k in range(lengths[i]):
            weight = {
                "grpo": 1 / (len(logp) * lengths[i]),
                "dr_grpo": 1 / (len(logp) * T_MAX),
                "dapo": 1 / sum(lengths),
                "bnpo": 1 / sum(lengths),
            }[settings.loss_type]
            ratio = exp(logp[i][k] - old[i][k])
            low, high = 1 - settings.clip_low, 1 + settings.clip_high
            gain = min(ratio * a, min(max(ratio, low), high) * a)
            if settings.kl_cov_fraction and chosen[i][k]:
                gain = ratio * a
            if settings.clip_cov_fraction and chosen[i][k]:
                gain = 0.0
            if (settings.advantage_sign, a > 0) in (("positive", False), ("negative", True)):
                gain = 0.0
            gap = ref[i][k] - logp[i][k]
            token = (
                -gain + settings.kl_coefficient * (exp(gap) - gap - 1) - settings.entropy_coefficient * entropy[i][k]
            )
            if settings.kl_cov_fraction and chosen[i][k]:
                token = token + settings.kl_cov_coefficient * abs(logp[i][k] - old[i][k])
            total = total + weight * token
    return total


def settings_of(loss_type: str, name: str) -> LossSettings:
    return LossSettings(**{"loss_type": loss_type, **CLIP, **OPTIONS[name]})


def rows(values: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]


# ------------------------------------------------------------------------------- the loss's dependence on every token


@pytest.mark.parametrize("several", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize(("loss_type", "name"), CASES)
def test_coefficients_are_the_losss_derivatives(loss_type: str, name: str, several: bool) -> None:
    """Central differences of a loop, step 1e-6, in float64: their error is 1e-10 of rounding, and 1e-12 of the step."""
    lengths, width = [5, 1, 3, 2], 5
    generator = torch.Generator().manual_seed(4)
    logp, old, ref = (torch.randn(4, width, generator=generator).double() * 0.4 - 2 for _ in range(3))
    advantages = torch.tensor([1.5, -0.7, -1.2, 0.4], dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = mask.long()
    chosen = torch.rand(4, width, generator=generator) < 0.4
    settings = settings_of(loss_type, name)
    objective = PolicyGradient(settings, dtype=torch.float64)
    counts = torch.tensor(lengths, dtype=torch.float64)[:, None]
    divisor = {"grpo": 4 * counts, "dr_grpo": 4.0 * T_MAX}.get(loss_type, 11.0)
    weights = mask.double() / divisor
    batch = TrainingBatch(Rollout(ids, torch.ones_like(mask), ids, mask), advantages, weights, ref, chosen)
    if several:
        ratios = (logp - old).exp()[mask]
        assert (ratios < 0.8).any()  # clipped from both sides, and no kink within a step
        assert (ratios > 1.5).any()
        assert min((ratios - edge).abs().min() for edge in (0.8, 1.0, 1.3, 1.5)) > 1e-3

    token, entropy = objective.coefficients(batch, logp.float(), old.float() if several else None)
    assert token.dtype == torch.float64
    logp = logp.float().double()
    at = rows(logp, lengths)
    kept = rows(old.float() if several else logp, lengths)
    others = rows(ref, lengths), advantages.tolist(), rows(chosen, lengths), settings
    zeros = [[0.0] * n for n in lengths]
    for i, length in enumerate(lengths):
        for k in range(width):
            slopes = [0.0, 0.0]
            for which, values in enumerate((at, zeros)):
                if k < length:
                    sides = []
                    before = values[i][k]
                    for step in (1e-6, -1e-6):
                        values[i][k] = before + step
                        sides.append(loop_loss(at, zeros, kept, *others))
                    values[i][k] = before
                    slopes[which] = (sides[0] - sides[1]) / 2e-6
            assert token[i, k].item() == pytest.approx(slopes[0], abs=1e-8)
            assert (0.0 if entropy is None else entropy[i, k].item()) == pytest.approx(slopes[1], abs=1e-8)
    assert (entropy is None) == (settings.entropy_coefficient == 0)


# ---------------------------------------------------------------------------------------------------- on a tiny policy

PROMPTS = ["1 + 2 =", "1 + 2 =", "17 - 9 = ", "17 - 9 = "]
COMPLETIONS = ["12 a$", "b 3.14", "2$", "cc 7 d"]
REWARDS = [0.5, 0.25, 1.0, 0.125]
TEMPERATURE = 0.7


@pytest.fixture
def policy(tiny_policy_dir: Any) -> Iterator[Policy]:
    """With an adapter that is not zero: otherwise A would have no gradient, and the KL would be zero."""
    torch.manual_seed(3)
    policy = load_policy_from(PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=4, dropout=0.3)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with float64_evaluation(policy.model):  # dropout off, all of it in float64
        yield policy


def groups_of(policy: Policy) -> Groups:
    rollout = written_rollout(policy.tokenizer, PROMPTS, COMPLETIONS)
    return Groups(rollout, torch.tensor(REWARDS), {}, torch.zeros(4, dtype=torch.bool), 2)


def objective_of(settings: LossSettings) -> PolicyGradient:
    return PolicyGradient(settings, "mean", TEMPERATURE, max_batch_tokens=30, dtype=torch.float64)


ADVANTAGES = [0.125, -0.125, 0.4375, -0.4375]


def one_by_one(model: Any, rollout: Rollout) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Log-probs and entropies with a graph, one sequence and one token at a time."""
    logp: list[list[Tensor]] = []
    entropy: list[list[Tensor]] = []
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        completion = rollout.completion_ids[i][rollout.completion_mask[i]].tolist()
        logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
        logp.append([])
        entropy.append([])
        for k, token in enumerate(completion):
            log_p = logits[len(prompt) + k - 1].log_softmax(0)
            logp[-1].append(log_p[token])
            entropy[-1].append(-(log_p.exp() * log_p).sum())
    return logp, entropy


def numbers(values: list[list[Tensor]]) -> list[list[float]]:
    return [[value.item() for value in row] for row in values]


@pytest.mark.parametrize("several", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_is_that_of_a_plain_loop(policy: Policy, name: str, several: bool) -> None:
    model, settings = policy.model, settings_of("grpo", name)
    objective = objective_of(settings)
    torch.manual_seed(0)
    batch = objective.batch(model, groups_of(policy))
    assert batch is not None
    assert (batch.old_logp is not None) == (batch.selected is not None) == settings.needs_covariance
    noise = torch.randn(batch.weights.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp, entropy = one_by_one(model, batch.rollout)
    with model.disable_adapter():
        ref, _ = one_by_one(model, batch.rollout)
    lengths = [len(row) for row in logp]
    old_logp = None
    old = numbers(logp)
    if several:
        old_logp = token_stats(model, batch.rollout, temperature=TEMPERATURE).logp + 0.4 * noise
        old = rows(old_logp, lengths)
    chosen = rows(torch.zeros_like(noise).bool() if batch.selected is None else batch.selected, lengths)
    loss = loop_loss(logp, entropy, old, numbers(ref), ADVANTAGES, chosen, settings)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))

    gradient = objective.gradient(model, batch, old_logp)
    assert all(p.grad is None for p in model.parameters())
    assert gradient.keys() == expected.keys()
    seen = objective.backward(model, batch, old_logp)
    for parameter_name, value in expected.items():
        size = float(value.abs().max())  # of float64 and some hundred terms, 1e-12 of the largest entry is rounding
        assert gradient[parameter_name].dtype == torch.float64
        torch.testing.assert_close(gradient[parameter_name], value, rtol=0, atol=1e-12 * size)
        torch.testing.assert_close(trainable[parameter_name].grad, value, rtol=0, atol=1e-12 * size)
    for i, length in enumerate(lengths):
        assert seen[i, :length].tolist() == pytest.approx(numbers(logp)[i], rel=1e-12)  # likewise

    # and it is what the coefficients say: by the chain rule, Σ a ∇log π + b ∇h
    a, b = objective.coefficients(batch, seen, old_logp)
    logp, entropy = one_by_one(model, batch.rollout)  # the first graph is spent
    chain: Any = sum(a[i, k] * logp[i][k] for i, n in enumerate(lengths) for k in range(n))
    if b is not None:
        chain = chain + sum(b[i, k] * entropy[i][k] for i, n in enumerate(lengths) for k in range(n))
    for value, wanted in zip(torch.autograd.grad(chain, list(trainable.values())), expected.values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def passes(model: Any, objective: PolicyGradient, groups: Groups) -> int:
    """Sequences that the model is given while the batch is made."""
    given = []
    handle = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    objective.batch(model, groups)
    handle.remove()
    return sum(given)


@pytest.mark.parametrize(
    ("name", "times"), [("plain", 0), ("entropy_bonus", 0), ("kl", 1), ("clip_cov", 1), ("kl_cov", 1), ("all", 2)]
)
def test_a_batch_costs_a_pass_only_where_it_needs_one(policy: Policy, name: str, times: int) -> None:
    state = torch.get_rng_state()
    assert passes(policy.model, objective_of(settings_of("grpo", name)), groups_of(policy)) == 4 * times
    assert torch.equal(torch.get_rng_state(), state) == (name != "clip_cov")  # it alone draws


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_tokens_are_chosen_by_the_policy_that_sampled(policy: Policy, name: str) -> None:
    """Without dropout, whatever the mode: the covariance of every token from log-probs taken one by one."""
    settings = settings_of("grpo", name)
    policy.model.train()
    batch = objective_of(settings).batch(policy.model, groups_of(policy))
    assert policy.model.training
    policy.model.eval()
    assert batch is not None
    assert batch.old_logp is not None
    assert batch.selected is not None
    logp = numbers(one_by_one(policy.model, batch.rollout)[0])
    for row, values in zip(batch.old_logp.tolist(), logp, strict=True):
        assert row[: len(values)] == pytest.approx(values, rel=1e-12)  # float64, padded or not
    flat = [(i, k, value) for i, row in enumerate(logp) for k, value in enumerate(row)]
    mean = sum(value for *_, value in flat) / len(flat)
    mean_advantage = sum(ADVANTAGES[i] for i, *_ in flat) / len(flat)
    covariance = {(i, k): (value - mean) * (ADVANTAGES[i] - mean_advantage) for i, k, value in flat}
    count = int(0.2 * len(flat))
    chosen = {tuple(place) for place in batch.selected.nonzero().tolist()}
    assert len(chosen) == count == 3
    if name == "kl_cov":
        assert chosen == set(sorted(covariance, key=lambda place: -covariance[place])[:count])
    else:
        assert all(covariance[place] > 0 for place in chosen)


def test_an_entropy_bonus_teaches_where_rewards_are_equal(policy: Policy) -> None:
    groups = replace(groups_of(policy), rewards=torch.ones(4))
    assert objective_of(settings_of("grpo", "plain")).batch(policy.model, groups) is None
    objective = objective_of(settings_of("grpo", "entropy_bonus"))
    batch = objective.batch(policy.model, groups)
    assert batch is not None
    assert any(gradient.any() for gradient in objective.gradient(policy.model, batch).values())


def test_a_share_without_rows_has_a_gradient_of_zero(policy: Policy) -> None:
    empty = groups_of(policy).select(torch.zeros(2, dtype=torch.bool))
    objective = objective_of(settings_of("grpo", "all"))
    batch = objective.batch(policy.model, empty, lambda values: values + 1)  # another process has some
    assert batch is not None
    assert not any(gradient.any() for gradient in objective.gradient(policy.model, batch).values())
    token, entropy = objective.coefficients(batch, batch.weights)
    assert entropy is not None
    assert token.shape == entropy.shape == batch.weights.shape
