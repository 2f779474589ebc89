"""Prompts: datasets by name, and the datamodule that keeps evaluation and update prompts apart.

The datamodule is imported when first asked for: what reads prompts alone need not wait for Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entropy_pl.data import arithmetic, gsm8k  # noqa: F401  (importing them registers their datasets)
from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.registry import PromptDataset, PromptExample, available_datasets, get_dataset, register_dataset

if TYPE_CHECKING:
    from entropy_pl.data.datamodule import PromptDataModule

__all__ = [
    "PromptBatch",
    "PromptDataModule",
    "PromptDataset",
    "PromptExample",
    "available_datasets",
    "get_dataset",
    "register_dataset",
]


def __getattr__(name: str) -> Any:
    if name != "PromptDataModule":
        raise AttributeError(f"module 'entropy_pl.data' has no attribute {name!r}")
    from entropy_pl.data.datamodule import PromptDataModule

    return PromptDataModule
