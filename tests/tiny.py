"""Tiny policies and tokenizers, built in code."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# Four special tokens first, then one token per character, and nothing for a character that is not among them.
SPECIAL_TOKENS = ["<pad>", "<eos>", "<end>", "<bos>"]
CHARACTERS = "0123456789+-=*() abcdefghijklmnopqrstuvwxyz:.?\n<>/#"


def build_tokenizer(characters: str = CHARACTERS, **special: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: pad 0, EOS 1, a second end token 2, BOS 3 (not added to prompts)."""
    tokens = [*SPECIAL_TOKENS, *characters]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"} | special)
    )


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer, which now adds special tokens to a text: ``single`` is ``"<bos> $A"``, as Llama's, or the like."""
    special = [(token, SPECIAL_TOKENS.index(token)) for token in single.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def build_model(seed: int = 0, logit_scale: float = 1.0, **config: object) -> Qwen2ForCausalLM:
    """A random Qwen2 of two layers, in eval mode; its output head times ``logit_scale`` (1 is close to uniform)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": len(SPECIAL_TOKENS) + len(CHARACTERS),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        model = Qwen2ForCausalLM(Qwen2Config(**(defaults | config)))
    with torch.no_grad():
        model.lm_head.weight.mul_(logit_scale)
    return model.eval()
