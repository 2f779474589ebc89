"""A GRPO run of a tiny policy, stopped and saved, and the config that measures it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.registry import PromptExample, register_dataset
from entropy_pl.grpo import GRPOModule
from entropy_pl.objectives import register_reward
from entropy_pl.policy import LoraSettings, PolicySettings

LR = 1e-2


@register_reward("test_letters")
def letters_reward(completion: str, answer: str) -> float:
    """Differs almost surely within a group."""
    return sum(c.isalpha() for c in completion) / max(1, len(completion))


@register_reward("test_short")
def short_reward(completion: str, answer: str) -> float:
    """Another that differs."""
    return 1 / (1 + len(completion))


@register_dataset("test_questions", template="{question}")
def load_questions(split: str, *, path: str | None, size: int | None, seed: int) -> list[PromptExample]:
    """Forty questions a split, in the tiny tokenizer's characters and of several lengths."""
    if split not in ("train", "test"):
        raise FileNotFoundError(f"expected the split train or test, got {split}")
    sign = "+" if split == "train" else "-"
    return [PromptExample(f"what is {i * i} {sign} {i}?", str(i)) for i in range(40)]


def save_run(policy: Path, folder: Path, steps: list[int], **options: Any) -> None:
    """Train a tiny policy and save it after each of ``steps`` steps, as ``step-<n>.ckpt``.

    Args:
        policy: the folder of the model that is trained.
        folder: of the checkpoints.
        steps: when to save.
        options: of the module.
    """
    module = GRPOModule(
        PolicySettings(str(policy), lora=LoraSettings(rank=4, alpha=8)),
        num_generations=4,
        max_new_tokens=8,
        rewards=["test_letters"],
        optimizer=lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.01),
        **options,
    )
    batches = [PromptBatch(["what is 1 + 2?", "what is 3 - 4?"], ["3", "-1"])]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step in steps:
                trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")

    Trainer(
        accelerator="cpu",
        max_steps=max(steps),
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Save()],
    ).fit(module, DataLoader(batches, batch_size=None, generator=torch.Generator()))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def run_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after 5 and after 6 optimizer steps."""
    folder = tmp_path_factory.mktemp("run")
    save_run(tiny_policy_dir, folder, [5, 6])
    return folder


@pytest.fixture
def another_run(tiny_policy_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains under other options of the module, and returns the checkpoint after so many steps."""

    def train(steps: int, **options: Any) -> Path:
        save_run(tiny_policy_dir, tmp_path, [steps], **options)
        return tmp_path / f"step-{steps}.ckpt"

    return train


@pytest.fixture
def config(run_dir: Path) -> Callable[..., dict[str, Any]]:
    """The measurement's config; keyword arguments are merged into its sections."""

    def make(**sections: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "checkpoint": {"checkpoint_path": str(run_dir / "step-5.ckpt")},
            "batch_config": {"dataset_name": "test_questions", "B_E": 16, "B_U": 4, "G": 4},
            "generation": {"max_new_tokens": 8},
            "update": {"rewards": ["test_letters"]},
        }
        for name, section in sections.items():
            base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
        return base

    return make
