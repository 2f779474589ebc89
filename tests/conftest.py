"""Fixtures every package's tests may use: tiny policies built in code, and the real one where it lies."""

from __future__ import annotations

import os

# Before anything imports Transformers: no test may wait for, or depend on, a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build_model, build_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

# Tiny models gain nothing from threads; on a busy machine, or under pytest-xdist, waiting for them costs 10 to 50 fold.
torch.set_num_threads(1)


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
