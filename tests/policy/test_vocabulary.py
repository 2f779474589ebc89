"""Which tokenizers are said to be another model's, and which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from entropy_pl.policy.load import load_policy
from entropy_pl.policy.vocabulary import foreign_tokenizer


class Sized(PreTrainedTokenizerFast):
    """A tokenizer that says that it has more tokens than it has: making 200,000 takes seconds."""

    said: int
    added: int

    @property
    def vocab_size(self) -> int:
        return self.said

    def __len__(self) -> int:
        return self.said + self.added


def sized(tokens: int, added: int = 0) -> Sized:
    tokenizer = Sized(tokenizer_object=build_tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.said, tokenizer.added = tokens, added
    return tokenizer


def embedding(vocabulary: int, **config: Any) -> Any:
    """A policy of so many embeddings, which need not be made to be counted."""
    model = build_model(vocab_size=54, **config)
    with torch.device("meta"):
        model.set_input_embeddings(nn.Embedding(vocabulary, 1))
    return model


@pytest.mark.parametrize(
    ("tokens", "embeddings"),
    [
        (151_665, 151_936),  # Qwen2.5-1.5B
        (151_665, 152_064),  # Qwen2.5-7B
        (50_295, 51_200),  # Phi-2
        (100_002, 102_400),  # DeepSeek-V2-Lite
        (200_019, 201_088),  # gpt-oss
        (32_000, 32_000),  # Llama 2
        (97, 128),  # padded to a multiple of 64 or 128
        (97, 192),
        (300, 320),
    ],
)
def test_spare_embeddings_are_common(tokens, embeddings):
    assert foreign_tokenizer(embedding(embeddings), sized(tokens)) is None


def test_so_are_added_tokens_that_are_not_embedded():
    """Llama 2 with a pad token, Gemma 3's text models with one for images."""
    assert foreign_tokenizer(embedding(1000), sized(1000, added=1)) is None


@pytest.mark.parametrize(("tokens", "embeddings"), [(97, 2048), (128_256, 151_936), (32_000, 50_304), (2048, 97)])
def test_another_size(tokens, embeddings):
    said = foreign_tokenizer(embedding(embeddings), sized(tokens))
    assert said is not None
    assert f"it has {tokens:,} tokens, and the policy embeds {embeddings:,}" in said


@pytest.mark.parametrize("eos", [1, [2, 1], 2, None])
def test_an_eos_that_the_tokenizer_knows_for_special(eos):
    """A second one, that of the base where the tokenizer is the chat's, or a list: no other model's."""
    assert foreign_tokenizer(build_model(eos_token_id=eos), build_tokenizer()) is None


def test_an_eos_that_is_one_of_the_tokenizers_words():
    model = get_peft_model(build_model(eos_token_id=9), LoraConfig(r=2, target_modules=["q_proj"]))
    said = foreign_tokenizer(model, build_tokenizer())
    assert said is not None
    assert "the policy's EOS is token 9, which it reads as '5', and its own is 1" in said


def test_the_same_size_with_other_ids(tmp_path):
    """Only the tokenizer that lies with the model tells."""
    build_model().save_pretrained(tmp_path / "policy")
    build_tokenizer().save_pretrained(tmp_path / "policy")
    model, own = load_policy(str(tmp_path / "policy"), lora=None)
    other = build_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789+-=*() :.?\n<>/#")
    other.name_or_path = "another/policy"
    assert len(other) == len(own)
    said = foreign_tokenizer(model, other)
    assert said is not None
    assert "the tokenizer (another/policy) looks like another model's than that of the policy (" in said
    assert "other ids in it, or none" in said
    own.name_or_path = "base/policy"  # a copy by another name, as of a model that was tuned
    own.add_tokens(["<think>"])
    assert foreign_tokenizer(model, own) is None
    model.config._name_or_path = "nowhere/policy"  # nothing to compare with
    assert foreign_tokenizer(model, other) is None


def test_loading_a_policy_warns(tmp_path):
    build_model(vocab_size=2048).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"55 tokens, and the policy embeds 2,048.*give the tokenizer that was saved"):
        load_policy(str(tmp_path))
