"""Runs of TRL's GRPOTrainer that know nothing of this package, to be probed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import build_model, build_tokenizer
from transformers import TrainerCallback

from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback

trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")

LEARNT = [f"{a}+{b}=" for a in range(6) for b in range(6)]
EVALUATED = [f"{a}*{b}=" for a in range(4) for b in range(4)]


def reward_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def grpo_trainer(
    folder: Path,
    *,
    peft: bool = True,
    lora: dict[str, Any] | None = None,
    reward: Any = reward_digits,
    data: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Any:
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
        reward_funcs=reward,
        args=trl.GRPOConfig(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": LEARNT} if data is None else data),
        processing_class=build_tokenizer() if tokenizer is None else tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **(lora or {})) if peft else None,
    )


def probe(trainer: Any, **options: Any) -> EntropyProbeTrainerCallback:
    settings = {"num_sequences": 16, "every_n_steps": 2}
    callback = EntropyProbeTrainerCallback(EVALUATED, trainer=trainer, **(settings | options))
    trainer.add_callback(callback)
    return callback


class Keeper(TrainerCallback):
    """Keeps the weights before every step, and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def keep(self, model: Any) -> None:
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.keep(model)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.keep(model)
