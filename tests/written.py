"""Rollouts written down rather than sampled."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from entropy_pl.rollout import Rollout


def written_rollout(tokenizer: PreTrainedTokenizerFast, prompts: list[str], completions: list[str]) -> Rollout:
    """Prompts with these completions, a row each; `$` stands for EOS."""
    before = [tokenizer(text)["input_ids"] for text in prompts]
    after = [tokenizer(text.rstrip("$"))["input_ids"] + [1] * text.count("$") for text in completions]
    P, T = max(map(len, before)), max(map(len, after))
    return Rollout(
        torch.tensor([[0] * (P - len(row)) + row for row in before]),
        torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in before]),
        torch.tensor([row + [0] * (T - len(row)) for row in after]),
        torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in after]),
    )
