"""A tiny policy with warm AdamW moments, and the config of a study of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_pl.config import SettingsParser
from entropy_pl.objectives import register_reward
from entropy_pl.policy import LoraSettings, isolated_rng, load_policy
from entropy_pl.studies import STUDIES, StudySettings


@register_reward("test_studies_digits")
def digits_reward(completion: str, answer: str) -> float:
    """Differs almost surely within a group."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


@pytest.fixture(scope="session")
def checkpoint_dir(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder after three steps along random gradients, with ``optimizer.pt``."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with isolated_rng(0):  # LoRA's random half: with it δH₁ is several times its standard error
        model = load_policy(str(tiny_policy_dir), lora=LoraSettings(rank=4)).model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


@pytest.fixture(scope="session")
def settings_of(checkpoint_dir: Path) -> Callable[..., StudySettings]:
    """``settings_of(name, output_directory, study={...}, **sections)``: of a study small enough for a test."""

    def make(name: str, output_directory: Path, study: dict[str, Any], **sections: Any) -> StudySettings:
        defaults: dict[str, Any] = {
            "checkpoint": {"checkpoint_path": str(checkpoint_dir)},
            "batch_config": {
                "dataset_name": "arithmetic_r1_template",
                "prompt_template": "{question}",
                "B_E": 32,
                "B_U": 4,
                "G": 4,
            },
            "generation": {"max_new_tokens": 8},
            "estimator": {"eta_list": [1e-4, 1e-3]},
            "update": {"rewards": ["test_studies_digits"]},
            "precision": {"runtime_dtype": "float64"},
            "output_directory": str(output_directory),
            "study": study,
        }
        for section, keys in sections.items():
            defaults[section] = defaults[section] | keys if isinstance(keys, dict) else keys
        return SettingsParser(STUDIES[name].settings).read(defaults)

    return make
