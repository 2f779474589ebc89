"""Token budgets found from free memory, and the shape they are worked out from."""

from __future__ import annotations

import pytest
import torch
from test_score import FAMILIES, build_family, build_rollout
from tiny import build_model
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entropy_pl.policy import micro_batches as batching
from entropy_pl.policy.micro_batches import default_batch_tokens
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.shape import ModelShape


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""

    def set_to(amount: float) -> None:
        monkeypatch.setattr(batching, "_free_bytes", lambda device: int(amount))

    return set_to


def activation_bytes(tokens: int) -> int:
    """Of a Qwen2 with d = 32 and an inner size of 48, in float32: 8 numbers of the one and 3 of the other a token."""
    return tokens * (8 * 32 + 3 * 48) * 4


def test_a_quarter_of_what_is_free_rounded_to_a_power_of_two(free):
    model = build_model()
    for tokens in (512, 1024):
        for slack in (1.0, 1.9):
            free(4 * slack * activation_bytes(tokens))
            assert default_batch_tokens(model) == tokens
    free(4 * activation_bytes(1024) - 8)
    assert default_batch_tokens(model) == 512


def test_no_less_than_fits_a_sequence_and_no_more_than_keeps_the_device_busy(free):
    model = build_model()
    free(0)
    assert default_batch_tokens(model) == default_batch_tokens(model, graph=True) == 256
    free(1e15)
    assert default_batch_tokens(model) == 2048


def test_a_graph_takes_room(free):
    """Of every layer, and of the logits."""
    free(4 * activation_bytes(2048))
    assert default_batch_tokens(build_model(), graph=True) < default_batch_tokens(build_model()) == 2048
    free(4 * activation_bytes(40_000))
    assert default_batch_tokens(build_model(), graph=True) == 2048
    assert default_batch_tokens(build_model(vocab_size=30_000), graph=True) == 256


def test_float64_is_twice_as_wide(free):
    model = build_model()
    free(4 * activation_bytes(1024))
    with float64_evaluation(model):
        assert default_batch_tokens(model) == 512


def test_the_real_memory_is_asked():
    assert 256 <= default_batch_tokens(build_model()) <= 2048


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "opt-relu"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_the_cache_is_as_large_as_the_shape_says(family, lora):
    model = build_family(family, lora).eval()
    shape = ModelShape.of(model)
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 3 * shape.cache
    assert (shape.hidden, shape.vocabulary, shape.layers) == (16, 23, 2)


def test_attention_that_is_not_fused_takes_room(free):
    """Its scores and their softmax, of a layer at a time: 2 numbers a head and pair of positions."""
    model = build_model(attn_implementation="eager")
    longest = 3 + 40
    rollout = build_rollout(((3, 40), (2, 5)))
    bytes_a_token = activation_bytes(1) + 2 * 4 * longest * 4
    free(4 * 1024 * bytes_a_token)
    assert default_batch_tokens(model, rollout) == 1024
    free(4 * 1024 * bytes_a_token - 8)
    assert default_batch_tokens(model, rollout) == 512
    free(4 * activation_bytes(1024))
    assert default_batch_tokens(build_model(), rollout) == 1024  # fused


def test_every_stock_configuration_has_a_shape():
    """Some have a list where others have a number, or raise where their layers differ."""

    class Model(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.config, self.head = config, nn.Linear(8192, 4, device="meta")

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    shapes = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # it has no defaults
            continue
        shapes[kind] = ModelShape.of(Model(config))
    assert len(shapes) > 100
    assert {k: s for k, s in shapes.items() if min(s.activations, s.graph_of_body, s.cache) <= 0} == {}
    assert shapes["qwen2"].layers == 32
    assert shapes["gemma3n_text"].inner == 16_384  # of a list
