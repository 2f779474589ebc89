"""Policies without the derivatives that a probe takes: what is withheld, what stays, and what is right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from entropy_pl import EntropyProbe, Rollout, UpdateVector, record_update, sample_completions
from entropy_pl.attribution import UpdateBatch
from entropy_pl.policy import isolated_rng
from entropy_pl.policy.tangents import tangents
from entropy_pl.probe import ProbeResult, WithheldError
from entropy_pl.probe.smoothness import ROUGH

LR = 1e-3
PROMPTS = [f"{a}+{b}=" for a in range(8) for b in range(8)]
SMALL = {
    "vocab_size": len(build_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


class RoundedInputs(nn.Module):
    """A linear layer whose inputs are rounded to 8 bits on the fly, row by row."""

    def __init__(self, layer: nn.Linear, straight_through: bool) -> None:
        super().__init__()
        self.layer, self.straight_through = layer, straight_through

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.detach().abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round() * scale
        return self.layer(x + (rounded - x).detach() if self.straight_through else rounded)


class StoppedGradient(nn.Module):
    """A linear layer whose outputs are scaled by the norms of its weight, through which no gradient goes, as DoRA's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.layer.weight.detach().norm(dim=1)
        return self.layer(x) * norm**8


def dense() -> nn.Module:
    return build_model()


def lora() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with isolated_rng(3):
        return get_peft_model(build_model(), config)


def dora() -> nn.Module:
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True
    )
    with isolated_rng(3):
        return get_peft_model(build_model(), config)


def mixtral() -> nn.Module:
    with isolated_rng(0):
        return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    with isolated_rng(0):
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=8)
        )


def int8(straight_through: bool = False) -> nn.Module:
    model = build_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = RoundedInputs(layer.mlp.down_proj, straight_through)
        layer.self_attn.o_proj = RoundedInputs(layer.self_attn.o_proj, straight_through)
    return model


def int8_straight_through() -> nn.Module:
    return int8(straight_through=True)


def stopped() -> nn.Module:
    model = build_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = StoppedGradient(layer.mlp.down_proj)
    return model


@dataclass
class Step:
    """A policy at θ, its step, and an E-batch drawn at θ."""

    model: nn.Module
    update: UpdateVector
    rollout: Rollout

    @classmethod
    def of(cls, make: Callable[[], nn.Module], max_new_tokens: int = 8) -> Step:
        model, tokenizer = make(), build_tokenizer()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)
        ids = torch.tensor([tokenizer(f"{a}+{b}={a + b}")["input_ids"] for a in range(3) for b in range(3)])
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with isolated_rng(7):
            rollout = sample_completions(model, tokenizer, PROMPTS, max_new_tokens=max_new_tokens)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        for name, p in model.named_parameters():
            p.data = before[name]
        return cls(model, recorder.update, rollout)

    def measure(self, **options) -> ProbeResult:
        return EntropyProbe(**options).measure(self.model, self.rollout, self.update)

    def batch(self) -> UpdateBatch:
        """Any U-batch: what it is does not matter to whether autograd can be followed."""
        u = self.rollout.select(torch.arange(16))
        return UpdateBatch(u, torch.where(u.completion_mask, 0.01, 0.0), gradient_scale=1.0)


@pytest.mark.parametrize("make", [dense, lora, dora, stopped])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_smooth_policies_are_measured_whole(make, precision):
    result = Step.of(make).measure(precision=precision)
    assert result.roughness < 0.1 * ROUGH  # a wide gap below the limit
    assert result.taken.first_order.trustworthy
    assert math.isfinite(result.eta_star)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, int8, int8_straight_through])
def test_where_the_policy_jumps_along_v_no_derivative_is_given_and_the_change_is(make):
    step = Step.of(make)
    result = step.measure(symmetric=True)
    assert result.roughness > 2 * ROUGH
    for withheld in (result.first_order, result.second_order, result.taken.first_order):
        assert math.isnan(withheld.value)
        assert not withheld.trustworthy
    assert math.isnan(result.eta_star)
    assert result.eta_star_ci_low is result.eta_star_ci_high is None
    assert any("not smooth" in warning for warning in result.warnings)
    assert result.taken.true.trustworthy
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["first_order"]["value"] is record["eta_star"] is None
    with pytest.raises(WithheldError, match="not smooth"):
        EntropyProbe().attribute(
            step.model,
            step.rollout,
            step.update,
            step.batch(),
            EntropyProbe().collect(step.model, step.rollout, step.update),
        )


def test_the_change_of_a_mixture_of_experts_is_that_of_fresh_samples():
    """ΔH against the entropies of 1,024 completions drawn at either end: z < 4."""
    step = Step.of(mixtral)
    step.update = step.update.scaled(10.0)  # a change that stands out
    change = step.measure().taken.true
    tokenizer, means = build_tokenizer(), []
    for eta in (0.0, LR):
        before = {name: p.data for name, p in step.model.named_parameters()}
        for name, v in step.update.direction.items():
            parameter = step.model.get_parameter(name)
            parameter.data = (before[name].double() + eta * v).float()
        with isolated_rng(int(1e6 * eta)):
            drawn = sample_completions(step.model, tokenizer, PROMPTS, num_completions=16, max_new_tokens=8)
        entropy, count = loop_entropies(step.model, drawn)
        for name, data in before.items():
            step.model.get_parameter(name).data = data
        ratio = entropy.sum() / count.sum()
        influence = (entropy - ratio * count).view(len(PROMPTS), -1).sum(1)
        means.append((ratio, influence.std() * math.sqrt(len(PROMPTS)) / count.sum()))
    fresh = float(means[1][0] - means[0][0])
    # The prompts are the same at both ends: adding their variances overstates the error.
    stderr = math.sqrt(change.stderr**2 + float(means[0][1]) ** 2 + float(means[1][1]) ** 2)
    assert abs(change.value - fresh) < 4 * stderr


def loop_entropies(model: nn.Module, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """ΣH and T of every completion, one plain forward pass each."""
    sums, counts = [], []
    for prompt, prompt_mask, completion, mask in zip(
        rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask, strict=True
    ):
        p, c = prompt[prompt_mask], completion[mask]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([p, c])[None]).logits[0].double()
        log = logits.log_softmax(-1)[len(p) - 1 : -1]
        sums.append(-(log.exp() * log).sum())
        counts.append(float(len(c)))
    return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("make", [dora, stopped])
@pytest.mark.parametrize("method", ["central_difference", "forward_mode"])
def test_where_autograd_does_not_follow_the_forward_pass_differences_count(make, method):
    """The slope is that of entropies at two points, scored by a loop, whatever made the derivatives."""
    step = Step.of(make)
    probe = EntropyProbe(precision="float64", method=method)
    result = probe.measure(step.model, step.rollout, step.update)
    assert result.method == "central_difference"
    by_differences = EntropyProbe(precision="float64", method="central_difference")
    expected = by_differences.measure(step.model, step.rollout, step.update).first_order
    assert result.first_order.value == pytest.approx(expected.value, rel=1e-6)
    scores = probe.collect(step.model, step.rollout, step.update)
    with pytest.raises(WithheldError, match=r"autograd|Forward mode"):
        probe.attribute(step.model, step.rollout, step.update, step.batch(), scores)


def test_the_error_of_differences_is_reported_and_of_its_size():
    """Against forward mode in float64 of the same sequences: off by no more than three times what is reported."""
    step = Step.of(lora)
    result = step.measure()
    exact = step.measure(precision="float64")
    off = abs(result.first_order.value - exact.first_order.value)
    assert 0 < result.difference_error < 0.05 * exact.first_order.stderr
    assert off < 3 * result.difference_error + 1e-6 * abs(exact.first_order.value)
    assert exact.difference_error == 0


def test_fewer_sequences_are_checked_than_measured_and_select_keeps_them_in_step(monkeypatch):
    monkeypatch.setattr("entropy_pl.probe.engine.CHECKED_SEQUENCES", 10)
    step, probe = Step.of(dense), EntropyProbe()
    scores = probe.collect(step.model, step.rollout, step.update)
    assert int(scores.halved.rows.sum()) == len(scores.halved.first) == 10
    part = scores.select(torch.tensor([3, 20, 5, 9]))
    assert part.halved.rows.tolist() == [True, False, True, True]
    torch.testing.assert_close(part.halved.first.logp, scores.halved.first.logp[[3, 5, 9]], rtol=0, atol=0)
    first = tangents(step.model, step.rollout, step.update, method="central_difference").first
    close = (scores.halved.first.logp - first.logp[:10]).abs().max()
    assert close < 0.02 * first.logp[:10].abs().max()
