"""The dry run before the first step: what it refuses, in which words, what it lets pass; and it leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from foreign import ForeignModule, fit, probe
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from entropy_pl import EntropyProbe
from entropy_pl.probe import take_dry_run
from entropy_pl.probe.memory import LESS_MEMORY

PROMPTS = ["1+1=", "10+20=", "3*3="]
TOKENIZER = build_tokenizer()


class OnlyForwards(torch.autograd.Function):
    """The identity, of which there is no derivative in forward mode, and where `backward` raises none at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("this kernel has no backward pass")


def lora(build: Callable[[], nn.Module] = build_model) -> nn.Module:
    """A fresh adapter, B = 0, on a policy in training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)).train()


def mixture() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, eos_token_id=1, **sizes, **experts)
    )


def through(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """The logits go through a function."""
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: function(output))
    return model


def single(logits: Tensor) -> Tensor:
    if logits.dtype is not torch.float32:
        raise RuntimeError(f"this kernel knows float32, got {logits.dtype}")
    return logits


OPTIONS: list[dict[str, Any]] = [{}, {"precision": "float64"}, {"method": "forward_mode", "baseline": "critic"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("build", [build_model, lora, mixture])
def test_no_trace_is_left(build, options):
    """Parameters, gradients, flags, random streams, settings, and nobody's hooks on gradients were called."""
    model, called = build().train(), []
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    list(model.modules())[-2].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(called.append)

    def state() -> list[Any]:
        tensors = [(n, id(p), p.data_ptr(), p.requires_grad, p._version) for n, p in model.named_parameters()]
        bits = [t.view(torch.uint8).tolist() for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
        streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        flags = [m.training for m in model.modules()], torch.is_grad_enabled(), torch.get_default_dtype()
        return [tensors, bits, streams, flags, vars(model.config).copy(), vars(model.generation_config).copy()]

    before = state()
    assert take_dry_run(EntropyProbe(**options), model, TOKENIZER, PROMPTS, attribution=True) == []
    assert state() == before
    assert not called


NOT_POSSIBLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no forward mode": (
        lambda: through(lora(), OnlyForwards.apply),
        {"method": "forward_mode"},
        r"in taking their derivatives along an update: NotImplementedError: .* AD\. method='central_difference'",
    ),
    "no float64": (
        lambda: through(lora(), single),
        {"precision": "float64"},
        r"in sampling them: RuntimeError: .*precision='float32'",
    ),
    "sees what comes": (
        lambda: BertLMHeadModel(
            BertConfig(
                vocab_size=len(TOKENIZER),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                initializer_range=0.5,  # as far from its random start as a trained one
                eos_token_id=1,
            )
        ),
        {},
        r"depend on earlier tokens alone, got BertLMHeadModel, .* nats: a causal language model is needed",
    ),
}


@pytest.mark.parametrize("what", NOT_POSSIBLE)
def test_what_cannot_work_is_refused_with_its_phase_and_cause(what):
    build, options, said = NOT_POSSIBLE[what]
    with pytest.raises(ValueError, match=said):
        take_dry_run(EntropyProbe(**options), build(), TOKENIZER, PROMPTS, attribution=True)


def test_without_a_backward_pass_all_but_the_attribution_is_measured():
    model = through(lora(), OnlyForwards.apply)
    assert take_dry_run(EntropyProbe(), model, TOKENIZER, PROMPTS) == []
    [said] = take_dry_run(EntropyProbe(), model, TOKENIZER, PROMPTS, attribution=True)
    assert "No attribution can be made" in said
    assert "this kernel has no backward pass" in said


def test_memory_that_is_short_may_be_free_later():
    def short(logits: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(ValueError, match="Memory may have been short for another reason") as refused:
        take_dry_run(EntropyProbe(), through(lora(), short), TOKENIZER, PROMPTS)
    assert LESS_MEMORY in str(refused.value)


def test_a_policy_that_has_diverged_is_said_and_not_refused():
    """The run may be there to find out why; its probes will fail by name."""
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    [said] = take_dry_run(EntropyProbe(), model, TOKENIZER, PROMPTS, attribution=True)
    assert "the policy's logits were not finite before the first step, in sampling them" in said
    assert "lm_head.weight" in said


class Unprobed(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        through(self.policy, OnlyForwards.apply)


def test_a_run_is_refused_before_its_first_step(tmp_path):
    module = Unprobed()
    with pytest.raises(MisconfigurationException, match=r"dry run .*in taking their derivatives"):
        fit(module, tmp_path, probe(method="forward_mode"), logger=False)
    assert not module.seen
