"""Prompts: datasets by name, and the datamodule that keeps evaluation and update prompts apart."""

from entropy_pl.data import arithmetic, gsm8k  # noqa: F401  (importing them registers their datasets)
from entropy_pl.data.datamodule import PromptBatch, PromptDataModule
from entropy_pl.data.registry import PromptDataset, PromptExample, available_datasets, get_dataset, register_dataset

__all__ = [
    "PromptBatch",
    "PromptDataModule",
    "PromptDataset",
    "PromptExample",
    "available_datasets",
    "get_dataset",
    "register_dataset",
]
