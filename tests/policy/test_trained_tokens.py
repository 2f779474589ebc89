"""PEFT's `trainable_token_indices`: the policy is a plain one with other rows of its embeddings, and head if tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_precision import random_update
from test_score import plain_stats
from tiny import build_model
from torch import Tensor, nn

from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.score import head_inputs, token_stats
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import Rollout, TokenStats

TOKENS = [4, 5, 15]  # "0", "1" and "+": the prompts below have them
PROMPTS = ["1+1=", "10+0+1=", "0="]
BOTH = {"embed_tokens": TOKENS, "lm_head": TOKENS}
POLICIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "untied": (False, {"trainable_token_indices": TOKENS}),
    "tied": (True, {"trainable_token_indices": TOKENS}),
    "both": (False, {"trainable_token_indices": BOTH}),
    "tied, LoRA on the head": (True, {"trainable_token_indices": TOKENS, "target_modules": ["q_proj", "lm_head"]}),
}


def build(name: str) -> nn.Module:
    """Some tokens' rows are trained, and already differ from the model they were taken of."""
    tied, options = POLICIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | options))
        model = get_peft_model(build_model(tie_word_embeddings=tied, logit_scale=3.0), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or "trainable_tokens_delta" in parameter_name:
                nn.init.normal_(parameter, std=0.3)
    return model


def plain(name: str, moved: dict[str, Tensor]) -> nn.Module:
    """An unwrapped model of the same function: rows exchanged and LoRA's products added by hand."""
    twin = build_model(logit_scale=3.0, tie_word_embeddings=POLICIES[name][0])
    head = twin.lm_head.weight.detach().clone()  # a tied one gets a life of its own
    twin.lm_head.weight = nn.Parameter(head)
    tensors = {key.removeprefix("base_model.model."): value.detach().float() for key, value in moved.items()}
    with torch.no_grad():
        for key, value in tensors.items():
            if "trainable_tokens_delta" in key:
                layer = key.split(".token_adapter")[0].removesuffix(".base_layer")
                twin.get_submodule(layer).weight[TOKENS] = value
                if POLICIES[name][0]:
                    twin.lm_head.weight[TOKENS] = value
        for key, down in tensors.items():
            if "lora_A" in key:
                up = tensors[key.replace("lora_A", "lora_B")]
                twin.get_submodule(key.split(".lora_A")[0]).weight += 8 / 2 * up @ down  # PEFT's alpha is 8, r is 2
    return twin.eval()


@pytest.fixture(params=POLICIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(model: nn.Module, tokenizer: Any) -> Rollout:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sample_completions(model, tokenizer, PROMPTS, max_new_tokens=5)


def test_sampled_and_scored_at_another_theta(name, tiny_tokenizer):
    model = build(name)
    rollout, update, eta = drawn(model, tiny_tokenizer), random_update(model), 0.5
    assert {n for n in update.direction if "trainable_tokens" in n}
    values = dict(model.named_parameters())
    for at in (0.0, eta):
        twin = plain(name, {n: values[n].double() + at * v for n, v in update.direction.items()})
        stats = token_stats(model, rollout, update=update, eta=at)
        with torch.no_grad():
            logp, entropy = plain_stats(twin, rollout)
        # Float32 through two layers, summed in another order.
        torch.testing.assert_close(stats.logp, logp, rtol=0, atol=1e-4)
        torch.testing.assert_close(stats.entropy, entropy, rtol=0, atol=1e-4)
    greedy, expected = (
        sample_completions(m, tiny_tokenizer, PROMPTS, max_new_tokens=5, top_k=1)
        for m in (model, plain(name, {n: values[n] for n in update.direction}))
    )
    assert torch.equal(greedy.completion_ids, expected.completion_ids)


def test_differentiated(name, tiny_tokenizer):
    """Along v by forward mode, by differences, and by the gradient: one number."""
    model, eta = build(name), 1e-6
    rollout, update = drawn(model, tiny_tokenizer), random_update(model)
    mask = rollout.completion_mask
    with float64_evaluation(model):
        exact = token_stats_jvp(model, rollout, update, method="forward_mode")[1]
        plus, minus = (token_stats(model, rollout, update=update, eta=e) for e in (eta, -eta))
        gradient = weighted_gradient(
            model, rollout, TokenStats(mask.double(), torch.zeros_like(exact.logp), mask), update.direction
        )
    # Float64 leaves 1e-15/η of a difference.
    largest = float(exact.logp.abs().max())
    assert largest > 0.01
    torch.testing.assert_close((plus.logp - minus.logp) / (2 * eta), exact.logp, rtol=0, atol=1e-7 * max(1.0, largest))
    assert update.along(gradient)[0] == pytest.approx(float(exact.logp.sum()), rel=1e-9)
    assert all(value.abs().sum() > 0 for n, value in gradient.items() if "trainable_tokens" in n)


def test_hidden_states(tiny_tokenizer):
    model = build("tied")
    rollout = drawn(model, tiny_tokenizer)
    states = head_inputs(model, rollout)
    assert states.shape == (int(rollout.completion_mask.sum()), 32)
