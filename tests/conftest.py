"""Fixtures every room's tests may use: tiny policies built in code, and the real one where it lies."""

from __future__ import annotations

import os

# Before anything imports Transformers: no test may wait for, or depend on, a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# Tiny models gain nothing from threads; on a busy machine, or under pytest-xdist, waiting for them costs 10 to 50 fold.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def tiny_tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model_factory() -> Callable[..., Qwen2ForCausalLM]:
    return build_model


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def tiny_model() -> Qwen2ForCausalLM:
    return build_model()


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer, as ``save_pretrained`` writes them."""
    folder = tmp_path_factory.mktemp("tiny_policy")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_dir(request: pytest.FixtureRequest) -> Path:
    """The folder ``shared`` beside the repository, with real data and a real policy; skips where there is none."""
    folder = request.config.rootpath.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no folder 'shared' with real data and models beside the repository ({folder})")
    return folder
