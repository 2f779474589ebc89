"""The probe in TRL's GRPOTrainer and Hugging Face's Trainer, on runs that know nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import build_model, build_tokenizer

from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback
from entropy_pl.reporting import read_records

trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")

LEARNT = [f"{a}+{b}=" for a in range(6) for b in range(6)]
EVALUATED = [f"{a}*{b}=" for a in range(4) for b in range(4)]


def reward_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def grpo_trainer(folder: Path, *, peft: bool = True, **options: Any) -> Any:
    """Somebody's GRPO run: 4 prompts × 2 completions a step on a random policy."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": ["tensorboard"],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return trl.GRPOTrainer(
        model=build_model(),
        reward_funcs=reward_digits,
        args=trl.GRPOConfig(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": LEARNT}),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if peft else None,
    )


def probe(trainer: Any, **options: Any) -> EntropyProbeTrainerCallback:
    settings = {"num_sequences": 16, "every_n_steps": 2}
    callback = EntropyProbeTrainerCallback(EVALUATED, trainer=trainer, **(settings | options))
    trainer.add_callback(callback)
    return callback


def test_every_second_step_of_grpo_is_recorded(tmp_path):
    trainer = grpo_trainer(tmp_path)
    callback = probe(trainer)
    trainer.train()
    records = read_records(tmp_path / "entropy_probe/records.jsonl")
    assert [(r["step"], r["status"]) for r in records] == [(0, "ok"), (2, "ok")]
    for record in records:
        assert record["lr"] == 1e-2
        assert [p["eta"] for p in record["sweep"]] == pytest.approx([0.5e-2, 1e-2, 2e-2])
        assert record["update_gap"] < 1e-4  # float32's rounding of θ, 6e-8 of |θ| against steps of 1e-2
        assert record["e_prompts"]["in_u"] == 0
        assert record["temperature"] == 1.0
        assert record["reward"] == trainer.state.log_history[record["step"]]["reward"]
    assert callback.records[0]["entropy"]["n_tokens"] <= 16 * 8  # max_completion_length of the run
