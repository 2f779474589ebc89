"""Mixtures of experts in float64 and in forward mode: by a loop over experts, whatever kernel was chosen at first."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_precision import DtypesSeen, everything, random_update
from test_score import _ROTARY, build_rollout, plain_stats
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from entropy_pl.policy.precision import evaluation, float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import token_stats_jvp

_ROUTED = _ROTARY | {"num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_ROUTED, num_experts=4, moe_intermediate_size=8, head_dim=4, norm_topk_prob=True)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_ROUTED, num_experts=4)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_ROUTED, num_local_experts=4)),
    "deepseek": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **(_ROUTED | {"num_key_value_heads": 4}),
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=8,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**_ROUTED, num_local_experts=4, head_dim=4)),
}
ROLLOUT = build_rollout()


def build(name: str, lora: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES[name]()
        if lora:  # on the experts' own parameters, which are no layers
            config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
            model = get_peft_model(model, config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    nn.init.normal_(parameter, std=0.3)
    return model


def by_loop(model: nn.Module) -> nn.Module:
    """The same model, with the loop over experts of its own class, in double."""
    twin = copy.deepcopy(model).double().eval()
    twin.set_experts_implementation("eager")
    return twin


@pytest.mark.parametrize("name", MIXTURES)
def test_float64_is_the_loop_over_experts(name):
    model = build(name)
    with torch.no_grad():
        logp, entropy = plain_stats(by_loop(model), ROLLOUT)
    with float64_evaluation(model), DtypesSeen(torch.float64) as seen:
        stats = token_stats(model, ROLLOUT)
    assert not seen.narrow
    # The twin made double casts routers and norms to float32 inside.
    torch.testing.assert_close(stats.logp, logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "lora"), [("qwen3", False), ("olmoe", False), ("deepseek", False), ("qwen3", True)])
def test_forward_mode_is_the_limit_of_differences(name, lora):
    """No route flips within 1e-6: float64 leaves 1e-15/η = 1e-9 of a difference."""
    model, eta = build(name, lora), 1e-6
    update = random_update(model)
    with float64_evaluation(model):
        exact = token_stats_jvp(model, ROLLOUT, update, method="forward_mode")[1]
        plus, minus = (token_stats(model, ROLLOUT, update=update, eta=e) for e in (eta, -eta))
    assert exact.logp.abs().max() > 0.1
    largest = float(exact.logp.abs().max())
    torch.testing.assert_close((plus.logp - minus.logp) / (2 * eta), exact.logp, rtol=0, atol=1e-7 * max(1.0, largest))
    # In float32, where grouped products serve everything but derivatives, to float32's precision.
    single = token_stats_jvp(model, ROLLOUT, update, method="forward_mode")[1]
    torch.testing.assert_close(single.logp, exact.logp, rtol=0, atol=1e-4 * max(1.0, largest))


@pytest.mark.parametrize("context", [evaluation, float64_evaluation])
def test_the_choice_of_experts_is_put_back(context):
    model = build("qwen3")
    chosen, before = model.config._experts_implementation, everything(model)
    assert chosen == "grouped_mm"
    with pytest.raises(RuntimeError, match="in the midst"), context(model):
        raise RuntimeError("in the midst")
    token_stats_jvp(model, ROLLOUT, random_update(model), method="forward_mode")
    assert model.config._experts_implementation == chosen
    assert everything(model) == before


def test_products_that_know_half_precision_only_give_way():
    model = build("qwen3")
    expected = token_stats(model, ROLLOUT)
    model.config._experts_implementation = "sonicmoe"
    stats = token_stats(model, ROLLOUT)
    assert model.config._experts_implementation == "sonicmoe"
    torch.testing.assert_close(stats.logp, expected.logp, rtol=0, atol=1e-5)  # float32 sums in another order
