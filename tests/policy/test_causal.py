"""Which models are refused as a policy, each by the name of its class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import LoraConfig, get_peft_model
from tiny import build_model
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForTokenClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from entropy_pl.monitor.discovery import find_policy
from entropy_pl.probe import EntropyProbe

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {"vocab_size": 30, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
BART |= {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
QWEN = Qwen2Config(**SIZES, num_key_value_heads=1, pad_token_id=0)

OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        "T5ForConditionalGeneration, an encoder-decoder",
    ),
    "another": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "BartForConditionalGeneration, an enc"),
    "classifier": (lambda: Qwen2ForSequenceClassification(QWEN), "Qwen2ForSequenceClassification, which has no voc"),
    "classifier with LoRA": (
        lambda: get_peft_model(Qwen2ForSequenceClassification(QWEN), LoraConfig(r=2, task_type="SEQ_CLS")),
        "Qwen2ForSequenceClassification, which has no voc",
    ),
    "token classifier": (
        lambda: LlamaForTokenClassification(LlamaConfig(**SIZES)),
        "LlamaForTokenClassification, which has no vocabulary head",
    ),
    "body": (lambda: LlamaModel(LlamaConfig(**SIZES)), "LlamaModel, which has no vocabulary head"),
    "masked": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "BertForMaskedLM, which does not generate"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_refused_by_name(kind):
    build, said = OTHERS[kind]
    model = build()
    for refuses in (EntropyProbe().check, lambda m: find_policy(m, None)):
        with pytest.raises(ValueError, match=f"expected a policy that is a causal language model, got {said}") as error:
            refuses(model)
        assert "a causal language model is needed" in str(error.value)


def test_causal_language_models_are_not():
    """A decoder taken out of an encoder-decoder is one."""
    for model in (build_model(), get_peft_model(build_model(), LoraConfig(r=2)), BartForCausalLM(BartConfig(**BART))):
        EntropyProbe().check(model)
        assert find_policy(nn.ModuleDict({"policy": model}), None) is model


def test_an_adapter_that_is_merged_does_not_move():
    model = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"got .*layers\.0\.self_attn\.q_proj \(2 in all\) merged.* unmerge_adapter"):
        EntropyProbe().check(model)
    model.unmerge_adapter()
    EntropyProbe().check(model)
