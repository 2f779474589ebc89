"""Sampler and scorer in a run: what a record says of them, and that a probe of two policies is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_policies import Stale
from foreign import ForeignModule, fit, probe
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from entropy_pl.monitor import run_probe


def longrope() -> nn.Module:
    """The prompts are within its 8 short positions, the longest completions are not."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 8, "partial_rotary_factor": 1.0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(build_tokenizer()), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**sizes, **tokens, **lengths, num_key_value_heads=2, rope_parameters=rope))


def stale() -> nn.Module:
    model = build_model()
    model.__class__ = Stale
    return model


def activated() -> nn.Module:
    invocation = build_tokenizer()("=")["input_ids"]
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        alora_invocation_tokens=invocation,
    )
    return get_peft_model(build_model(), config)


class Module(ForeignModule):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy


def records(policy: nn.Module, folder: Path, **options: Any) -> list[dict[str, Any]]:
    callback = probe(every_n_steps=1, eta_multipliers=(), num_sequences=8, max_new_tokens=5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Module(policy), folder, callback, steps=3, default_root_dir=folder, logger=False)
    return callback.records[1:]  # the first step does not move


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every E-batch that is drawn."""
    drawn: list[int] = []
    draw = run_probe.sample_completions

    def counting(*args: Any, **options: Any) -> Any:
        drawn.append(len(args[2]))
        return draw(*args, **options)

    monkeypatch.setattr(run_probe, "sample_completions", counting)
    return drawn


def test_an_activated_adapter_is_measured(tmp_path, draws):
    found = records(activated(), tmp_path)
    assert [(r["status"], r["message"], r["absent"].get("sampler_gap")) for r in found] == [("ok", None, None)] * 2
    assert all(0 < r["sampler_gap"] < 1e-5 for r in found)  # float32's rounding
    assert len(draws) == 2


@pytest.mark.parametrize(("build", "word", "gap"), [(stale, "cache", 1e-4), (longrope, "longrope", None)])
def test_two_policies_are_refused_without_drawing_again(tmp_path, draws, build, word, gap):
    first, second = records(build(), tmp_path)
    assert first["status"] == second["status"] == "failed"
    assert word in first["message"]
    assert second["message"] == first["message"]
    assert len(draws) == 1
    for record in (first, second):
        assert record["sampler_gap"] is None if gap is None else record["sampler_gap"] > gap


def test_of_an_e_batch_drawn_by_something_else_nothing_is_said(tmp_path, monkeypatch):
    draw = run_probe.sample_completions
    monkeypatch.setattr(
        run_probe,
        "sample_completions",
        lambda *args, generated=None, **options: draw(*args, **options),
    )
    found = records(build_model(), tmp_path)
    assert [(r["status"], r["sampler_gap"]) for r in found] == [("ok", None)] * 2
    assert all("drew" in r["absent"]["sampler_gap"] for r in found)
