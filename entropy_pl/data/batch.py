"""Prompts as a step gets them; apart from the datamodule, since who needs these need not have Lightning loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass  # not frozen: Lightning's half precision plugin rebuilds batches field by field
class PromptBatch:
    """Formatted prompts with their reference answers, one answer per prompt.

    Args:
        prompts: formatted, ready for the tokenizer.
        answers: the reference answer of each.
    """

    prompts: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, **_: Any) -> PromptBatch:
        """Text has no device: the batch itself. Lightning asks for nothing more."""
        return self
