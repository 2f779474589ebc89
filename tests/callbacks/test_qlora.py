"""QLoRA end to end: nf4 base with double quantization, GRPO over its adapter, the probe by central differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import build_model, build_tokenizer
from torch import nn

from entropy_pl import EntropyProbe, GRPOModule, PromptDataModule, load_policy
from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.objectives import register_reward
from entropy_pl.policy import LoraSettings, PolicySettings
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.updates import UpdateVector

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 'gpu')")


@register_reward("test_qlora_length")
def length_reward(completion: str, answer: str) -> float:
    return len(completion) / 8


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    build_model(hidden_size=64, intermediate_size=128, max_position_embeddings=256).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def fit(base: str, folder: Path, **probe_options: Any) -> EntropyProbeCallback:
    options = {"num_sequences": 12, "every_n_steps": 1, "max_new_tokens": 6}
    probe = EntropyProbeCallback(**(options | probe_options))
    policy = PolicySettings(base, lora=LoraSettings(rank=4), quantization="nf4", dtype="bfloat16")
    module = GRPOModule(
        policy=policy,
        num_generations=4,
        max_new_tokens=8,
        rewards=["test_qlora_length"],
        optimizer=lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-4, min_8bit_size=16),
    )
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        default_root_dir=folder,
        callbacks=[probe],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, PromptDataModule(e_size=12, batch_size=4))
    return probe


def test_grpo_over_an_nf4_policy_is_probed(base, tmp_path):
    probe = fit(base, tmp_path)
    assert [(r["step"], r["status"], r["message"]) for r in probe.records] == [(0, "ok", None), (1, "ok", None)]
    for record in probe.records:
        assert record["method"] == "central_difference"
        assert record["e_prompts"] == probe.records[0]["e_prompts"]
        assert record["e_prompts"]["in_u"] == 0
        assert set(record["update_components"]) == {"momentum", "gradient", "weight_decay"}  # of 8-bit moments
        [taken] = [point for point in record["sweep"] if point["taken"]]
        assert taken["true"]["value"] == pytest.approx(taken["first_order"]["value"], rel=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forward_mode"}, "without quantized layers for forward mode, .* method='central_difference'"),
        ({"precision": "float64"}, "without quantized layers for float64, .* or probe in float32"),
    ],
)
def test_what_quantized_layers_cannot_do_is_refused_at_the_start(base, tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(base, tmp_path, **options)


def test_it_measures_what_the_dequantized_policy_would(base):
    """The oracle has plain float32 layers with the values that the 4-bit codes stand for, and exact derivatives."""
    with isolated_rng(0):
        model, tokenizer = load_policy(base, lora=LoraSettings(rank=4), quantization="nf4", dtype="bfloat16")
        rollout = sample_completions(model, tokenizer, [f"{n}+1=" for n in range(9)], max_new_tokens=8)
        direction = {
            n: torch.randn_like(p, dtype=torch.float64) for n, p in model.named_parameters() if p.requires_grad
        }
    update = UpdateVector(direction, lr=1e-2)
    probe = EntropyProbe(eta_multipliers=())
    measured = probe.measure(model, rollout, update)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                layer.weight.quant_state.dtype = torch.float32  # or it would be rounded to bfloat16 on the way
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                if layer.bias is not None:
                    plain.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
                setattr(parent, name, plain)
    expected = EntropyProbe(eta_multipliers=(), method="forward_mode").measure(model, rollout, update)
    # float32 in both, summed in another order
    assert measured.entropy.value == pytest.approx(expected.entropy.value, rel=1e-5)
    assert measured.taken.true.value == pytest.approx(expected.taken.true.value, rel=1e-3)
    # differences: h² and the rounding of log-probs over h, 1e-3 together
    assert measured.first_order.value == pytest.approx(expected.first_order.value, rel=5e-3)
